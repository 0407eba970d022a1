/** Several studies on one frontier. */
import { ask, studyPath } from "./api.js";
import { at, complain, fill, h } from "./dom.js";
import { Figure, saveButtons } from "./figure.js";
import { axisTitle, counted, objectiveName } from "./format.js";
import { setView, view } from "./view.js";

let studies = [];
let chosen = view("studies").split(",").filter(Boolean);

const figure = new Figure(at("frontiers"), {
  name: "frontiers",
  label: "Frontiers of the chosen studies. The same numbers are in the table below.",
  address: (options) => `${studyPath(chosen[0], "figures", "compare")}?${new URLSearchParams(options)}`,
  prepare: ({ data, layout }) => {
    const objectives = studies.find((study) => study.study === chosen[0])?.objectives ?? [];
    for (const axis of ["x", "y"]) {
      const objective = objectives.find((own) => own.name === layout.meta?.[axis]);
      if (objective && layout[`${axis}axis`]) layout[`${axis}axis`].title = { text: axisTitle(objective) };
    }
    for (const trace of data) if (trace.type === "scattergl") trace.type = "scatter";
    return { data, layout: { ...layout, uirevision: `${view("x")}|${view("y")}` } };
  },
});

function tools() {
  const common = studies.filter((study) => chosen.includes(study.study)).map((study) => study.objectives.map((o) => o.name));
  const names = (common[0] ?? []).filter((name) => common.every((own) => own.includes(name)));
  const chooser = (axis) => h("label", {}, axis, h("select", { onchange: (event) => { setView({ [axis]: event.target.value }); show(); } },
    [["", "auto"], ...names.map((name) => [name, objectiveName(name)])].map(([value, text]) => h("option", { value, selected: view(axis) === value }, text))));
  fill(at("tools"), names.length ? [chooser("x"), chooser("y")] : []);
  figure.footer(saveButtons(figure));
}

async function show() {
  tools();
  if (!chosen.length) {
    fill(at("facts"), "Choose studies of one model to see their frontiers together.");
    figure.nothing(studies.length ? "Choose studies from the list: their frontiers are drawn over each other, with a table of what each offers." : "There is no study yet.");
    return;
  }
  fill(at("facts"), h("span", {}, counted(chosen.length, "study").replace("studys", "studies")));
  figure.plot.classList.remove("void");
  const options = { studies: chosen.slice(1).join(",") };
  for (const axis of ["x", "y"]) if (view(axis)) options[axis] = view(axis);
  await figure.load(options);
}

function choices() {
  const model = studies.find((study) => study.study === chosen[0])?.model;
  const order = [...studies].sort((a, b) => (b.model === model) - (a.model === model) || b.id - a.id);
  fill(at("choose"), order.length ? order.map((study) => h("label", {},
    h("input", { type: "checkbox", value: study.study, checked: chosen.includes(study.study), onchange: (event) => {
      chosen = event.target.checked ? [...chosen, study.study] : chosen.filter((name) => name !== study.study);
      setView({ studies: chosen.join(",") });
      show();
    } }), h("span", {}, study.study), h("span", { class: "note" }, `${study.model} · ${study.target} · ${study.frontier} on the frontier`))) : h("p", { class: "note" }, "No study yet."));
}

async function start() {
  try {
    studies = (await ask("/api/v1/studies?limit=200")).studies;
    chosen = chosen.filter((name) => studies.some((study) => study.study === name || String(study.id) === name));
    choices();
    await show();
  } catch (problem) {
    complain(problem);
  }
}

start();
