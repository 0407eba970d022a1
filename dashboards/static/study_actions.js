/** What can be done with a study: stop it, go on with it, take its numbers away, remove it. */
import { ask, href, studyPath } from "./api.js";
import { complain, h, say } from "./dom.js";

const GOING = new Set(["queued", "running"]);

/** Buttons for a study in a state. */
export function studyActions(name, state, { refresh }) {
  const act = (what, done, body) => async (event) => {
    const button = event.currentTarget;
    button.disabled = true;
    try {
      await ask(studyPath(name, what), { method: "POST", body });
      complain(null);
      say(done);
      await refresh();
    } catch (problem) {
      complain(problem);
    } finally {
      button.disabled = false;
    }
  };
  const remove = async (event) => {
    if (!window.confirm(`Remove ${name} with all its trials, for good?`)) return;
    const button = event.currentTarget;
    button.disabled = true;
    try {
      await ask(studyPath(name), { method: "DELETE" });
      location.assign(href("/"));
    } catch (problem) {
      complain(problem);
      button.disabled = false;
    }
  };
  const link = (text, path) => h("a", { class: "button", href: href(path), download: `${name}-${text.toLowerCase().replaceAll(" ", "-")}` }, text);
  return [
    GOING.has(state) ? h("button", { type: "button", class: "danger", onclick: act("cancel", "The study ends after the trials that are out.") }, "Cancel") : null,
    GOING.has(state) || state === "created" ? null : h("button", { type: "button", onclick: act("resume", "The study is queued again.", {}) }, "Resume"),
    h("a", { class: "button", href: href(studyPath(name, "report")), download: `${name}.html`, title: "All figures with their tables in one HTML file" }, "Report"),
    link("Frontier JSON", studyPath(name, "frontier")),
    h("a", { class: "button", href: href(`/compare?studies=${encodeURIComponent(name)}`) }, "Compare"),
    GOING.has(state) ? null : h("button", { type: "button", class: "danger", onclick: remove }, "Remove"),
  ];
}
