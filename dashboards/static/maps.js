/** Figures fitted to the room that they have. */
import { readable } from "./format.js";

const LETTER = 6.4; // pixels of a letter in a cell
const NARROW = 560;

/**
 * Leave out what would overlap: texts wider than their cells; names of modules stand slanted where they are too long.
 * In a narrow picture titles of axes have several lines, names go without what they have in common, and what a colour
 * means stands below.
 */
export function fitted({ data, layout }, width) {
  const narrow = width < NARROW;
  for (const trace of data) {
    if (trace.type === "bar") bars(trace, layout, narrow);
    if (trace.type !== "heatmap") continue;
    const cell = (width - (narrow ? 110 : 250)) / trace.x.length;
    const longest = (trace.text ?? []).flat().reduce((most, text) => Math.max(most, plain(text).length), 0);
    if (longest * LETTER > cell) delete trace.texttemplate;
    const names = trace.x.map((name) => String(name).split("<br>"));
    if (Math.max(...names.flat().map((name) => name.length)) * LETTER > cell) {
      layout.xaxis = { ...layout.xaxis, tickangle: -60, tickmode: "array", tickvals: trace.x, ticktext: names.map((parts) => parts.at(-1)) };
      layout.margin = { ...layout.margin, t: 78 };
    }
    const steps = trace.colorbar?.ticktext ?? [];
    const named = steps.some((text) => /[a-z]/i.test(text));
    if (named) trace.colorbar.title = { text: "" }; // the names say what they are, and have no room for more
    if (narrow && named) {
      key(trace, layout);
    } else if (narrow && trace.colorbar) {
      trace.colorbar = { ...trace.colorbar, orientation: "h", y: -0.02, yanchor: "top", x: 0.5, thickness: 8, title: { ...trace.colorbar.title, side: "bottom" } };
      layout.margin = { ...layout.margin, b: 84, l: 36, r: 10 };
      layout.height = (layout.height ?? 340) + 70;
    }
  }
  for (const [name, axis] of Object.entries(layout)) {
    if (!/^[xy]axis\d*$/.test(name) || !axis?.title?.text) continue;
    const words = readable(axis.title.text);
    axis.title = { ...axis.title, text: narrow && name[0] === "x" ? lines(words, Math.floor((width - 110) / 7)) : words };
    if (narrow && axis.dtick === "D2") axis.dtick = 1;
  }
  return { data, layout };
}

/** What the colours of a narrow map mean, line by line below it. */
function key(trace, layout) {
  const { ticktext, tickvals } = trace.colorbar;
  const shades = trace.colorscale.filter((_, i) => i % 2 === 0).map(([, shade]) => shade); // each step has two ends
  const rows = ticktext.map((text, i) => `<span style="color:${shades[i]}">■</span> ${text}`);
  trace.showscale = false;
  layout.annotations = [...(layout.annotations ?? []), { text: rows.join("<br>"), showarrow: false, align: "left", xref: "paper", yref: "paper", x: 0, y: 0, xanchor: "left", yanchor: "top", yshift: -8 }];
  layout.margin = { ...layout.margin, b: 20 + 17 * tickvals.length, l: 36, r: 10 };
  layout.height = (layout.height ?? 340) + 17 * tickvals.length;
}

/** Names beside bars: shorter where many begin alike; texts after the bars need room. */
function bars(trace, layout, narrow) {
  if (trace.text) trace.text = trace.text.map((text) => readable(text));
  const names = trace.orientation === "h" ? [...new Set(trace.y)] : [];
  if (!narrow || !names.length) return;
  const begin = /^(?:\w+\.)*?(?=(?:layers?|blocks?|h)\.\d)/.exec(names[0])?.[0] ?? "";
  const shared = begin && names.every((name) => name.startsWith(begin)) ? begin.length : 0;
  layout.yaxis = { ...layout.yaxis, tickmode: "array", tickvals: names, ticktext: names.map((name) => (shared ? name.slice(shared) : name.replace(" / ", " /<br>"))) };
  if (trace.text && layout.xaxis?.range) layout.xaxis = { ...layout.xaxis, range: [layout.xaxis.range[0], 3.4 * Math.max(1, ...trace.x)], nticks: 4 };
}

/** A text in lines of so many letters. */
function lines(text, most) {
  const found = [""];
  for (const word of text.split(" ")) {
    if (found.at(-1) && found.at(-1).length + word.length >= most) found.push(word);
    else found[found.length - 1] += found.at(-1) ? ` ${word}` : word;
  }
  return found.join("<br>");
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
