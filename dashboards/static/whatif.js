/** What if: a budget typed in, what the study's model offers for it, and a button that has it measured. */
import { ask, studyPage, studyPath } from "./api.js";
import { debounced, fill, h, say } from "./dom.js";
import { objectiveName, parseQuantity, quantity } from "./format.js";

/** Fill a panel. */
export function whatIf(panel, page, study) {
  const name = study.study;
  const own = page.points.own;
  const answer = h("div", { "aria-live": "polite" });
  const fields = own.map(({ name: objective, unit, direction }) => {
    const side = direction === "minimize" ? "max" : "min";
    const input = h("input", { type: "text", id: `offer-${objective}`, placeholder: "no limit", spellcheck: "false", oninput: () => look() });
    return { objective, unit, side, input, node: h("div", { class: "field" }, h("label", { for: input.id }, `${objectiveName(objective)}, ${side === "max" ? "at most" : "at least"}${unit === "bytes" ? "" : ` (${unit})`}`), input) };
  });
  const best = h("select", { id: "offer-best", onchange: () => look() }, own.map(({ name: objective }) => h("option", { value: objective }, objectiveName(objective))));

  function asked() {
    const limits = { max: {}, min: {} };
    for (const { objective, unit, side, input } of fields) {
      const text = input.value.trim();
      if (!text) continue;
      const value = parseQuantity(text, unit);
      input.setAttribute("aria-invalid", String(value === null));
      if (value === null) throw new Error(`${objective} must be a number${unit === "bytes" ? ", such as 90MB" : ` in ${unit}`} (got ${text.slice(0, 40)})`);
      limits[side][objective] = value;
    }
    return { ...limits, best: best.value };
  }

  const measure = (wanted) => async (event) => {
    const button = event.currentTarget;
    button.disabled = true;
    try {
      await ask(studyPath(name, "refine"), { method: "POST", body: { ...wanted, n: 1 } });
      latest += 1; // what is still asked is no news any more
      fill(answer, h("p", {}, "Queued: it is measured as a new trial of this study, and appears on the frontier when it is done."));
      say("Queued to be measured.");
      page.refresh();
    } catch (problem) {
      answer.append(h("p", { class: "problem", role: "alert" }, problem.message));
      button.disabled = false;
    }
  };

  let latest = 0;
  const look = debounced(async () => {
    latest += 1;
    const mine = latest;
    try {
      const wanted = asked();
      if (!Object.keys(wanted.max).length && !Object.keys(wanted.min).length) {
        fill(answer, h("p", { class: "note" }, "Type a budget. The model behind the search answers with the best assignment that it knows of, and how sure it is."));
        return;
      }
      fill(answer, h("p", { class: "note" }, "Asking the study's model …"));
      const query = new URLSearchParams({ best: wanted.best });
      for (const side of ["max", "min"]) for (const [objective, value] of Object.entries(wanted[side])) query.append(side, `${objective}=${value}`);
      const found = await ask(`${studyPath(name, "offer")}?${query}`);
      if (mine === latest) fill(answer, offer(found, measure(wanted)));
    } catch (problem) {
      if (mine === latest) fill(answer, h("p", { class: "problem", role: "alert" }, problem.message));
    }
  }, 350);

  function offer(found, onmeasure) {
    return [
      h("dl", { class: "values" }, own.filter(({ name: objective }) => found.predicted[objective]).map(({ name: objective, unit }) => {
        const { value, low, high, kind } = found.predicted[objective];
        const interval = low < high ? `95 %: ${quantity(low, unit)} to ${quantity(high, unit)}` : kind === "computed" ? "exact" : "";
        return [h("dt", {}, objectiveName(objective)), h("dd", {}, quantity(value, unit), h("span", { class: "how" }, interval ? `${kind === "computed" ? "" : `${kind}, `}${interval}` : kind))];
      })),
      found.trial !== null
        ? h("p", {}, "This is what was measured as ", h("a", { href: studyPage(name, found.trial) }, `trial ${found.trial}`), "; the model knows of nothing better.")
        : h("p", { class: "actions" }, h("button", { type: "button", class: "primary", onclick: onmeasure }, "Measure it"),
          h("span", { class: "note" }, "This is a prediction. Measuring makes it a trial of this study.")),
    ];
  }

  fill(panel,
    h("section", { class: "card" }, h("h2", {}, "What if I had …"),
      h("form", { class: "stack", onsubmit: (event) => event.preventDefault() }, fields.map((field) => field.node), h("div", { class: "field" }, h("label", { for: "offer-best" }, "Best by"), best))),
    h("section", { class: "card" }, h("h2", {}, "The model's answer"), answer));
  look();
}
