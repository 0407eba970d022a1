/** Maps of blocks × modules, fitted to the room that they have. */

const LETTER = 6.4; // pixels of a letter in a cell

/** Leave out what would overlap: texts wider than their cells; names of modules stand slanted where they are too long. */
export function fitted({ data, layout }, width) {
  for (const trace of data) {
    if (trace.type !== "heatmap") continue;
    const narrow = width < 560;
    const cell = (width - (narrow ? 110 : 250)) / trace.x.length;
    const longest = (trace.text ?? []).flat().reduce((most, text) => Math.max(most, plain(text).length), 0);
    if (longest * LETTER > cell) delete trace.texttemplate;
    const names = trace.x.map((name) => String(name).split("<br>"));
    if (Math.max(...names.flat().map((name) => name.length)) * LETTER > cell) {
      layout.xaxis = { ...layout.xaxis, tickangle: -60, tickmode: "array", tickvals: trace.x, ticktext: names.map((parts) => parts.at(-1)) };
      layout.margin = { ...layout.margin, t: 78 };
    }
    if (narrow && trace.colorbar) {
      trace.colorbar = { ...trace.colorbar, orientation: "h", y: -0.02, yanchor: "top", x: 0.5, thickness: 8, title: { ...trace.colorbar.title, side: "bottom" } };
      layout.margin = { ...layout.margin, b: 84, l: 36, r: 10 };
      layout.height = (layout.height ?? 340) + 70;
    }
  }
  return { data, layout };
}

const plain = (text) => String(text ?? "").replaceAll(/<[^>]*>/g, "");

/** A colour between two, `share` of the way. */
function between(a, b, share) {
  const [from, to] = [a, b].map((hex) => [1, 3, 5].map((at) => Number.parseInt(hex.slice(at, at + 2), 16)));
  return `#${from.map((channel, i) => Math.round(channel + share * (to[i] - channel)).toString(16).padStart(2, "0")).join("")}`;
}

/** `count` colours along a scale of stops. */
function along(stops, count) {
  return Array.from({ length: count }, (_, i) => {
    const place = count > 1 ? (i * (stops.length - 1)) / (count - 1) : (stops.length - 1) / 2;
    const low = Math.min(Math.floor(place), stops.length - 2);
    return between(stops[low], stops[low + 1], place - low);
  });
}

const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];

/** Give two maps of schemes one legend, so that a colour means the same in both. `schemes` are those of either. */
export function alike({ data, layout }, schemes) {
  const [trace] = data;
  const own = trace?.colorbar?.ticktext;
  if (!own) return { data, layout };
  const place = own.map((scheme) => schemes.indexOf(scheme));
  trace.z = trace.z.map((row) => row.map((value) => (value === null ? null : place[value])));
  delete trace.texttemplate; // its colours were chosen for other grounds
  trace.zmin = -0.5;
  trace.zmax = schemes.length - 0.5;
  trace.colorscale = along(CIVIDIS, schemes.length).flatMap((colour, i) => [[i / schemes.length, colour], [(i + 1) / schemes.length, colour]]);
  trace.colorbar = { ...trace.colorbar, tickvals: schemes.map((_, i) => i), ticktext: schemes };
  return { data, layout };
}

/** The schemes of several maps, lightest first, as each map orders its own. */
export function union(figures) {
  const found = new Map();
  for (const figure of figures) {
    const own = figure.plotly.data[0]?.colorbar?.ticktext ?? [];
    own.forEach((scheme) => found.set(scheme, bits(scheme)));
  }
  return [...found].sort((a, b) => a[1] - b[1] || (a[0] < b[0] ? -1 : 1)).map(([scheme]) => scheme);
}

const bits = (scheme) => (scheme.startsWith("keep") ? 99 : Number(/(\d+)/.exec(scheme.replace(/^\D*/, ""))?.[1] ?? 50));
