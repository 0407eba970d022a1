/** Submit a study: a form for what most need, YAML for all there is; each follows the other. */
import { ask, href, studyPage } from "./api.js";
import { at, complain, debounced, fill, h } from "./dom.js";
import { objectiveName } from "./format.js";
import { yaml } from "./yaml.js";

const CHECK = "/api/v1/specs:check";
const BITS = [2, 3, 4, 5, 6, 8];
const START = {
  name: "my-study",
  model: { id: "demo:smollm2" },
  target: { name: "torch-cpu" },
  space: {},
  objectives: ["kl_nats_per_token", "size_bytes", "latency_decode_ms"],
  constraints: {},
  sampler: { name: "frontier" },
  budget: { trials: 48, report_points: 16 },
};

// One per form: pressing the button twice, or once more after a time-out, makes one study.
const key = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random().toString(36).slice(2)}`;
const form = at("new");
const fields = new Map(); // the spec's field -> where its problem is shown
let spec = structuredClone(START);
let written = "form"; // which side was typed in last
let edits = 0;
let covered = -1; // the edit that was sent to be checked last
let reading = false; // whether the form does not show yet what was typed as YAML
const waiting = []; // what was changed in the form meanwhile

const get = (path) => path.split(".").reduce((own, part) => own?.[part], spec);

function set(path, value) {
  edits += 1;
  if (reading) {
    waiting.push([path, value]);
    submit.disabled = true;
    return;
  }
  const parts = path.split(".");
  const last = parts.pop();
  const own = parts.reduce((each, part) => (each[part] ??= {}), spec);
  if (value === null || value === "" || (Array.isArray(value) && !value.length)) delete own[last];
  else own[last] = value;
  written = "form";
  text.value = `${yaml(spec)}\n`;
  check();
}

function field(path, label, control, hint = "") {
  const problem = h("p", { class: "problem", role: "alert", hidden: true, id: `problem-${path}` });
  control.id = `field-${path}`;
  control.setAttribute("aria-describedby", problem.id);
  fields.set(path, { control, problem });
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, hint ? h("p", { class: "note" }, hint) : null, problem);
}

function input(path, label, { number = false, hint = "", placeholder = "", list = null } = {}) {
  const control = h("input", { type: "text", inputmode: number ? "numeric" : null, value: get(path) ?? "", placeholder, spellcheck: "false", list,
    oninput: () => set(path, number && /^\d+$/.test(control.value.trim()) ? Number(control.value) : control.value.trim()) });
  controls.set(path, { show: () => { control.value = get(path) ?? ""; } });
  return field(path, label, control, hint);
}

function select(path, label, choices, hint = "") {
  const control = h("select", { onchange: () => set(path, control.value) }, choices.map(([value, text_]) => h("option", { value, selected: get(path) === value }, text_)));
  controls.set(path, { show: () => { control.value = get(path) ?? ""; } });
  return field(path, label, control, hint);
}

function checks(path, label, choices, hint = "") {
  const boxes = choices.map(([value, text_, title]) => {
    const box = h("input", { type: "checkbox", value, checked: (get(path) ?? []).map(String).includes(String(value)),
      onchange: () => set(path, boxes.filter((each) => each.checked).map((each) => (typeof value === "number" ? Number(each.value) : each.value))) });
    box.dataset.text = text_;
    box.title = title ?? "";
    return box;
  });
  controls.set(path, { show: () => boxes.forEach((box) => { box.checked = (get(path) ?? []).map(String).includes(box.value); }) });
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const group = h("div", { class: "checks", role: "group", "aria-label": label }, boxes.map((box) => h("label", { title: box.title }, box, box.dataset.text)));
  fields.set(path, { control: group, problem });
  return h("div", { class: "field" }, h("span", {}, label), group, hint ? h("p", { class: "note" }, hint) : null, problem);
}

const controls = new Map();
const text = h("textarea", { class: "code", id: "yaml", spellcheck: "false", autocapitalize: "off", "aria-label": "Spec as YAML", oninput: () => { written = "yaml"; reading = true; edits += 1; check(); } });
const verdict = h("div", { class: "verdict", role: "status" });
const submit = h("button", { class: "primary" }, "Start the study");
const deep = h("button", { type: "button", onclick: () => checkDeeply() }, "Check against the model");

function showProblem(message, name) {
  for (const { control, problem } of fields.values()) {
    problem.hidden = true;
    control.removeAttribute("aria-invalid");
  }
  text.removeAttribute("aria-invalid");
  if (!message) return;
  // `budget.trials` belongs to that field; `space.schemes.2` to `space.schemes`; `name` to itself.
  const parts = (name ?? "").split(".");
  while (parts.length && !fields.has(parts.join("."))) parts.pop();
  const found = fields.get(parts.join("."));
  if (found) {
    found.problem.hidden = false;
    fill(found.problem, message);
    found.control.setAttribute("aria-invalid", "true");
    fill(verdict, h("span", { class: "note" }, `There is a problem in ${parts.join(".")}.`));
  } else {
    text.setAttribute("aria-invalid", "true");
    fill(verdict, h("p", { class: "problem" }, message));
  }
}

let asked = null;
const body = () => (written === "yaml" ? { yaml: text.value } : { spec });

/** What the server says of the spec; null where it was typed in meanwhile, or asked again. */
async function ask_(deeply) {
  asked?.abort();
  asked = new AbortController();
  covered = edits;
  const found = await ask(CHECK, { method: "POST", body: { ...body(), deep: deeply }, signal: asked.signal });
  return covered === edits ? found : null;
}

/** Show in the form what was typed as YAML, then what was changed in the form meanwhile. */
function read(found) {
  if (written === "yaml" && found.spec) follow(found.spec);
  reading = false;
  if (!waiting.length) return;
  for (const [path, value] of waiting.splice(0)) set(path, value);
  for (const control of controls.values()) control.show();
  submit.disabled = false;
}

const check = debounced(async () => {
  if (covered === edits) return; // a deeper look was asked for meanwhile
  try {
    const found = await ask_(false);
    if (!found) return;
    showProblem(found.ok ? null : found.message, found.field);
    if (found.ok) fill(verdict, h("span", { class: "good" }, "✓ The spec is valid."));
    read(found);
  } catch (problem) {
    if (problem.name === "AbortError") return;
    showProblem(problem.message, problem.field);
    read({});
  }
}, 300);

/** Show in the form what the YAML says. */
function follow(read) {
  spec = { name: read.name, model: read.model, data: read.data, target: read.target, space: read.space, objectives: read.objectives, constraints: read.constraints, sampler: read.sampler, budget: read.budget, ...Object.fromEntries(Object.entries(read).filter(([name]) => name === "workers" || name === "tasks" || name === "recipes")) };
  spec = structuredClone(spec);
  for (const control of controls.values()) control.show();
}

async function checkDeeply() {
  deep.disabled = true;
  fill(verdict, h("span", { class: "note" }, "The server looks at the model and the target …"));
  try {
    const found = await ask_(true);
    if (!found) return;
    showProblem(found.ok ? null : found.message, found.field);
    const facts = found.facts ?? {};
    if (found.ok) fill(verdict, h("span", { class: "good" }, "✓ It can run."), h("span", { class: "note" }, Object.entries(facts).filter(([, value]) => typeof value !== "object").map(([name, value]) => `${name.replaceAll("_", " ")}: ${value}`).join(", ")));
    read(found);
  } catch (problem) {
    if (problem.name === "AbortError") return;
    showProblem(problem.message, problem.field);
    read({});
  } finally {
    deep.disabled = false;
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  submit.disabled = true;
  complain(null);
  fill(verdict, h("span", { class: "note" }, "The server checks it against the model and the target …"));
  try {
    const made = await ask("/api/v1/studies", { method: "POST", body: body(), headers: { "Idempotency-Key": key } });
    location.assign(studyPage(made.study));
  } catch (problem) {
    showProblem(problem.message, problem.field);
    submit.disabled = false;
  }
});

async function choices(noun) {
  try {
    return (await ask(`/api/v1/${noun}`))[noun];
  } catch (problem) {
    complain(problem);
    return [];
  }
}

async function start() {
  const [methods, targets, objectives, samplers] = await Promise.all(["methods", "targets", "objectives", "samplers"].map(choices));
  const known = (list) => list.map(({ name, summary }) => [name, name, summary]);
  fill(form,
    h("section", { class: "card" },
      h("fieldset", {}, h("legend", {}, "What"),
        h("div", { class: "two" }, input("name", "Name"), input("model.id", "Model", { hint: "A hub id, a folder, a GGUF file, or demo:smollm2" })),
        select("target.name", "Target: where it will run", targets.map((target) => [target.name, target.unavailable ? `${target.name} – not here: ${target.unavailable}`.slice(0, 90) : target.name]))),
      h("fieldset", {}, h("legend", {}, "Between what to choose, per layer"),
        checks("space.methods", "Methods", known(methods.filter(({ name }) => name !== "keep" && !/^kv\d+$/.test(name))) /* caches have no method */, "None chosen: what the target runs."),
        checks("space.bits", "Bits", BITS.map((bits) => [bits, String(bits)]), "None chosen: what the target runs.")),
      h("fieldset", {}, h("legend", {}, "What counts"),
        checks("objectives", "Objectives", objectives.map(({ name, summary }) => [name, objectiveName(name), `${name}: ${summary}`])),
        h("div", { class: "two" }, input("constraints.size_bytes.max", "Size, at most", { placeholder: "no limit", hint: "Such as 120MB" }))),
      h("fieldset", {}, h("legend", {}, "How long"),
        h("div", { class: "two" },
          input("budget.trials", "Trials", { number: true }), input("budget.wall_time", "Time, at most", { placeholder: "no limit", hint: "Such as 30m" }),
          input("budget.report_points", "Report points", { number: true, hint: "Measured again on other data" }),
          select("sampler.name", "Sampler", known(samplers))))),
    h("section", { class: "card" },
      h("div", { class: "card-head" }, h("h2", {}, "Spec"), h("span", { class: "note" }, "What is typed here shows in the form, and the other way round.")),
      text, verdict, h("div", { class: "actions" }, submit, deep),
      h("details", {}, h("summary", {}, "On the command line"), h("pre", { tabindex: "0" }, `autoq submit spec.yaml --server ${location.origin}${href("")}`))));
  for (const control of controls.values()) control.show();
  text.value = `${yaml(spec)}\n`;
  check();
}

start();
