/** Limits on objectives: a slider and a field each. They grey out what fails, and name the best of what is left. */
import { fill, h } from "./dom.js";
import { objectiveName, parseQuantity, quantity, size } from "./format.js";
import { setView, views } from "./view.js";

const STEPS = 200;

/** A limit as it stands in an address and in a field. */
const written = (value, unit) => (unit === "bytes" ? size(value).replace(" ", "") : String(Number(value.toPrecision(4))));

/** The distinct values to choose a limit from, in order: a slider goes through points, not through empty space. */
function ladder(values) {
  const sorted = [...new Set(values)].sort((a, b) => a - b);
  if (sorted.length <= STEPS) return sorted;
  return Array.from({ length: STEPS }, (_, i) => sorted[Math.round((i * (sorted.length - 1)) / (STEPS - 1))]);
}

export class Limits {
  /**
   * @param {HTMLElement} form
   * @param {import("./points.js").Points} points
   * @param {() => void} changed
   */
  constructor(form, points, changed) {
    this.points = points;
    this.changed = changed;
    this.form = form;
    /** @type {Object<string, {min?: number, max?: number}>} */
    this.bounds = {};
    this.best = views("best")[""] ?? "";
    for (const side of ["max", "min"]) {
      for (const [name, text] of Object.entries(views(`${side}.`))) {
        const objective = points.objective(name);
        const value = objective && parseQuantity(text, objective.unit);
        if (value !== null && value !== undefined) (this.bounds[name] ??= {})[side] = value;
      }
    }
    form.addEventListener("submit", (event) => event.preventDefault());
    this.rows = new Map();
    this.build();
  }

  /** Make the rows: once, and where an objective has come. */
  build() {
    const own = this.points.own;
    this.rows.clear();
    fill(
      this.form,
      own.map((objective) => this.#row(objective)),
      this.suggestions = h("div", { class: "chips" }),
      h("div", { class: "row" },
        h("label", {}, "Best by ", h("select", { id: "best-by", onchange: (event) => this.setBest(event.target.value) },
          own.map(({ name }, i) => h("option", { value: i === 0 ? "" : name, selected: this.best === name }, objectiveName(name))))),
        h("button", { type: "button", class: "link", onclick: () => this.clear() }, "Clear limits")),
    );
    this.refresh();
  }

  #row(objective) {
    const { name, unit, direction } = objective;
    const side = direction === "minimize" ? "max" : "min";
    const id = `limit-${name}`;
    const field = h("input", { type: "text", id, inputmode: unit === "bytes" ? "text" : "decimal", placeholder: "no limit", spellcheck: "false",
      "aria-describedby": `${id}-side`, onchange: (event) => this.#typed(objective, side, event.target) });
    const slider = h("input", { type: "range", min: 0, step: 1, "aria-label": `${objectiveName(name)}, ${side === "max" ? "at most" : "at least"}`,
      oninput: (event) => this.#slid(objective, side, event.target) });
    const problem = h("p", { class: "problem", hidden: true, role: "alert" });
    const sideText = h("span", { class: "side", id: `${id}-side` });
    this.rows.set(name, { field, slider, problem, side, sideText, objective });
    return h("div", { class: "limit" }, h("label", { for: id }, objectiveName(name)),
      h("span", { class: "of" }, sideText, field, unit === "bytes" ? null : h("span", { class: "side" }, unit)), slider, problem);
  }

  /** Put rows in line with trials and bounds. */
  refresh() {
    this.#suggest();
    const complete = this.points.complete.filter((trial) => trial.on_frontier || trial.baseline !== null);
    for (const [name, row] of this.rows) {
      const values = complete.filter((trial) => trial.measured[name]).map((trial) => trial.measured[name].value);
      row.ladder = ladder(values);
      const { min, max } = this.bounds[name] ?? {};
      const bound = row.side === "max" ? max : min;
      const other = row.side === "max" ? min : max;
      row.slider.disabled = row.ladder.length < 2;
      row.slider.max = Math.max(1, row.ladder.length);
      // One step beyond the last value is no limit; limits get tighter to the left for "at most", to the right else.
      const place = bound === undefined ? (row.side === "max" ? row.slider.max : 0)
        : row.side === "max" ? row.ladder.filter((value) => value <= bound).length - 1 : row.ladder.filter((value) => value < bound).length + 1;
      row.slider.value = place;
      const unit = row.objective.unit;
      row.slider.setAttribute("aria-valuetext", bound === undefined ? "no limit" : quantity(bound, unit));
      if (document.activeElement !== row.field) row.field.value = bound === undefined ? "" : written(bound, unit);
      const signs = row.side === "max" ? ["≤", "≥"] : ["≥", "≤"];
      row.sideText.textContent = other === undefined ? signs[0] : `${signs[1]} ${quantity(other, unit)}, ${signs[0]}`;
    }
  }

  /** Baselines whose size is a budget that people have: one press sets it. */
  #suggest() {
    const size = this.points.own.find((objective) => objective.unit === "bytes" && objective.direction === "minimize");
    const uniform = size ? this.points.complete.filter((trial) => trial.baseline !== null && trial.measured[size.name]) : [];
    const largest = Math.max(...uniform.map((trial) => trial.measured[size.name].value));
    const offered = new Map();
    for (const trial of uniform) {
      const value = trial.measured[size.name].value;
      if (value < largest && !offered.has(value)) offered.set(value, trial.baseline);
    }
    fill(this.suggestions, offered.size ? h("span", {}, "No larger than") : null, [...offered].sort((a, b) => a[0] - b[0]).slice(0, 4).map(([value, name]) =>
      h("button", { type: "button", class: "small", "aria-pressed": String(this.bounds[size.name]?.max === value), onclick: () => this.set(size.name, { ...this.bounds[size.name], max: this.bounds[size.name]?.max === value ? undefined : value }) }, name)));
  }

  #slid(objective, side, slider) {
    const { ladder: values } = this.rows.get(objective.name);
    const place = Number(slider.value);
    let value;
    if (side === "max") value = place >= values.length ? undefined : values[Math.max(0, place)];
    else value = place <= 0 ? undefined : values[place - 1];
    this.set(objective.name, { ...this.bounds[objective.name], [side]: value });
  }

  #typed(objective, side, field) {
    const row = this.rows.get(objective.name);
    const text = field.value.trim();
    const value = text ? parseQuantity(text, objective.unit) : undefined;
    const wrong = value === null;
    field.setAttribute("aria-invalid", String(wrong));
    row.problem.hidden = !wrong;
    row.problem.textContent = wrong ? `${objective.name} must be a number${objective.unit === "bytes" ? ", such as 90MB" : ` in ${objective.unit}`} (got ${text.slice(0, 40)})` : "";
    if (!wrong) {
      field.blur();
      this.set(objective.name, { ...this.bounds[objective.name], [side]: value });
    }
  }

  /** Bound one objective; what is undefined is open. */
  set(name, bound) {
    const open = bound?.min === undefined && bound?.max === undefined;
    if (open) delete this.bounds[name];
    else this.bounds[name] = bound;
    const unit = this.points.objective(name).unit;
    const text = (value) => (value === undefined ? null : unit === "bytes" ? String(Math.round(value)) : String(Number(value.toPrecision(8))));
    setView({ [`max.${name}`]: text(bound?.max), [`min.${name}`]: text(bound?.min) });
    this.refresh();
    this.changed();
  }

  setBest(name) {
    this.best = name;
    setView({ best: name });
    this.changed();
  }

  /** No limits. */
  clear() {
    for (const name of Object.keys(this.bounds)) this.set(name, {});
    this.refresh();
    this.changed();
  }
}
