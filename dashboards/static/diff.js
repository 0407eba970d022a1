/** Two trials side by side: their layers, and what each difference costs. */
import { ask, studyPage, studyPath } from "./api.js";
import { at, complain, fill, h, pageData, table } from "./dom.js";
import { counted, number, objectiveName, withError } from "./format.js";
import { figureCard } from "./cards.js";
import { alike, union } from "./maps.js";
import { view } from "./view.js";

const { study } = pageData();
const name = study.study;
const form = at("which");
form.a.value = view("a");
form.b.value = view("b");

const signed = (value, unit) => `${value > 0 ? "+" : value < 0 ? "−" : "±"}${number(Math.abs(value), unit)}`;

/** What a side is called: as it was asked for, with its number. */
const called = (number_) => [view("a"), view("b")].find((asked) => named.get(asked) === number_ && asked !== String(number_)) ?? `trial ${number_}`;
const named = new Map();

function objectives(found) {
  const rows = Object.entries(found.measurements).map(([objective, { a, b }]) => {
    const alike = a.kind === b.kind && a.part === b.part && !("rival" in a.detail) && !("rival" in b.detail);
    return [objectiveName(objective), withError(a.value, a.stderr, a.unit), withError(b.value, b.stderr, b.unit), alike ? signed(b.value - a.value, a.unit) : "not comparable", a.unit === "bytes" ? "" : a.unit];
  });
  return rows.length ? table("What the difference costs", ["objective", called(found.a), called(found.b), "change", "unit"], rows, { right: new Set([1, 2, 3]) })
    : h("p", { class: "note" }, "They have no measurement in common.");
}

function layers(found) {
  const entries = Object.entries(found.layers);
  if (!entries.length) return h("p", { class: "note" }, "They have the same assignment.");
  const sized = entries.every(([, each]) => each.bytes_a !== undefined && each.bytes_b !== undefined);
  return [
    h("p", { class: "note" }, `${counted(entries.length, "layer")} differ${entries.length === 1 ? "s" : ""}.`),
    table("Layers that differ", ["layer", called(found.a), called(found.b), ...(sized ? ["size, change"] : [])],
      entries.sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true })).map(([layer, each]) => [layer, h("code", {}, each.a ?? "–"), h("code", {}, each.b ?? "–"), ...(sized ? [signed(each.bytes_b - each.bytes_a, "bytes")] : [])]), { right: new Set([3]) }),
  ];
}

async function show() {
  const [a, b] = [view("a"), view("b")];
  if (!a || !b) {
    fill(at("diff"), h("div", { class: "empty" }, h("p", {}, "Name two trials, by number or by a baseline's name."), h("pre", { tabindex: "0" }, `autoq diff ${name} ${a || "uniform-int4"} ${b || "31"}`)));
    (a ? form.b : form.a).focus();
    return;
  }
  try {
    const found = await ask(`${studyPath(name, "diff")}?${new URLSearchParams({ a, b })}`);
    named.set(a, found.a).set(b, found.b);
    const link = (n) => h("a", { href: studyPage(name, n) }, called(n));
    fill(at("facts"), h("span", {}, link(found.a), " against ", link(found.b)));
    let schemes = null;
    const sides = [found.a, found.b].map((n) => figureCard(called(n).replace(/^trial/, "Trial"), name, "layer_map", {
      options: () => ({ trial: n, by: "scheme" }),
      prepare: (plotly) => (schemes ? alike(plotly, schemes) : plotly),
    }));
    const map = figureCard("Where they differ", name, "diff_map", { wide: true, options: () => ({ a: found.a, b: found.b }) });
    fill(at("diff"),
      h("div", { class: "twins" }, h("section", { class: "card wide" }, h("h2", {}, "What the difference costs"), objectives(found))),
      h("div", { class: "twins" }, sides.map((side) => side.card)),
      h("div", { class: "twins" }, map.card),
      h("section", { class: "card" }, h("h2", {}, "Layers that differ"), layers(found)));
    map.load();
    await Promise.all(sides.map((side) => side.load()));
    if (sides.every((side) => side.figure.figure)) {
      schemes = union(sides.map((side) => side.figure.figure));
      for (const side of sides) side.figure.redraw();
    }
  } catch (problem) {
    complain(problem);
  }
}

show();
