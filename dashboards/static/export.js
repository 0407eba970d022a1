/** Ship a trial: for a target, as a job of the server, verified in the target's runtime. */
import { ask, href, studyPath } from "./api.js";
import { calm, fill, h, say, table } from "./dom.js";
import { ago, size } from "./format.js";

const OVER = new Set(["finished", "failed", "removed"]);

/** Fill the panel of a trial. */
export async function exportPanel(root, study, trial) {
  if (trial.state !== "complete") {
    fill(root, h("p", { class: "note" }, "Only a complete trial can be exported."));
    return;
  }
  let targets;
  try {
    targets = (await ask("/api/v1/targets")).targets.filter((target) => target.exports);
  } catch (problem) {
    fill(root, h("p", { class: "problem", role: "alert" }, problem.message), command(study, trial));
    return;
  }
  const select = h("select", { id: "export-target" }, targets.map((target) => h("option", { value: target.name, selected: target.name === study.spec.target.name }, target.name)));
  const about = h("p", { class: "note" });
  const describe = () => {
    const target = targets.find((each) => each.name === select.value);
    about.textContent = target ? `${target.summary ?? ""} Writes ${target.exports}.` : "";
  };
  select.addEventListener("change", describe);
  describe();
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const jobs = h("div", { "aria-live": "polite" });
  const start = h("button", { class: "primary" }, "Export");
  const form = h("form", { class: "stack", onsubmit: async (event) => {
    event.preventDefault();
    start.disabled = true;
    try {
      await ask(studyPath(study.study, "exports"), { method: "POST", body: { trial: trial.number, target: select.value } });
      problem.hidden = true;
      say("The export is queued.");
      await look();
    } catch (refused) {
      problem.hidden = false;
      fill(problem, refused.message);
    } finally {
      start.disabled = false;
    }
  } }, h("div", { class: "actions" }, h("label", { for: "export-target" }, "For"), select, start), about, problem);
  fill(root, form, jobs, command(study, trial));

  let looks = 0;
  let timer = null;
  async function look() {
    clearTimeout(timer);
    looks += 1;
    const mine = looks;
    const found = (await ask(studyPath(study.study, "exports"), { cache: "no-store" })).exports.filter((each) => each.trial === trial.number).reverse();
    await calm();
    if (mine !== looks) return; // a later look knows better
    fill(jobs, found.slice(0, 5).map(job));
    if (found.some((each) => !OVER.has(each.state))) again();
  }
  function again() {
    timer = setTimeout(() => look().catch(later), 1500);
  }
  /** A server that does not answer at the moment is asked again. */
  function later({ status }) {
    if (status === 0 || status >= 500) again();
  }
  look().catch(later);
}

function command(study, trial) {
  return h("details", {}, h("summary", {}, "On the command line"), h("pre", { tabindex: "0" }, `autoq export ${study.study} ${trial.number} --out ${study.study}-${trial.number}\nautoq verify ${study.study}-${trial.number}`));
}

function copyable(text) {
  const button = h("button", { type: "button", class: "quiet small", onclick: async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } }, "Copy");
  return h("div", {}, h("pre", { tabindex: "0" }, text), navigator.clipboard ? button : null);
}

/** What a verification found: a line a check, the promise beside what the runtime gave. */
function verified(found) {
  if (!found) return null;
  if (found.ok === null) return h("p", { class: "note" }, `Not verified: ${found.message}`);
  return [
    h("p", {}, h("span", { class: `state ${found.ok ? "complete" : "failed"}` }, found.ok ? "verified" : "differs"), " in its runtime, against what was measured"),
    found.checks.length ? table("Verification", ["check", "promised", "found", ""], found.checks.map((check) =>
      [check.name, h("span", { class: "wraps" }, check.promised), h("span", { class: "wraps" }, check.found), check.ok === null ? "not compared" : check.ok ? "✓" : "differs"])) : null,
  ];
}

function job(each) {
  const result = each.result ?? {};
  const bytes = result.bytes ?? result.manifest?.size_bytes;
  return h("section", { class: "pick" },
    h("h3", {}, h("span", {}, each.target, " ", h("span", { class: `state ${each.state === "finished" ? "complete" : each.state}` }, each.state)), h("span", { class: "note" }, ago(each.finished_at ?? each.created_at))),
    each.progress?.stage && !OVER.has(each.state) ? h("p", { class: "note" }, each.progress.stage) : null,
    each.message ? h("p", { class: each.state === "failed" ? "problem" : "note" }, each.message) : null,
    bytes ? h("p", { class: "note" }, size(bytes)) : null,
    verified(result.verify),
    (result.lines ?? []).map(({ title, text }) => [h("p", { class: "note" }, title), copyable(text)]),
    each.state === "finished" ? h("a", { class: "button small", href: href(`/api/v1/exports/${each.id}/download`), download: "" }, "Download") : null);
}
