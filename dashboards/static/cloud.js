/**
 * Thousands of points under a plot: a canvas beneath Plotly's own marks, for WebGL would need code that the page's
 * security policy forbids to be made. Repainted while the plot moves; 20,000 points take some milliseconds.
 */
import { h } from "./dom.js";

const unpacked = new Map(); // the last ones: while a limit is dragged, the same picture is made anew for each frame
const KEPT = 32;

/** Plotly's arrays as numbers: lists as they are, packed ones unpacked. Not to be changed by who gets them. */
export function numbers(values) {
  if (!values?.bdata) return values ?? [];
  const known = unpacked.get(values.bdata);
  if (known?.dtype === values.dtype) return known.array;
  const array = unpack(values);
  if (unpacked.size >= KEPT) unpacked.delete(unpacked.keys().next().value);
  unpacked.set(values.bdata, { dtype: values.dtype, array });
  return array;
}

function unpack(values) {
  const bytes = Uint8Array.from(atob(values.bdata), (character) => character.charCodeAt(0));
  const kinds = { f8: Float64Array, f4: Float32Array, i4: Int32Array, i2: Int16Array, i1: Int8Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array };
  return new kinds[values.dtype](bytes.buffer);
}

export class Cloud {
  /** @param {HTMLElement} plot @param {(number: number) => string} describe lines for a point's tip */
  constructor(plot, describe) {
    this.plot = plot;
    this.describe = describe;
    this.canvas = h("canvas", { class: "cloud", "aria-hidden": "true" });
    this.tip = h("div", { class: "tip", hidden: true });
    this.points = null;
    plot.addEventListener("pointermove", (event) => this.#hover(event));
    plot.addEventListener("pointerleave", () => this.#hide());
    plot.addEventListener("click", (event) => {
      const found = this.near(event);
      if (found !== null) this.onclick?.(found, event);
    });
  }

  /** @param {{x: ArrayLike<number>, y: ArrayLike<number>, number: ArrayLike<number>}|null} points */
  show(points, colours) {
    this.points = points;
    this.colours = colours;
    this.canvas.remove();
    this.#hide();
    if (!points) return;
    this.plot.prepend(this.canvas);
    this.plot.append(this.tip);
    this.paint();
  }

  #scales() {
    const layout = this.plot._fullLayout;
    if (!layout?.xaxis?.range) return null;
    const { xaxis, yaxis } = layout;
    const to = (axis, length) => {
      const [low, high] = axis.range;
      const log = axis.type === "log";
      return (value) => (((log ? Math.log10(value) : value) - low) / (high - low)) * length;
    };
    return { xaxis, yaxis, x: to(xaxis, xaxis._length), y: to(yaxis, yaxis._length) };
  }

  /** Paint again: after a zoom, a filter, a change of colours. */
  paint() {
    const scales = this.points && this.#scales();
    if (!scales) return;
    const { clientWidth: width, clientHeight: height } = this.plot;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const { xaxis, yaxis } = scales;
    context.beginPath();
    context.rect(xaxis._offset, yaxis._offset, xaxis._length, yaxis._length);
    context.clip();
    const { x, y, number } = this.points;
    const side = number.length > 5000 ? 2.4 : 3.4;
    this.at = new Float32Array(2 * number.length);
    for (const wanted of [false, true]) {
      context.globalAlpha = Math.min(0.8, Math.max(0.28, 2500 / number.length));
      context.fillStyle = wanted ? this.colours.on : this.colours.off;
      for (let i = 0; i < number.length; i += 1) {
        if (this.kept?.has(number[i]) === !wanted || (!this.kept && !wanted)) continue;
        const left = xaxis._offset + scales.x(x[i]);
        const top = yaxis._offset + yaxis._length - scales.y(y[i]);
        this.at[2 * i] = left;
        this.at[2 * i + 1] = top;
        context.fillRect(left - side / 2, top - side / 2, side, side);
      }
    }
  }

  /** The number of the point under the pointer, if any. */
  near(event) {
    if (!this.points || !this.at) return null;
    const box = this.plot.getBoundingClientRect();
    const [left, top] = [event.clientX - box.left, event.clientY - box.top];
    let [best, least] = [null, 36];
    for (let i = 0; i < this.points.number.length; i += 1) {
      const apart = (this.at[2 * i] - left) ** 2 + (this.at[2 * i + 1] - top) ** 2;
      if (apart < least) [best, least] = [i, apart];
    }
    this.place = best;
    return best === null ? null : this.points.number[best];
  }

  #hover(event) {
    if (!this.points || event.buttons) return;
    const number = this.near(event);
    if (number === null || this.plot.querySelector(".hoverlayer .hovertext")) {
      this.#hide();
      return;
    }
    this.tip.hidden = false;
    this.tip.replaceChildren(...this.describe(number).map((line) => h("div", {}, line)));
    const left = this.at[2 * this.place];
    this.tip.style.left = `${left > this.plot.clientWidth - 220 ? left - this.tip.offsetWidth - 10 : left + 10}px`;
    this.tip.style.top = `${this.at[2 * this.place + 1] + 8}px`;
  }

  #hide() {
    this.tip.hidden = true;
  }
}
