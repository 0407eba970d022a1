/** All studies, as they stand: filtered, sorted and searched here, followed by events. */
import { ask, href, studyPage, studyPath } from "./api.js";
import { at, calm, complain, debounced, fill, h, say } from "./dom.js";
import { ago, counted } from "./format.js";
import { follow } from "./live.js";
import { placed, standings, waits } from "./queue.js";
import { setView, view } from "./view.js";

const STATES = ["running", "queued", "finished", "interrupted", "cancelled", "failed", "created"];
const SVG = "http://www.w3.org/2000/svg";

let studies = [];
let total = 0;
const overviews = new Map(); // name -> what the server said of it, with the count of changes that it said it at
const rows = new Map();
let line = new Map(); // name -> where it stands in the queue

const ended = ({ trials }) => trials.complete + trials.stopped + trials.failed;
const share = (study) => {
  const budget = overviews.get(study.study)?.budget ?? study.budget;
  return budget ? Math.min(1, ended(study) / budget) : 0;
};

async function everything() {
  const found = [];
  let cursor = null;
  do {
    const page = await ask(`/api/v1/studies?limit=200${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`);
    found.push(...page.studies);
    cursor = page.next ?? null;
    total = page.total ?? found.length;
  } while (cursor && found.length < 2000);
  studies = found;
}

function spark(path) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("class", "spark");
  picture.setAttribute("viewBox", "0 0 128 40");
  picture.setAttribute("aria-hidden", "true");
  if (path) {
    for (const [name, d] of [["area", `${path}V40H1Z`], ["line", path]]) {
      const line = document.createElementNS(SVG, "path");
      line.setAttribute("class", name);
      line.setAttribute("d", d);
      picture.append(line);
    }
  }
  return picture;
}

/** Workers that are up, and of how many where a cluster has no room for the others. */
function at_work(study, known) {
  if (study.state !== "running") return "";
  if (known?.workers > study.workers && known.workers > 1) return ` · ${study.workers} of ${counted(known.workers, "worker")}, no room for more yet`;
  return study.workers ? ` · ${counted(study.workers, "worker")}` : "";
}

function row(study) {
  const { trials } = study;
  const known = overviews.get(study.study);
  const budget = known?.budget;
  const done = h("i", { class: study.state === "finished" ? "done" : "" });
  done.style.width = `${100 * (study.state === "finished" ? 1 : share(study))}%`;
  const objectives = study.objectives.map((objective) => objective.name);
  // A study that waits may have a headline of its first trials; that it waits, and for what, is the news.
  const said = study.state === "queued" ? waits(line.get(study.study)) : known?.headline ?? (study.state === "failed" ? study.message : trials.complete ? "" : "No trial is complete yet.");
  return h("article", { class: "study", dataset: { study: study.study } },
    h("div", {},
      h("h2", {}, h("a", { href: studyPage(study.study) }, study.study), h("span", { class: `state ${study.state}` }, study.state), study.state === "queued" && placed(line.get(study.study)) ? h("span", { class: "tag" }, placed(line.get(study.study))) : null),
      h("p", { class: "note" }, h("span", {}, study.model), h("span", {}, study.target), study.owner ? h("span", {}, study.owner) : null, h("span", {}, ago(study.finished_at ?? study.started_at ?? study.created_at)))),
    h("div", { class: "progress" },
      h("span", {}, budget && ended(study) < budget && study.state !== "finished" ? `${ended(study)} of ${counted(budget, "trial")}` : counted(ended(study), "trial"), trials.failed ? `, ${trials.failed} failed` : "", trials.running ? `, ${trials.running} at work` : ""),
      h("div", { class: "meter" }, done),
      h("span", {}, study.frontier ? `${study.frontier} on the frontier` : "", at_work(study, known))),
    h("p", { class: "said", title: objectives.join(", ") }, said ?? ""),
    spark(known?.spark));
}

function kept() {
  const query = at("query").value.trim().toLowerCase();
  const state = at("state").value;
  const words = query.split(/\s+/).filter(Boolean);
  const found = studies.filter((study) => (!state || study.state === state)
    && words.every((word) => [study.study, study.model, study.target, study.owner ?? ""].some((text) => text.toLowerCase().includes(word))));
  const by = {
    newest: (a, b) => Date.parse(b.created_at) - Date.parse(a.created_at),
    name: (a, b) => a.study.localeCompare(b.study, "en", { numeric: true }),
    state: (a, b) => STATES.indexOf(a.state) - STATES.indexOf(b.state),
    progress: (a, b) => share(b) - share(a),
  }[at("sort").value];
  return found.sort((a, b) => by(a, b) || b.id - a.id);
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    enquire(entry.target.dataset.study);
  }
}, { rootMargin: "200px" });

async function enquire(name) {
  try {
    overviews.set(name, await ask(studyPath(name, "overview")));
  } catch {
    return; // the row stands without it
  }
  await calm();
  const study = studies.find((each) => each.study === name);
  const old = rows.get(name);
  if (!study || !old?.isConnected) return;
  const focused = old.contains(document.activeElement);
  const made = row(study);
  old.replaceWith(made);
  rows.set(name, made);
  if (focused) made.querySelector("a").focus();
}

function show() {
  const focused = document.activeElement?.closest?.(".study")?.dataset.study;
  const list = kept();
  const states = [...new Set(studies.map((study) => study.state))];
  const running = studies.filter((study) => study.state === "running").length;
  fill(at("summary"), studies.length ? [h("span", {}, list.length === studies.length ? counted(Math.max(total, studies.length), "study").replace("studys", "studies") : `${list.length} of ${studies.length} studies`), running ? h("span", {}, `${running} running`) : null] : []);
  const chosen = view("state");
  fill(at("state"), h("option", { value: "" }, "all"), STATES.filter((state) => states.includes(state) || state === chosen).map((state) => h("option", { value: state, selected: state === chosen }, state)));
  rows.clear();
  if (!studies.length) {
    fill(at("studies"), h("div", { class: "empty" }, h("h2", {}, "No study yet"), h("p", {}, "Submit one here, or start one on the command line; it appears by itself."),
      h("pre", { tabindex: "0" }, "autoq search demo --trials 48"), h("a", { class: "button primary", href: href("/new") }, "New study")));
    return;
  }
  fill(at("studies"), list.length ? list.map((study) => {
    const made = row(study);
    rows.set(study.study, made);
    const known = overviews.get(study.study);
    if (!known || known.stamp !== stamp(study)) {
      if (known) known.stamp = stamp(study);
      seen.observe(made);
    }
    return made;
  }) : h("div", { class: "empty" }, h("p", {}, "No study is like that."), h("button", { type: "button", onclick: () => { at("query").value = ""; setView({ q: null, state: null }); show(); } }, "Show all")));
  if (focused) rows.get(focused)?.querySelector("a").focus();
}

const stamp = (study) => [study.state, ...Object.values(study.trials), study.frontier].join(" ");

async function look() {
  try {
    const before = new Map(studies.map((study) => [study.study, study.state]));
    await everything();
    line = studies.some((study) => study.state === "queued") ? await standings() : new Map();
    await calm();
    complain(null);
    show();
    const ends = studies.filter((study) => before.has(study.study) && before.get(study.study) !== study.state);
    if (ends.length) say(ends.map((study) => `${study.study} is ${study.state}`).join(", "));
  } catch (problem) {
    complain(problem);
  }
}

at("query").value ||= view("q"); // it may have been typed in already
at("sort").value = view("sort", "newest");
if (!at("sort").value) at("sort").value = "newest";
at("state").append(h("option", { value: view("state"), selected: true }, view("state") || "all"));
at("query").addEventListener("input", debounced(() => { setView({ q: at("query").value }); show(); }, 100));
at("state").addEventListener("change", () => { setView({ state: at("state").value }); show(); });
at("sort").addEventListener("change", () => { setView({ sort: at("sort").value === "newest" ? null : at("sort").value }); show(); });
at("filter").addEventListener("submit", (event) => event.preventDefault());
look();
follow("/api/v1/events", ["studies"], look);
// What others do moves a line, and is no event of those that wait.
setInterval(async () => {
  if (document.hidden || !studies.some((study) => study.state === "queued")) return;
  const before = JSON.stringify([...line]);
  line = await standings();
  if (JSON.stringify([...line]) === before) return;
  await calm();
  show();
}, 3000);
