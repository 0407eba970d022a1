/** A note and tags on a trial. */
import { ask, studyPath } from "./api.js";
import { fill, h, say } from "./dom.js";
import { ago } from "./format.js";

/** Fill the form of a trial's remark. */
export async function remarksForm(form, study, number) {
  const path = studyPath(study, "trials", String(number), "remark");
  const note = h("textarea", { id: "note", rows: 3, placeholder: "What should be remembered of it?" });
  const tags = h("input", { type: "text", id: "tags", placeholder: "shipped, baseline for v2", spellcheck: "false" });
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const state = h("span", { class: "note" });
  const save = h("button", {}, "Save");
  form.classList.add("stack");
  fill(form, h("label", {}, "Note", note), h("label", {}, "Tags, with commas between", tags), problem, h("div", { class: "actions" }, save, state));
  // What is typed before an answer comes is not taken away by it.
  const typed = new Set();
  form.addEventListener("input", (event) => typed.add(event.target));
  const show = (found) => {
    if (!typed.has(note)) note.value = found?.note ?? "";
    if (!typed.has(tags)) tags.value = (found?.tags ?? []).join(", ");
    state.textContent = found?.changed_at ? `${found.user ? `${found.user}, ` : ""}${ago(found.changed_at)}` : "";
  };
  let known = null;
  const load = () => (known ??= ask(path).then(show).catch((refused) => {
    if (refused.status === 404) return;
    known = null;
    throw refused;
  }));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    save.disabled = true;
    try {
      await load(); // or a field that nobody has typed in would be saved as empty
      typed.clear();
      const body = { note: note.value, tags: tags.value.split(",").map((tag) => tag.trim()).filter(Boolean) };
      show(await ask(path, { method: "PUT", body }));
      problem.hidden = true;
      state.textContent = "Saved.";
      say("The note is saved.");
    } catch (refused) {
      problem.hidden = false;
      fill(problem, refused.message);
    } finally {
      save.disabled = false;
    }
  });
  try {
    await load();
  } catch (refused) {
    problem.hidden = false;
    fill(problem, refused.message);
  }
}
