/** One trial: what was measured and how, what it is made of, what people noted, what can be made of it, and how to ship it. */
import { ask, studyPage, studyPath } from "./api.js";
import { at, complain, fill, h, pageData, table } from "./dom.js";
import { exportPanel } from "./export.js";
import { counted, duration, objectiveName, provenance, withError } from "./format.js";
import { improvePanel, made } from "./improve.js";
import { download } from "./plot.js";
import { remarksForm } from "./remarks.js";
import { typing } from "./shell.js";
import { figureCard } from "./cards.js";

const { study, trial } = pageData();
const name = study.study;

function head() {
  fill(at("state"), h("span", { class: `state ${trial.state}` }, trial.state));
  const link = (number, text) => h("a", { href: studyPage(name, number) }, text);
  fill(at("facts"),
    h("span", {}, trial.baseline ? `baseline ${trial.baseline}` : trial.parent !== null ? [made(trial), ", of ", link(trial.parent, `trial ${trial.parent}`)] : { sampler: "proposed by the sampler", seed: "a seed", refine: "measured on request" }[trial.origin] ?? trial.origin),
    trial.on_frontier ? h("span", {}, "on the frontier") : trial.state === "complete" ? h("span", {}, trial.feasible === false ? "infeasible" : "dominated") : null,
    trial.duplicate_of !== null ? h("span", {}, "the same assignment as ", link(trial.duplicate_of, `trial ${trial.duplicate_of}`)) : null,
    trial.derived.length ? h("span", {}, "made into ", trial.derived.map((number, i) => [i ? ", " : "", link(number, `trial ${number}`)])) : null,
    trial.seconds !== null ? h("span", {}, duration(trial.seconds), trial.worker ? ` on ${trial.worker}` : "") : null,
    trial.attempt > 1 ? h("span", {}, `attempt ${trial.attempt}`) : null);
  fill(at("actions"),
    trial.number > 0 ? h("a", { class: "button", href: studyPage(name, trial.number - 1), "aria-keyshortcuts": "[" }, "‹ before") : null,
    h("a", { class: "button", href: studyPage(name, trial.number + 1), "aria-keyshortcuts": "]" }, "after ›"),
    h("a", { class: "button", href: `${studyPage(name)}/diff?a=${trial.number}` }, "Compare with …"),
    h("a", { class: "button", href: `${studyPage(name)}?pick=${trial.number}` }, "Show on the frontier"));
}

/** Details that differ by objective: kernels, threads, spread. */
function details(detail) {
  const text = (value) => (value === null ? "–" : typeof value === "number" ? String(Number(value.toPrecision(5))) : Array.isArray(value) ? value.map(text).join(", ") : typeof value === "object" ? Object.entries(value).map(([key, each]) => `${key}: ${text(each)}`).join(", ") : String(value));
  const entries = Object.entries(detail).filter(([, value]) => value !== null && !(typeof value === "object" && Object.keys(value).length === 0));
  if (!entries.length) return "";
  return h("details", {}, h("summary", {}, counted(entries.length, "detail")), h("dl", { class: "values wraps" }, entries.map(([key, value]) => [h("dt", {}, key.replaceAll("_", " ")), h("dd", { class: "wraps" }, text(value))])));
}

function measurements() {
  const rows = [];
  const row = (objective, m) => rows.push([
    objectiveName(objective),
    h("strong", {}, withError(m.value, m.stderr, m.unit)),
    m.unit === "bytes" ? "" : m.unit,
    h("span", { class: m.kind === "predicted" ? "tag" : "how" }, provenance(m)),
    m.n > 1 ? counted(m.n, m.unit === "ms" ? "run" : "sample") : "",
    details(m.detail),
  ]);
  for (const objective of study.objectives) if (trial.measurements[objective.name]) row(objective.name, trial.measurements[objective.name]);
  for (const [objective, m] of Object.entries(trial.measurements)) if (!study.objectives.some((own) => own.name === objective)) row(objective, m);
  for (const [objective, m] of Object.entries(trial.search)) row(objective, m);
  if (!rows.length) {
    const why = { running: "It is being measured now.", failed: "It failed before anything was measured.", duplicate: `Trial ${trial.duplicate_of} has the same assignment and its measurements.` }[trial.state];
    fill(at("measurements"), h("p", { class: "note" }, why ?? "Nothing was measured."));
    return;
  }
  const made = table("Measurements", ["objective", "value", "unit", "how", "from", ""], rows, { right: new Set([1]) });
  made.classList.add("plain");
  const devices = [...new Set(Object.values(trial.measurements).map((m) => m.device).filter(Boolean))];
  const broken = Object.entries(trial.violations).filter(([, excess]) => excess > 0);
  fill(at("measurements"), made,
    trial.state === "stopped" ? h("p", { class: "note" }, "Stopped early: another trial was known to be better before all tokens were evaluated. These values are of the tokens that were.") : null,
    broken.length ? h("p", { class: "problem" }, `Breaks ${broken.map(([limit, excess]) => `${limit} by ${Number(excess.toPrecision(3))}`).join(", ")}.`) : null,
    devices.map((device) => h("p", { class: "note" }, device)),
    Object.keys(trial.sampler).length ? h("p", { class: "note" }, Object.entries(trial.sampler).filter(([, value]) => typeof value === "number").map(([key, value]) => `${key.replace("frontier:", "sampler, ")}: ${Number(value.toPrecision(4))}`).join("; ")) : null);
}

function assignment() {
  const entries = Object.entries(trial.assignment).sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
  const counts = new Map();
  for (const [, scheme] of entries) counts.set(scheme.split("#")[0], (counts.get(scheme.split("#")[0]) ?? 0) + 1);
  const summary = [...counts].sort((a, b) => b[1] - a[1]).map(([scheme, count]) => h("span", { class: "tag" }, `${count} × ${scheme}`));
  const find = h("input", { type: "search", placeholder: "Layer or scheme", "aria-label": "Find a layer or scheme", oninput: () => show() });
  const body = h("div", {});
  const show = () => {
    const text = find.value.trim().toLowerCase();
    const rows = entries.filter(([layer, scheme]) => `${layer} ${scheme}`.toLowerCase().includes(text));
    fill(body, table("Assignment", ["layer", "scheme"], rows.map(([layer, scheme]) => [layer, h("code", {}, scheme.length > 60 ? `${scheme.slice(0, 60)}…` : scheme)])));
  };
  const yaml = entries.map(([layer, scheme]) => `${layer}: ${/[#:]/.test(scheme) ? JSON.stringify(scheme) : scheme}`).join("\n") + "\n";
  const file = `${name}-${trial.number}`;
  fill(at("assignment"),
    h("p", { class: "checks" }, summary),
    h("p", { class: "note" }, `${counted(entries.length, "layer")}, hash `, h("code", { title: trial.hash }, trial.hash.slice(0, 12))),
    h("div", { class: "bar" }, h("div", { class: "find" }, find),
      h("button", { type: "button", onclick: () => download(`${file}.json`, JSON.stringify(trial.assignment, null, 1), "application/json") }, "JSON"),
      h("button", { type: "button", onclick: () => download(`${file}.yaml`, yaml, "application/yaml") }, "YAML")),
    body);
  show();
}

function failure() {
  if (!trial.error) return;
  at("error").hidden = false;
  fill(at("error-body"), h("p", { class: "problem" }, `${trial.error.type}: ${trial.error.message}`),
    trial.error.traceback ? h("details", { open: true }, h("summary", {}, "Traceback"), h("pre", { tabindex: "0" }, trial.error.traceback)) : null);
}

head();
measurements();
failure();
assignment();
remarksForm(at("remarks"), name, trial.number);
improvePanel(at("improve"), study, trial, (children) => {
  trial.derived = children.map((child) => child.number);
  head();
});
exportPanel(at("export"), study, trial);
const map = figureCard("Layers", name, "layer_map", { options: () => ({ trial: trial.number, by: "scheme" }) });
at("layers").replaceWith(map.card.querySelector(".figure"));
map.load();

document.addEventListener("keydown", (event) => {
  if (typing(event) || document.querySelector("dialog[open]")) return;
  if (event.key === "[" && trial.number > 0) location.assign(studyPage(name, trial.number - 1));
  else if (event.key === "]") location.assign(studyPage(name, trial.number + 1));
  else if (event.key === "u") location.assign(studyPage(name));
});
if (trial.state === "running") {
  setInterval(async () => {
    try {
      if ((await ask(studyPath(name, "trials", String(trial.number)))).state !== "running") location.reload();
    } catch (problem) {
      complain(problem);
    }
  }, 4000);
}
