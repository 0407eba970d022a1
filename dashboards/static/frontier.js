/** The frontier: two objectives against each other, a third as colour; what fails the limits is pale. */
import { studyPath } from "./api.js";
import { Cloud, numbers } from "./cloud.js";
import { fill, h, perFrame, say } from "./dom.js";
import { Figure, saveButtons } from "./figure.js";
import { axisTitle, objectiveName, quantity } from "./format.js";
import { colour, plotly } from "./plot.js";
import { fits, trialName } from "./points.js";
import { setView, view } from "./view.js";

const PALE = 0.13;
const SVG = "http://www.w3.org/2000/svg";

/** A symbol of Plotly's as a small picture. */
function glyph(symbol, size) {
  const picture = document.createElementNS(SVG, "svg");
  for (const [name, value] of Object.entries({ viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true" })) picture.setAttribute(name, value);
  const r = Math.min(5, size / 2);
  const shape = (tag, attributes) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    picture.append(element);
  };
  const open = symbol.includes("open");
  const paint = open ? { fill: "none", stroke: "currentColor", "stroke-width": 1.6 } : { fill: "currentColor" };
  if (symbol.startsWith("square")) shape("rect", { x: 6 - r, y: 6 - r, width: 2 * r, height: 2 * r, ...paint });
  else if (symbol.startsWith("x")) shape("path", { d: "M2.5 2.5L9.5 9.5M9.5 2.5L2.5 9.5", stroke: "currentColor", "stroke-width": 1.4 });
  else if (symbol.startsWith("triangle")) shape("path", { d: "M2 3h8L6 10Z", ...paint });
  else shape("circle", { cx: 6, cy: 6, r, ...paint });
  if (symbol.endsWith("dot")) shape("circle", { cx: 6, cy: 6, r: 1.2, fill: "currentColor" });
  return picture;
}

/** A name a little off its marker, which would cover its first letter. */
const aside = (text, place) => (place === "middle right" ? `\u2002${text}` : place === "middle left" ? `${text}\u2002` : text);

export class Frontier {
  /**
   * @param {HTMLElement} root
   * @param {HTMLElement} tools
   * @param {import("./points.js").Points} points
   * @param {{select: (number: number, more: boolean) => void}} calls
   */
  constructor(root, tools, points, { select }) {
    this.points = points;
    this.select = select;
    this.limits = {};
    this.chosen = [];
    this.best = null;
    this.positions = new Map(); // of all that is drawn
    this.along = []; // the frontier as it is drawn, which may be older or newer than the points, from left to right
    this.figure = new Figure(root, {
      name: `${points.study}-frontier`,
      label: "Frontier. Left and right arrow keys go from point to point; the same numbers are in the table below.",
      address: (options) => `${studyPath(points.study, "figures", "frontier")}?${new URLSearchParams(options)}`,
      prepare: (figure) => this.#prepare(figure),
      drawn: (plot) => this.#drawn(plot),
    });
    this.plot = this.figure.plot;
    this.plot.addEventListener("keydown", (event) => this.#key(event));
    this.cloud = new Cloud(this.plot, (number) => this.describe(number));
    this.cloud.onclick = (number, event) => this.select(number, event.shiftKey || event.ctrlKey || event.metaKey);
    this.repaint = perFrame(() => this.cloud.paint());
    this.restyle = perFrame(() => this.figure.figure && this.figure.redraw());
    document.addEventListener("theme", () => this.repaint());
    this.#tools(tools);
  }

  #tools(tools) {
    this.tools = tools;
    const objectives = this.points.objectives.map(({ name }) => [name, objectiveName(name)]);
    const chooser = (name, label, more) =>
      h("label", {}, label, h("select", { id: `axis-${name}`, onchange: (event) => this.show({ [name]: event.target.value, zoom: null }) },
        [["", "auto"], ...more, ...objectives].map(([value, text]) => h("option", { value, selected: view(name) === value }, text))));
    this.scales = Object.fromEntries(["x", "y"].map((axis) => [axis, h("button", {
      type: "button", class: "quiet small", "aria-label": `Logarithmic ${axis} axis`, "aria-pressed": "false",
      onclick: () => this.show({ [`${axis}_scale`]: this.scales[axis].getAttribute("aria-pressed") === "true" ? "linear" : "log", zoom: null }),
    }, "log")]));
    fill(
      tools,
      h("span", { class: "pair" }, chooser("x", "x", []), this.scales.x),
      h("span", { class: "pair" }, chooser("y", "y", []), this.scales.y),
      chooser("color", "colour", [["none", "none"]]),
      h("span", { class: "end" }, h("button", { type: "button", class: "quiet small", onclick: () => this.reset(), "aria-keyshortcuts": "r" }, "Whole frontier")),
    );
    this.figure.footer(saveButtons(this.figure));
    this.legend = h("ul", { class: "legend" });
    this.figure.root.prepend(this.legend);
  }

  /** Change axes, colour or scales; all of it is in the address. */
  show(changes = {}) {
    if (Object.keys(changes).length) {
      setView(changes);
      this.fresh = true;
    }
    const options = {};
    for (const name of ["x", "y", "color", "x_scale", "y_scale"]) if (view(name)) options[name] = view(name);
    return this.figure.load(options);
  }

  /** What is pale, what is ringed. */
  mark({ limits, chosen, best }) {
    this.limits = limits;
    this.chosen = chosen;
    this.best = best;
    this.restyle();
  }

  /** Lines for one trial: its name and its numbers. */
  describe(number) {
    const trial = this.points.trials.get(number);
    if (!trial) return [`trial ${number}`];
    return [trialName(trial), ...this.points.own.map(({ name, unit }) =>
      trial.measured[name] ? `${objectiveName(name)}: ${quantity(trial.measured[name].value, unit)}${trial.measured[name].kind === "predicted" ? " (predicted)" : ""}` : "")];
  }

  #prepare({ data, layout }) {
    this.positions.clear();
    const front = new Set();
    this.tools.hidden = data.length === 0;
    this.legend.hidden = data.length === 0;
    if (!data.length) return { data, layout };
    const limited = Object.keys(this.limits).length > 0;
    const kept = limited ? new Set([...this.points.trials.values()].filter((trial) => fits(trial, this.limits)).map((trial) => trial.number)) : null;
    const drawn = [];
    let cloud = null;
    for (const trace of data) {
      const own = numbers(trace.customdata).length ? Array.from(numbers(trace.customdata), (each) => (Array.isArray(each) ? each[0] : each)) : null;
      const points = own && (trace.mode ?? "markers").includes("markers");
      if (points) {
        const [x, y] = [numbers(trace.x), numbers(trace.y)];
        own.forEach((number, i) => this.positions.set(number, [x[i], y[i]]));
        if (trace.meta?.status === "frontier") own.forEach((number) => front.add(number));
        if (trace.meta?.status === "baseline") own.filter((number) => this.points.trials.get(number)?.on_frontier).forEach((number) => front.add(number));
        if (trace.type === "scattergl") {
          cloud = { x, y, number: own };
          continue;
        }
        if (kept) {
          const base = trace.marker?.opacity ?? 1;
          trace.marker = { ...trace.marker, opacity: own.map((number, i) => (kept.has(number) ? (base[i] ?? base) : PALE)) };
          for (const bar of ["error_x", "error_y"]) {
            if (trace[bar]) trace[bar].array = Array.from(numbers(trace[bar].array), (error, i) => (kept.has(own[i]) ? error : NaN)); // no bar, not one of no length
          }
        }
      } else if (trace.type === "scattergl") {
        trace.type = "scatter";
      }
      if (Array.isArray(trace.text) && Array.isArray(trace.textposition)) trace.text = trace.text.map((text, i) => aside(text, trace.textposition[i]));
      if (trace.mode === "lines") Object.assign(trace, { line: { ...trace.line, color: colour("accent") }, opacity: 0.7 });
      drawn.push(trace);
    }
    this.along = [...front].sort((a, b) => this.positions.get(a)[0] - this.positions.get(b)[0] || this.positions.get(b)[1] - this.positions.get(a)[1]);
    this.cloudPoints = cloud;
    this.cloud.kept = kept;
    this.#showLegend(drawn);
    for (const axis of ["x", "y"]) {
      const own = layout[`${axis}axis`];
      const objective = this.points.objective(layout.meta?.[axis]);
      this.scales[axis].setAttribute("aria-pressed", String(own?.type === "log"));
      if (!own || !objective) continue;
      own.title = { ...own.title, text: axisTitle(objective) };
      if (own.type === "log" && objective.unit !== "bytes") own.tickformat = "~g";
    }
    const third = this.points.objective(layout.meta?.color);
    if (third && layout.coloraxis) {
      const narrow = this.plot.clientWidth < 560;
      layout.coloraxis.colorbar = { ...layout.coloraxis.colorbar, title: { text: axisTitle(third), side: "right" }, thickness: 10, outlinewidth: 0, len: 1, ...(narrow ? { orientation: "h", y: -0.2, yanchor: "top", x: 0.5, title: { text: axisTitle(third), side: "bottom" } } : { y: 0.5, xpad: 8 }) };
    }
    drawn.push(...this.#rings());
    layout = { ...layout, uirevision: ["x", "y", "x_scale", "y_scale"].map((name) => view(name)).join("|"), hovermode: "closest", dragmode: "zoom", showlegend: false };
    layout.margin = { l: 64, r: 12, b: 48, ...layout.margin, t: 8 };
    return { data: drawn, layout };
  }

  #showLegend(traces) {
    fill(this.legend, traces.filter((trace) => trace.name && trace.showlegend !== false).map((trace) => h("li", {}, glyph(trace.marker?.symbol ?? "circle", trace.marker?.size ?? 8), trace.name)),
      this.cloudPoints && !traces.some((trace) => trace.name === "dominated") ? h("li", {}, glyph("circle", 4), "dominated") : null);
  }

  #rings() {
    const ring = (list, line, size, name) => {
      const at = list.filter((number) => this.positions.has(number)).map((number) => this.positions.get(number));
      return { type: "scatter", mode: "markers", x: at.map(([x]) => x), y: at.map(([, y]) => y), name, showlegend: false, hoverinfo: "skip",
        marker: { symbol: "circle-open", size, color: line, line: { width: 2.5, color: line } } };
    };
    return [ring(this.best === null ? [] : [this.best], colour("best"), 19, "best"), ring(this.chosen, colour("accent"), 14, "selected")];
  }

  async #drawn(plot) {
    this.cloud.show(this.cloudPoints, { on: colour("ink-3"), off: colour("line") });
    if (this.wired || !plot.on) return;
    this.wired = true;
    plot.on("plotly_click", ({ points, event }) => {
      const found = points.map((point) => point.customdata).find((data) => data !== undefined);
      const number = Array.isArray(found) ? found[0] : found;
      if (typeof number === "number") this.select(number, event.shiftKey || event.ctrlKey || event.metaKey);
    });
    plot.on("plotly_relayout", (changes) => {
      this.repaint();
      this.#remember(changes);
    });
    plot.on("plotly_relayouting", () => this.repaint());
    plot.on("plotly_afterplot", () => this.repaint());
    const zoom = view("zoom").split(",").map(Number);
    if (zoom.length === 4 && zoom.every(Number.isFinite)) {
      const library = await plotly();
      await library.relayout(plot, { "xaxis.range": zoom.slice(0, 2), "yaxis.range": zoom.slice(2) });
    }
  }

  #remember(changes) {
    if (!Object.keys(changes).some((name) => /axis\.(range|autorange)/.test(name))) return;
    const { xaxis, yaxis } = this.plot._fullLayout;
    const whole = Object.entries(changes).some(([name, value]) => name.endsWith("autorange") && value);
    setView({ zoom: whole ? null : [...xaxis.range, ...yaxis.range].map((value) => Number(value.toPrecision(6))).join(",") });
  }

  /** Zoom out. */
  async reset() {
    const library = await plotly();
    const { xaxis, yaxis } = this.figure.figure.plotly.layout;
    const ends = (name, axis) => (axis?.range ? { [`${name}.range`]: [...axis.range] } : { [`${name}.autorange`]: true });
    await library.relayout(this.plot, { ...ends("xaxis", xaxis), ...ends("yaxis", yaxis) });
    setView({ zoom: null });
  }

  #key(event) {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const { along } = this;
    if (!along.length) return;
    event.preventDefault();
    const step = event.key === "ArrowRight" ? 1 : -1;
    const chosen = this.chosen.at(-1);
    const place = along.indexOf(chosen);
    let next = place + step;
    if (place < 0) {
      // From a point that is not on it (any more) to its neighbour; with none chosen from an end.
      const from = this.positions.get(chosen)?.[0];
      const right = from === undefined ? (step > 0 ? 0 : along.length) : along.filter((number) => this.positions.get(number)[0] <= from).length;
      next = step > 0 ? right : right - 1;
    }
    const number = along[Math.min(along.length - 1, Math.max(0, next))];
    if (number === chosen) return; // the end: pressing on does not let go of it
    this.select(number, event.shiftKey);
    say(this.describe(number).join(", "));
  }
}
