/** All objectives at once: one line a trial, one axis an objective. A range brushed on an axis is a limit. */
import { perFrame } from "./dom.js";
import { objectiveName, quantity } from "./format.js";
import { fits, trialName } from "./points.js";

const SVG = "http://www.w3.org/2000/svg";
const MOST = 1500; // lines that are drawn of what is not on the frontier
const TOP = 46;
const BOTTOM = 26;

function s(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** From where on a logarithmic axis shows these values; null where a linear one does better. */
function floor(values) {
  const sorted = values.filter((value) => value > 0).sort((a, b) => a - b);
  const typical = sorted[Math.floor(sorted.length * 0.05)];
  return sorted.length > 2 && sorted.at(-1) / typical > 10 ? typical / 100 : null;
}

export class Parallel {
  /**
   * @param {HTMLElement} plot
   * @param {import("./points.js").Points} points
   * @param {import("./limits.js").Limits} limits
   * @param {(number: number, more: boolean) => void} select
   */
  constructor(plot, points, limits, select) {
    Object.assign(this, { plot, points, limits, select, chosen: [] });
    this.later = perFrame(() => this.draw());
    new ResizeObserver(this.later).observe(plot);
  }

  /** Scales of the axes: logarithmic where the figure says so. */
  #axes(width, height) {
    const inner = height - TOP - BOTTOM;
    const own = this.points.own;
    const pad = Math.min(90, width / 8);
    let complete = this.points.complete.filter((trial) => own.every(({ name }) => trial.measured[name]));
    // What a logarithmic axis has no place for would only press all others into a corner of the other axes.
    const floors = own.map(({ name }) => floor(complete.map((trial) => trial.measured[name].value)));
    complete = complete.filter((trial) => own.every(({ name }, i) => floors[i] === null || trial.measured[name].value >= floors[i]));
    this.shown = complete;
    this.width = width;
    return own.map((objective, i) => {
      const values = complete.map((trial) => trial.measured[objective.name].value);
      const low = values.reduce((least, value) => Math.min(least, value), Infinity);
      const high = values.reduce((most, value) => Math.max(most, value), -Infinity);
      const log = floors[i] !== null;
      const share = (value) => {
        const at = log ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : (value - low) / (high - low || 1);
        return Math.min(1, Math.max(0, at));
      };
      const better = objective.direction === "minimize";
      return {
        ...objective, low, high, log,
        x: own.length === 1 ? width / 2 : pad + (i * (width - 2 * pad)) / (own.length - 1),
        y: (value) => TOP + inner * (better ? share(value) : 1 - share(value)),
        value: (y) => {
          const at = Math.min(1, Math.max(0, (y - TOP) / inner));
          const part = better ? at : 1 - at;
          return log ? low * (high / low) ** part : low + part * (high - low);
        },
      };
    });
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.plot;
    if (!width || !height) return;
    const axes = this.#axes(width, height);
    const all = this.shown;
    const rest = all.filter((trial) => !trial.on_frontier && trial.baseline === null);
    const step = Math.max(1, Math.ceil(rest.length / MOST));
    const shown = [...rest.filter((_, i) => i % step === 0), ...all.filter((trial) => trial.baseline !== null && !trial.on_frontier), ...all.filter((trial) => trial.on_frontier)];
    const limited = Object.keys(this.limits.bounds).length > 0;
    const rank = (trial) => (this.chosen.includes(trial.number) ? 2 : limited && !fits(trial, this.limits.bounds) ? 0 : 1);
    shown.sort((a, b) => rank(a) - rank(b));
    const lines = shown.map((trial) => {
      const kind = rank(trial) === 2 ? "picked" : rank(trial) === 0 ? "off" : trial.baseline !== null ? "base" : trial.on_frontier ? "front" : "";
      const path = s("path", { class: kind || null, d: axes.map(({ name, x, y }, i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y(trial.measured[name].value).toFixed(1)}`).join("") });
      path.append(s("title", {}, trialName(trial)));
      path.addEventListener("click", (event) => this.select(trial.number, event.shiftKey));
      return path;
    });
    const picture = s("svg", { class: "parallel", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, ...lines, ...axes.map((axis) => this.#axis(axis, height)));
    this.plot.replaceChildren(picture);
  }

  #axis(axis, height) {
    const { x, name, unit, low, high } = axis;
    const ends = axis.direction === "minimize" ? [low, high] : [high, low];
    // Texts of the outer axes go inwards where the picture is too narrow for them.
    const place = (text) => {
      const half = text.length * 3.6;
      const [anchor, at] = x < half ? ["start", 0] : x > this.width - half ? ["end", this.width] : ["middle", x];
      return { x: at, "text-anchor": anchor };
    };
    const texts = [[objectiveName(name), 14], [quantity(ends[0], unit), 32], [`${quantity(ends[1], unit)}${axis.log ? ", log" : ""}`, height - 8]];
    const group = s("g", { class: "axis" },
      s("line", { x1: x, x2: x, y1: TOP, y2: height - BOTTOM }),
      ...texts.map(([text, y]) => s("text", { class: y === 14 ? "title" : null, y, ...place(text) }, text)));
    const bound = this.limits.bounds[name];
    if (bound) {
      const ys = [axis.y(bound.min ?? low), axis.y(bound.max ?? high)];
      group.append(s("rect", { class: "brush", x: x - 7, width: 14, y: Math.min(...ys), height: Math.max(3, Math.abs(ys[0] - ys[1])), rx: 2 }));
    }
    const field = s("rect", { class: "field", x: x - 16, width: 32, y: TOP, height: height - TOP - BOTTOM });
    field.addEventListener("pointerdown", (event) => this.#brush(event, axis));
    group.append(field);
    return group;
  }

  #brush(event, axis) {
    event.preventDefault();
    const top = () => this.plot.getBoundingClientRect().top;
    const start = event.clientY - top();
    const move = (moved) => {
      const end = moved.clientY - top();
      if (Math.abs(end - start) < 4) return;
      const [a, b] = [axis.value(start), axis.value(end)].sort((p, q) => p - q);
      const edge = (value, end_value) => (Math.abs(axis.y(value) - axis.y(end_value)) < 3 ? undefined : value);
      this.limits.set(axis.name, { min: edge(a, axis.low), max: edge(b, axis.high) });
    };
    const end = (ended) => {
      window.removeEventListener("pointermove", move);
      window.removeEventListener("pointerup", end);
      if (Math.abs(ended.clientY - top() - start) < 4) this.limits.set(axis.name, {});
    };
    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup", end);
  }

  /** Draw with other trials selected. */
  mark(chosen) {
    this.chosen = chosen;
    this.later();
  }
}
