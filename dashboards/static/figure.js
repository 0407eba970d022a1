/** One figure: fetched as data, drawn by Plotly, with its note, its table, and one line where it cannot be had. */
import { ask } from "./api.js";
import { debounced, fill, h, table } from "./dom.js";
import { readable } from "./format.js";
import { CONFIG, download, plotly, themed } from "./plot.js";

const SHOWN = 400; // rows of a table that are put on the page

/** The text of a cell, and of a file of comma-separated values. */
const cell = (value) => (value === null || value === undefined ? "" : typeof value === "number" ? String(Number(value.toPrecision(6))) : String(value));

/** Rows as comma-separated values. A text that a spreadsheet would take for a formula has a ' before it. */
export function csv(headers, rows) {
  const plain = (value) => (typeof value === "string" && /^[=+\-@\t\r]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : String(value ?? ""));
  const quoted = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  return [headers, ...rows].map((row) => row.map((value) => quoted(plain(value))).join(",")).join("\n") + "\n";
}

export class Figure {
  /**
   * @param {HTMLElement} root holds the picture, its note and its table
   * @param {{address: (options: Object) => string, name: string, label?: string, prepare?: (figure: any) => any,
   *   note?: (text: string) => string, drawn?: (plot: HTMLElement) => void, draw?: (plot: HTMLElement, figure: any) => void, empty?: Node[]}} options
   *   `note` may change its text, `prepare` may change data and layout before they are drawn; `draw` draws instead of Plotly
   */
  constructor(root, options) {
    this.root = root;
    this.options = options;
    this.plot = h("div", { class: "plot", tabindex: "0", role: "group", "aria-label": options.label ?? options.name });
    this.note = h("p", { class: "note" });
    this.rows = h("div", {});
    this.twin = h("details", { class: "twin", ontoggle: () => this.#showTable() }, h("summary", {}, "Show as table"), this.rows);
    this.problem = h("p", { class: "problem", role: "alert", hidden: true });
    this.foot = h("div", { class: "foot" });
    fill(root, this.plot, this.problem, this.note, this.foot, this.twin);
    root.setAttribute("aria-busy", "true");
    this.figure = null;
    document.addEventListener("theme", () => this.figure && this.redraw());
    // What is left out of a narrow picture comes back in a wide one.
    let width = root.clientWidth;
    const fit = debounced(() => {
      const now = root.clientWidth;
      if (this.figure && now && Math.abs(now - width) > 40) this.redraw();
      width = now || width;
    }, 250);
    addEventListener("resize", fit);
  }

  /** What stands at the right of "Show as table". */
  footer(nodes) {
    fill(this.foot, nodes);
  }

  /** Fetch the figure for these options and draw it; an older request that is still out is given up. */
  async load(options = {}) {
    this.asked?.abort();
    const asked = new AbortController();
    this.asked = asked;
    try {
      const found = await ask(this.options.address(options), { signal: asked.signal });
      if (this.asked !== asked) return;
      this.figure = found;
      this.problem.hidden = true;
      await this.redraw();
    } catch (problem) {
      if (problem.name === "AbortError") return;
      this.problem.hidden = false;
      fill(this.problem, problem.message);
      if (!this.figure) this.plot.classList.add("void");
    } finally {
      if (this.asked === asked) this.root.removeAttribute("aria-busy");
    }
  }

  /** There is nothing to draw, and why. */
  nothing(why) {
    this.root.removeAttribute("aria-busy");
    this.plot.classList.add("void");
    this.root.classList.add("bare");
    this.note.textContent = why;
  }

  /** Draw again what was fetched last: after what is being drawn, which would else be drawn over it. */
  redraw() {
    this.next ??= Promise.resolve(this.drawing).catch(() => {}).then(() => {
      this.next = null;
      this.drawing = this.#draw();
      return this.drawing;
    });
    return this.next;
  }

  async #draw() {
    const { figure } = this;
    fill(this.note, readable(this.options.note?.(figure.note ?? "") ?? figure.note ?? ""));
    this.note.hidden = !figure.note;
    const { data, layout } = this.options.prepare?.(structuredClone(figure.plotly)) ?? structuredClone(figure.plotly);
    this.plot.classList.toggle("void", data.length === 0);
    const bare = figure.plotly.data.length === 0 && !figure.table.rows.length;
    this.root.classList.toggle("bare", bare); // there is nothing to take away
    if (bare && data.length) this.note.hidden = true; // the picture says it
    if (this.options.draw) {
      this.options.draw(this.plot, { data, layout });
    } else if (data.length) {
      if (layout.height) this.plot.style.height = `${layout.height}px`;
      const library = await plotly();
      const shown = themed(layout);
      const lies = shown.coloraxis?.colorbar?.orientation;
      if (this.lies !== undefined && this.lies !== (lies ?? null)) {
        // Plotly would leave the labels of the scale that stood there before.
        await library.react(this.plot, data, { ...shown, coloraxis: { ...shown.coloraxis, showscale: false } }, CONFIG);
      }
      this.lies = lies ?? null;
      await library.react(this.plot, data, shown, CONFIG);
    }
    this.options.drawn?.(this.plot);
    if (this.twin.open) this.#showTable();
  }

  #showTable() {
    if (!this.twin.open || !this.figure) return;
    const { rows, units, total } = this.figure.table;
    const headers = this.figure.table.headers.map((title, i) => (units?.[i] ? `${title} (${units[i]})` : title));
    const right = new Set(headers.map((_, i) => i).filter((i) => rows.some((row) => typeof row[i] === "number")));
    const shown = rows.slice(0, SHOWN);
    fill(
      this.rows,
      table(this.figure.title, headers, shown.map((row) => row.map(cell)), { right }),
      h("p", { class: "note" },
        (total ?? rows.length) > shown.length ? `The first ${shown.length} of ${(total ?? rows.length).toLocaleString("en")} rows. ` : "",
        h("button", { type: "button", class: "link", onclick: () => this.save("csv") }, "Download CSV")),
    );
  }

  /** Save as `csv`, `json`, `svg` or `png`. */
  async save(kind) {
    const name = `${this.options.name}.${kind}`;
    const { table: own, ...rest } = this.figure;
    if (kind === "csv") download(name, csv(own.headers, own.rows), "text/csv");
    else if (kind === "json") download(name, JSON.stringify({ ...rest, table: own }, null, 1), "application/json");
    else {
      const library = await plotly();
      const { width, height } = this.plot.getBoundingClientRect();
      download(name, await library.toImage(this.plot, { format: kind, width: Math.round(width), height: Math.round(height), scale: kind === "png" ? 2 : 1 }));
    }
  }
}

/** A row of buttons that save a figure. */
export function saveButtons(figure, kinds = ["csv", "json", "svg", "png"]) {
  return kinds.map((kind) => h("button", { type: "button", class: "quiet small", title: `Download as ${kind.toUpperCase()}`, onclick: () => figure.save(kind) }, kind.toUpperCase()));
}
