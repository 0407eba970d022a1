/** Figures in cards. */
import { studyPath } from "./api.js";
import { h } from "./dom.js";
import { Figure, saveButtons } from "./figure.js";
import { fitted } from "./maps.js";

/** A card with a figure in it. */
export function figureCard(title, study, name, { wide = false, options = () => ({}), tools = [], kinds, tall = false, ...more } = {}) {
  const root = h("div", { class: `figure${tall ? " tall" : ""}` });
  const figure = new Figure(root, {
    name: `${study}-${name}`,
    label: `${title}. The same numbers are in the table below.`,
    address: (given) => `${studyPath(study, "figures", name)}?${new URLSearchParams(given)}`,
    ...more,
    prepare: (plotly) => fitted(more.prepare?.(plotly) ?? plotly, root.clientWidth),
  });
  const card = h("section", { class: `card${wide ? " wide" : ""}` },
    h("div", { class: "card-head" }, h("h2", {}, title), h("div", { class: "tools" }, tools)), root);
  figure.footer(saveButtons(figure, kinds));
  const load = () => figure.load(options());
  return { card, figure, load };
}
