/** One study: its frontier, what can be afforded, and tabs for all else. */
import { ask, studyPage, studyPath } from "./api.js";
import { at, calm, complain, fill, h, pageData, say } from "./dom.js";
import { counted, duration, objectiveName, withError } from "./format.js";
import { Frontier } from "./frontier.js";
import { Limits } from "./limits.js";
import { follow } from "./live.js";
import { holders, placed, standings, waits } from "./queue.js";
import { Points, trialName } from "./points.js";
import { typing } from "./shell.js";
import { studyActions } from "./study_actions.js";
import { studyTabs } from "./study_tabs.js";
import { makeTabs } from "./tabs.js";
import { setView, view } from "./view.js";

const { study } = pageData();
const name = study.study;
const OVER = new Set(["finished", "failed", "cancelled"]);

/** A trial's numbers, with errors and where they come from. */
function values(points, trial) {
  return h("dl", { class: "values" }, points.objectives.filter((objective) => trial.measured[objective.name]).map(({ name: own, unit }) => {
    const m = trial.measured[own];
    const how = m.kind === "predicted" ? "predicted" : m.kind === "measured" && m.part === "search" ? "search part" : "";
    return [h("dt", {}, objectiveName(own)), h("dd", {}, withError(m.value, m.stderr, unit), unit === "bytes" ? "" : ` ${unit}`, how ? h("span", { class: "how" }, how) : null)];
  }));
}

class Page {
  constructor(points, told) {
    this.points = points;
    this.told = told; // the trial that the headline is about
    this.chosen = view("pick").split(",").filter(Boolean).map(Number).filter((number) => points.trials.has(number));
    this.watchers = [];
    this.limits = new Limits(at("limits"), points, () => this.changed());
    this.frontier = new Frontier(at("frontier"), at("frontier-tools"), points, { select: (number, more) => this.select(number, more) });
    this.showHead();
    this.changed();
    this.frontier.show();
    this.tabs = makeTabs(studyTabs(this, study));
    this.#keys();
  }

  /** Be told when limits, the selection or trials change. */
  watch(watcher) {
    this.watchers.push(watcher);
  }

  /** The trial that pictures of one trial show: the selected one, else the best within the limits. */
  get shown() {
    const limited = Object.keys(this.limits.bounds).length > 0;
    return this.chosen.at(-1) ?? (limited ? null : this.told) ?? this.best?.number ?? null;
  }

  select(number, more = false) {
    if (more && !this.chosen.includes(number)) this.chosen = [...this.chosen.slice(-1), number];
    else if (this.chosen.length === 1 && this.chosen[0] === number) this.chosen = [];
    else this.chosen = [number];
    setView({ pick: this.chosen.join(",") });
    this.changed();
  }

  /** Put everything in line with limits, selection and trials. */
  changed() {
    const bounds = this.limits.bounds;
    const limited = Object.keys(bounds).length > 0;
    this.best = this.points.pick(bounds, this.limits.best);
    this.frontier.mark({ limits: bounds, chosen: this.chosen, best: limited ? (this.best?.number ?? null) : null });
    this.#showPick(limited);
    this.#showSelected();
    for (const watcher of this.watchers) watcher();
  }

  #showPick(limited) {
    const { best, points } = this;
    if (!points.frontier.length) {
      fill(at("pick"), h("p", { class: "note" }, OVER.has(points.state) ? "No feasible trial is complete." : "No trial is complete yet; the first ones are the uniform baselines."));
    } else if (!best) {
      const near = points.closest(this.limits.bounds);
      fill(at("pick"), h("h3", {}, "Nothing on the frontier fits"), h("p", { class: "note" }, `The closest is ${trialName(near)}:`), values(points, near), this.#open(near));
    } else if (!limited) {
      fill(at("pick"), h("p", { class: "note" }, "Set a limit: what fails it turns pale, and the best of the rest is named here."));
    } else {
      fill(at("pick"), h("h3", {}, h("span", {}, h("span", { class: "mark", "aria-hidden": "true" }), `Best: ${trialName(best)}`)), values(points, best), this.#open(best));
    }
  }

  #open(trial) {
    const other = this.chosen.find((number) => number !== trial.number);
    return h("div", { class: "actions" },
      h("a", { class: "button small", href: studyPage(name, trial.number) }, `Open ${trialName(trial)}`),
      this.chosen.includes(trial.number) ? null : h("button", { type: "button", class: "small", onclick: () => this.select(trial.number) }, "Select"),
      other === undefined ? null : h("a", { class: "button small", href: `${studyPage(name)}/diff?a=${other}&b=${trial.number}` }, `Compare with ${other}`));
  }

  #showSelected() {
    const trials = this.chosen.map((number) => this.points.trials.get(number)).filter(Boolean);
    fill(at("selected"), trials.map((trial) => [
      h("h3", {}, h("span", {}, h("span", { class: "mark chosen", "aria-hidden": "true" }), `Selected: ${trialName(trial)}`),
        h("button", { type: "button", class: "link", "aria-label": `Clear the selection of ${trialName(trial)}`, onclick: () => this.unselect(trial.number) }, "clear")),
      values(this.points, trial),
      this.#open(trial),
    ]), trials.length === 1 ? h("p", { class: "note" }, "Shift-click another point to compare the two.") : null);
  }

  unselect(number = null) {
    this.chosen = number === null ? [] : this.chosen.filter((each) => each !== number);
    setView({ pick: this.chosen.join(",") });
    this.changed();
  }

  showHead() {
    const { points } = this;
    const counts = points.counts;
    const ended = (counts.complete ?? 0) + (counts.stopped ?? 0) + (counts.failed ?? 0);
    const spec = study.spec;
    fill(at("state"), h("span", { class: `state ${points.state}` }, points.state));
    const began = study.started_at && Date.parse(study.started_at);
    const until = study.finished_at && OVER.has(points.state) ? Date.parse(study.finished_at) : Date.now();
    fill(at("facts"),
      h("span", {}, spec.model.id), h("span", {}, spec.target.name),
      h("span", {}, ended < spec.budget.trials && !OVER.has(points.state) ? `${ended} of ${counted(spec.budget.trials, "trial")}` : counted(ended, "trial")),
      points.frontier.length ? h("span", {}, `${points.frontier.length} on the frontier`) : null,
      counts.failed ? h("span", {}, `${counts.failed} failed`) : null,
      began && until - began >= 1000 && points.state !== "queued" ? h("span", { title: OVER.has(points.state) ? "from its start to its end" : "since it started" }, duration((until - began) / 1000)) : null,
      study.owner ? h("span", {}, study.owner) : null);
    this.showWaiting();
    if (study.message && points.state === "failed") complain(study.message);
    fill(at("actions"), studyActions(name, points.state, { refresh: () => this.refresh(), state: () => this.points.state }));
  }

  /** Why it waits, as long as it does; asked again by itself, for what moves a line is no event of this study. */
  async showWaiting() {
    clearTimeout(this.waiting);
    const queued = this.points.state === "queued";
    if (queued) {
      const standing = (await standings()).get(name);
      const known = holders(standing);
      if (this.points.state !== "queued") return;
      const text = waits(standing);
      if (at("queue").dataset.text !== text) {
        at("queue").dataset.text = text;
        fill(at("queue"), h("strong", {}, placed(standing) ? `Queued, ${placed(standing)}. ` : "Queued. "), text, known.length ? [" ", h("span", { class: "holders" }, "Now running: ", known, ".")] : null);
      }
      this.waiting = setTimeout(() => this.showWaiting(), 3000);
    }
    at("queue").hidden = !queued;
  }

  /** Fetch what has changed, and show it; whether there was anything. One after the other: none shows what is older. */
  refresh() {
    this.refreshing = Promise.resolve(this.refreshing).catch(() => {}).then(() => this.#refresh());
    return this.refreshing;
  }

  async #refresh() {
    const before = this.points.frontier.length;
    const state = this.points.state;
    const known = this.points.objectives.length;
    const changes = this.points.changes;
    const found = await ask(`${studyPath(name, "points")}?since=${changes}`);
    await calm();
    this.points.merge(found);
    if (this.points.changes === changes && this.points.state === state) return false;
    if (this.points.objectives.length !== known) this.limits.build();
    this.limits.refresh();
    this.showHead();
    await this.frontier.show();
    this.changed();
    document.dispatchEvent(new Event("trials"));
    const counts = this.points.counts;
    const grown = this.points.frontier.length - before;
    say(`${counted(counts.complete ?? 0, "trial")} complete, ${this.points.frontier.length} on the frontier${grown > 0 ? `, ${grown} new` : ""}${this.points.state !== state ? `; the study is ${this.points.state}` : ""}`);
    return true;
  }

  #keys() {
    document.addEventListener("keydown", (event) => {
      if (typing(event) || document.querySelector("dialog[open]")) return;
      if (event.key === "o" && this.shown !== null) location.assign(studyPage(name, this.shown));
      else if (event.key === "b" && this.best) this.select(this.best.number);
      else if (event.key === "r") this.frontier.reset();
      else if (event.key === "Escape") this.unselect();
    });
  }
}

/** The sentence about the study, with a link to the trial that it is about. */
function showHeadline({ headline: text, trial }) {
  const [begin, ...rest] = (text ?? "").split(new RegExp(`(?<=[Tt]rial ${trial})\\b`));
  const cut = begin.search(/[Tt]rial \d+$/);
  if (trial === null || cut < 0) fill(at("headline"), text ?? "");
  else fill(at("headline"), begin.slice(0, cut), h("a", { href: studyPage(name, trial) }, begin.slice(cut)), rest.join(""));
}

/** A sentence about the study; everything else stands without it. */
const overview = () => ask(studyPath(name, "overview")).catch(() => ({ headline: null, trial: null }));

async function start() {
  let page;
  try {
    const [points, told] = await Promise.all([ask(studyPath(name, "points")), overview()]);
    page = new Page(new Points(points), told.trial);
    showHeadline(told);
  } catch (problem) {
    complain(problem);
    throw problem;
  }
  follow(studyPath(name, "events"), ["change", "gone"], async () => {
    try {
      if (!(await page.refresh())) return;
      complain(null);
      const told = await overview();
      page.told = told.trial;
      showHeadline(told);
    } catch (problem) {
      complain(problem);
    }
  }, () => !OVER.has(page.points.state));
}

start();
