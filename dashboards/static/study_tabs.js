/** The tabs below a frontier: layers, trade-offs, health, what if, trials, spec. */
import { ask, studyPage } from "./api.js";
import { figureCard } from "./cards.js";
import { debounced, fill, h, table } from "./dom.js";
import { counted, duration, number, objectiveName, withError } from "./format.js";
import { short } from "./queue.js";
import { Parallel } from "./parallel.js";
import { fits, trialName } from "./points.js";
import { setView, view } from "./view.js";
import { whatIf } from "./whatif.js";
import { yaml } from "./yaml.js";

function layers(page, study) {
  return (panel) => {
    const name = study.study;
    const heading = h("h2", {}, "Layers of the picked trial");
    const map = figureCard("Layers", name, "layer_map", { wide: true, options: () => ({ trial: page.shown, ...(view("by") ? { by: view("by") } : {}) }),
      tools: [h("label", {}, "coloured by ", h("select", { onchange: (event) => { setView({ by: event.target.value }); map.load(); } },
        [["", "bits"], ["scheme", "scheme"]].map(([value, text]) => h("option", { value, selected: view("by") === value }, text))))] });
    const sensitivity = figureCard("Sensitivity, predicted", name, "sensitivity_map", { wide: true });
    const pays = figureCard("Which layers pay", name, "which_layers_pay", { wide: true, options: () => ({ trial: page.shown }) });
    map.card.querySelector("h2").replaceWith(heading);
    fill(panel, map.card, sensitivity.card, pays.card);
    let shown = null;
    const look = debounced(() => {
      if (page.shown === null) for (const each of [map, pays]) each.figure.nothing("No trial is complete yet.");
      if (page.shown === null || page.shown === shown) return;
      shown = page.shown;
      const trial = page.points.trials.get(shown); // it may be newer than what the page has
      heading.textContent = `Layers of ${trial ? trialName(trial) : `trial ${shown}`}`;
      map.load();
      pays.load();
    }, 120);
    look();
    sensitivity.load();
    page.watch(look);
  };
}

function tradeoffs(page, study) {
  return (panel) => {
    const parallel = figureCard("All objectives at once", study.study, "parallel", { wide: true, tall: true, kinds: ["csv", "json"],
      tools: [h("span", { class: "note" }, "Better is up. Brush an axis to limit it; click an axis to lift the limit.")],
      note: (text) => text.replace(" An arrow says which way is better.", ""), // as the notebook's figure has it
      draw: (plot) => {
        parallel.lines ??= new Parallel(plot, page.points, page.limits, (number, more) => page.select(number, more));
        parallel.lines.mark(page.chosen);
      } });
    fill(panel, parallel.card);
    parallel.load();
    page.watch(() => parallel.lines?.mark(page.chosen));
    document.addEventListener("trials", () => parallel.load());
  };
}

function health(page, study) {
  return (panel) => {
    const name = study.study;
    const stats = h("dl", { class: "stats wide" });
    const workers = h("div", {});
    const charts = [
      figureCard("Hypervolume", name, "hypervolume"),
      figureCard("Predicted against measured", name, "predicted_measured"),
      figureCard("How trials ended", name, "progress"),
      figureCard("Against uniform", name, "savings"),
    ];
    const look = () => {
      showStats(stats, page);
      showWorkers(workers, study, page);
      for (const chart of charts) chart.load();
    };
    fill(panel, stats, charts.map((chart) => chart.card), h("section", { class: "card wide" }, h("h2", {}, "Workers"), workers));
    look();
    document.addEventListener("trials", debounced(look, 1500));
  };
}

function showStats(root, page) {
  const trials = [...page.points.trials.values()];
  const count = (state) => trials.filter((trial) => trial.state === state).length;
  const timed = trials.filter((trial) => trial.seconds !== null);
  const busy = timed.reduce((sum, trial) => sum + trial.seconds, 0);
  const ended = count("complete") + count("stopped") + count("failed");
  const share = (part) => (ended ? `${((100 * part) / ended).toFixed(0)} %` : "–");
  const stat = (label, value, more = "") => h("div", {}, h("dt", {}, label), h("dd", {}, value, more ? h("small", {}, ` ${more}`) : null));
  fill(root,
    stat("complete", String(count("complete"))),
    stat("stopped early", share(count("stopped")), counted(count("stopped"), "trial")),
    stat("failed", String(count("failed"))),
    stat("cache hits", String(count("duplicate")), "not measured again"),
    stat("trials a minute", busy ? ((60 * timed.length) / busy).toFixed(1) : "–", "of evaluation"),
    stat("cost so far", busy ? duration(busy) : "–", "of evaluation"));
}

async function showWorkers(root, study, page) {
  const name = study.study;
  try {
    const found = await ask("/api/v1/workers");
    const own = (found.workers ?? []).filter((worker) => worker.study === name);
    fill(root, own.length ? null : h("p", { class: "note" }, page.points.state === "queued" ? "It has no workers while it waits." : "No worker of this study is up."));
    const { executor, count } = study.spec.workers ?? {};
    const missing = page.points.state === "running" && executor === "ray" ? short(count, own.length) : null;
    if (missing) fill(root, h("p", { class: "queue" }, missing));
    if (own.length) root.append(table("Workers", ["worker", "node", "device", "memory", "state", "trial"], own.map((worker) =>
      [worker.id, worker.node, worker.device, worker.memory_bytes ? number(worker.memory_bytes, "bytes") : "–", worker.state, worker.trial ?? "–"])));
  } catch (problem) {
    fill(root, h("p", { class: "note" }, problem.message));
  }
}

const PAGE = 200;

function trials(page, study) {
  return (panel) => {
    const card = h("section", { class: "card wide" });
    const body = h("div", {});
    const state = h("select", { onchange: () => { setView({ state: state.value }); look(); } },
      [["", "all states"], ["frontier", "on the frontier"], ["complete", "complete"], ["stopped", "stopped"], ["failed", "failed"], ["running", "running"], ["duplicate", "duplicate"]]
        .map(([value, text]) => h("option", { value, selected: view("state") === value }, text)));
    const keeping = h("input", { type: "checkbox", checked: view("fit") === "1", onchange: () => { setView({ fit: keeping.checked ? "1" : null }); look(); } });
    let shown = PAGE;
    let by = view("sort");
    const look = () => {
      const { points } = page;
      const bounds = page.limits.bounds;
      let rows = [...points.trials.values()];
      if (state.value === "frontier") rows = rows.filter((trial) => trial.on_frontier);
      else if (state.value) rows = rows.filter((trial) => trial.state === state.value);
      if (keeping.checked) rows = rows.filter((trial) => fits(trial, bounds));
      const down = by.startsWith("-");
      const key = by.replace(/^-/, "");
      const value = (trial) => (key === "" || key === "number" ? trial.number : (trial.measured[key]?.value ?? Infinity));
      rows.sort((a, b) => (down ? value(b) - value(a) : value(a) - value(b)) || a.number - b.number);
      const names = points.objectives;
      const order = (name) => h("button", { type: "button", class: "link", onclick: () => { by = by === name ? `-${name}` : name; setView({ sort: by }); look(); } },
        name === "number" ? "trial" : `${objectiveName(name)}${names.find((o) => o.name === name).unit === "bytes" ? "" : `, ${names.find((o) => o.name === name).unit}`}`, key === name || (name === "number" && !key) ? (down ? " ↓" : " ↑") : "");
      const made = table(`Trials of ${study.study}`, [order("number"), "what", ...names.map((o) => order(o.name)), "state", ""],
        rows.slice(0, shown).map((trial) => [
          h("a", { href: studyPage(study.study, trial.number) }, String(trial.number)),
          trial.baseline ?? trial.origin,
          ...names.map(({ name, unit }) => {
            const m = trial.measured[name];
            return m ? [withError(m.value, m.stderr, unit), m.kind === "predicted" ? h("span", { class: "how" }, " predicted") : null] : "";
          }),
          trial.duplicate_of === null ? [trial.state, trial.on_frontier ? " · frontier" : "", trial.feasible === false ? " · infeasible" : ""] : `same as ${trial.duplicate_of}`,
          h("button", { type: "button", class: "link", "aria-pressed": String(page.chosen.includes(trial.number)), "aria-label": `Select ${trialName(trial)}`, onclick: (event) => page.select(trial.number, event.shiftKey) }, page.chosen.includes(trial.number) ? "selected" : "select"),
        ]), { right: new Set(names.map((_, i) => i + 2)) });
      for (const [i, row] of [...made.querySelectorAll("tbody tr")].entries()) {
        row.classList.toggle("on", page.chosen.includes(rows[i].number));
        row.classList.toggle("off", Object.keys(bounds).length > 0 && !fits(rows[i], bounds));
      }
      fill(body, rows.length ? made : h("p", { class: "note" }, "No trial is like that."),
        rows.length > shown ? h("p", { class: "note" }, `${shown} of ${counted(rows.length, "trial")}. `, h("button", { type: "button", class: "link", onclick: () => { shown += 5 * PAGE; look(); } }, "Show more")) : null);
    };
    fill(card, h("div", { class: "card-head" }, h("h2", {}, "Trials"), h("div", { class: "tools" }, h("label", {}, "show ", state), h("label", {}, keeping, "within the limits"))), body);
    fill(panel, card);
    look();
    page.watch(look);
    document.addEventListener("trials", look);
  };
}

function spec(study) {
  return (panel) => {
    fill(panel, h("section", { class: "card wide" }, h("h2", {}, "Spec"), h("pre", { tabindex: "0" }, yaml(study.spec)),
      h("p", { class: "note" }, "The same study again, on the command line: ", h("code", {}, "autoq search spec.yaml"))));
  };
}

/** The tabs of a study's page. */
export function studyTabs(page, study) {
  return [
    { name: "layers", label: "Layers", build: layers(page, study) },
    { name: "tradeoffs", label: "Trade-offs", build: tradeoffs(page, study) },
    { name: "trials", label: "Trials", build: trials(page, study) },
    { name: "health", label: "Search health", build: health(page, study) },
    { name: "whatif", label: "What if", build: (panel) => whatIf(panel, page, study) },
    { name: "spec", label: "Spec", build: spec(study) },
  ];
}
