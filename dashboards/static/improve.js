/** Make a trial better: its layers quantized once more in sequence, or trained; what comes of it is another trial. */
import { ask, studyPage, studyPath } from "./api.js";
import { calm, fill, h, say } from "./dom.js";
import { counted, objectiveName, withError } from "./format.js";
import { follow } from "./live.js";
import { holders, standings, waits } from "./queue.js";

const GOING = new Set(["queued", "running"]);
const MOST_STEPS = 1_000_000;
const MADE = { sequential: "quantized in sequence", recover: "trained" };
const NOW = { sequential: "Its layers are quantized, one block after the other.", recover: "Its layers are trained." };

/** How a trial was made of another one, in words; null where it was not. */
export const made = (trial) => (trial.parent === null ? null : (MADE[trial.origin] ?? trial.origin));

/** The value of the search part, of a trial's JSON. */
const searched = (trial, name) => trial.search[name] ?? (trial.measurements[name]?.part === "search" ? trial.measurements[name] : undefined);

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

/** A trial's first quality beside its parent's, of the part that both were measured on. */
function beside(study, parent, child) {
  const objective = study.objectives.find(({ name }) => searched(parent, name)?.kind === "measured");
  if (!objective || child.state !== "complete") return null;
  const { name, unit, direction } = objective;
  const reported = [parent, child].every((trial) => trial.measurements[name]?.part === "report");
  const [old, now] = [parent, child].map((trial) => (reported ? trial.measurements[name] : searched(trial, name)));
  if (!now) return null;
  const change = old.value ? (100 * (now.value - old.value)) / Math.abs(old.value) : 0;
  const better = direction === "minimize" ? now.value < old.value : now.value > old.value;
  return [
    h("dl", { class: "values" },
      h("dt", {}, objectiveName(name)), h("dd", {}, h("strong", {}, withError(now.value, now.stderr, unit)), ` ${unit}`),
      h("dt", {}, "this trial's"), h("dd", {}, withError(old.value, old.stderr, unit), ` ${unit}`),
      h("dt", {}, "change"), h("dd", {}, `${change > 0 ? "+" : "−"}${Math.abs(change).toFixed(Math.abs(change) < 10 ? 1 : 0)} %`, h("span", { class: "how" }, reported ? "report part" : "search part"))),
    better ? null : h("p", { class: "note" }, "It is no better than this trial."),
  ];
}

/**
 * Fill the panel of a trial.
 * @param {HTMLElement} root
 * @param {any} study
 * @param {any} trial with `improvable`: kind -> why it cannot be, null where it can; and `job`, what the study is at
 * @param {(children: any[]) => void} told of what was made of the trial, when that changes
 */
export function improvePanel(root, study, trial, told) {
  const name = study.study;
  let state = study.state;
  let message = null;
  let job = trial.job?.trial === trial.number && GOING.has(state) ? trial.job.kind : null;
  let children = [];
  let since = study.queued_at; // of the job
  let seen = -1; // the study's count of changes
  let again = null;

  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const standing = h("div", { "aria-live": "polite" });
  const list = h("div", {});
  const steps = h("input", { type: "number", id: "improve-steps", min: 1, max: MOST_STEPS, step: 1, value: "200", required: true, inputmode: "numeric", "aria-describedby": "improve-train" });
  const buttons = {
    sequential: h("button", { class: "primary", "aria-describedby": "improve-sequence" }, "Quantize in sequence"),
    recover: h("button", { class: "primary", "aria-describedby": "improve-train" }, "Train"),
  };
  const reasons = { sequential: h("p", { class: "note", hidden: true }), recover: h("p", { class: "note", hidden: true }) };

  const act = (kind, body) => async (event) => {
    event.preventDefault();
    buttons[kind].disabled = true;
    try {
      const found = await ask(studyPath(name, "trials", String(trial.number), kind), { method: "POST", body: body?.() });
      problem.hidden = true;
      [job, state, message, since, seen] = [kind, found.state, null, found.queued_at, found.changes];
      say(`Queued: trial ${trial.number} is to be ${MADE[kind]}.`);
    } catch (refused) {
      problem.hidden = false;
      fill(problem, refused.message);
    }
    show();
    look().catch(later);
  };

  root.classList.add("improve");
  fill(root,
    h("form", { class: "stack", onsubmit: act("sequential") },
      h("p", { class: "note", id: "improve-sequence" }, "Every quantized layer is made once more, for what it reads in the quantized model, and makes up for what the layers before it changed. Schemes, bytes and kernels stay the same. It takes about as long as quantizing the model twice."),
      h("div", { class: "actions" }, buttons.sequential), reasons.sequential),
    h("form", { class: "stack pick", onsubmit: act("recover", () => ({ steps: Number(steps.value) })) },
      h("p", { class: "note", id: "improve-train" }, "Integer and codebook layers are trained to answer as the unquantized model does, on text that is in no part of the study. Schemes, bytes and kernels stay the same. More steps take longer, by so much."),
      h("div", { class: "actions" }, h("label", { for: "improve-steps" }, "Steps"), steps, buttons.recover), reasons.recover),
    problem, standing, list,
    h("details", {}, h("summary", {}, "On the command line"), h("pre", { tabindex: "0" }, `autoq sequential ${name} ${trial.number}\nautoq recover ${name} ${trial.number} --steps 200`)));

  /** Why the study takes no trials now; null where it does. */
  function busy() {
    if (state === "finished") return null;
    if (GOING.has(state)) return job ? null : `The study is ${state}; trials are made of others once it is finished.`;
    return `The study is ${state}; trials are made of others once it is finished. Resume it first.`;
  }

  function show() {
    const why = busy();
    const done = children.find((child) => child.origin === "sequential" && child.state === "complete");
    for (const kind of Object.keys(buttons)) {
      const never = kind === "sequential" && done ? ["It was quantized in sequence before: it is ", h("a", { href: studyPage(name, done.number) }, `trial ${done.number}`), "."] : trial.improvable[kind];
      buttons[kind].disabled = Boolean(never ?? why ?? job);
      reasons[kind].hidden = !(never ?? why);
      fill(reasons[kind], typeof never === "string" ? sentence(never) : (never ?? why ?? ""));
    }
    steps.disabled = buttons.recover.disabled;
    fill(list, children.length ? h("h3", {}, "Made of this trial") : null, children.map(entry));
  }

  function entry(child) {
    const how = [made(child), child.derivation?.steps ? counted(child.derivation.steps, "step") : null].filter(Boolean).join(", ");
    return h("section", { class: "pick" },
      h("h3", {}, h("span", {}, h("a", { href: studyPage(name, child.number) }, `Trial ${child.number}`), " ", h("span", { class: `state ${child.state}` }, child.state)), h("span", { class: "note" }, how)),
      beside(study, trial, child),
      child.error ? h("p", { class: "problem" }, child.error.message) : null);
  }

  /** What the job has made so far. */
  const fresh = () => children.find((child) => child.origin === job && Date.parse(child.created_at) >= Date.parse(since));

  /** What the job is at; nothing where there is none. */
  async function progress() {
    clearTimeout(again);
    if (!job) return;
    if (state === "queued") {
      again = setTimeout(progress, 3000); // what moves a line is no event of this study
      const found = (await standings()).get(name);
      if (state !== "queued") return;
      const known = holders(found);
      tell("queued", waits(found), known.length ? [" Now running: ", known, "."] : null);
    } else if (state === "running") {
      const measured = fresh();
      if (!measured) tell("running", NOW[job]);
      else tell("running", `Trial ${measured.number} is measured${measured.state === "complete" ? " on the report part" : ""}.`);
    } else {
      const found = fresh();
      if (message?.startsWith(`${job}: `) || state !== "finished") {
        fill(standing, h("p", { class: "problem", role: "alert" }, message?.replace(`${job}: `, "") ?? `The study is ${state}.`));
      } else if (found) {
        fill(standing, h("p", {}, "Done: it is ", h("a", { href: studyPage(name, found.number) }, `trial ${found.number}`), "."));
        say(`Trial ${trial.number} was ${MADE[job]}: it is trial ${found.number}.`);
      } else {
        fill(standing, h("p", { class: "note" }, "Nothing new came of it: it was cancelled, or the very same was made before."));
      }
      standing.dataset.text = "";
      job = null;
      show();
    }
  }

  function tell(kind, text, more = null) {
    if (standing.dataset.text === text) return;
    standing.dataset.text = text;
    fill(standing, h("p", {}, h("span", { class: `state ${kind}` }, kind), " ", text, more));
  }

  async function look() {
    // In this order: what a study that is over made is among its trials by then.
    const now = await ask(studyPath(name), { cache: "no-store" });
    const found = await ask(`${studyPath(name, "trials")}?parent=${trial.number}&limit=1000`, { cache: "no-store" });
    await calm();
    if (now.changes < seen) return; // another look was faster
    if (found.trials.length !== children.length) told(found.trials);
    children = found.trials;
    [state, message, since, seen] = [now.state, now.message, now.queued_at, now.changes];
    show();
    await progress();
  }

  /** A server that does not answer at the moment is asked again. */
  function later({ status }) {
    if (status === 0 || status >= 500) setTimeout(() => look().catch(later), 1500);
  }

  show();
  look().catch(later);
  follow(studyPath(name, "events"), ["change", "gone"], () => look().catch(later), () => Boolean(job) || GOING.has(state));
}
