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
  const show = (found) => {
    note.value = found?.note ?? "";
    tags.value = (found?.tags ?? []).join(", ");
    state.textContent = found?.changed_at ? `${found.user ? `${found.user}, ` : ""}${ago(found.changed_at)}` : "";
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    save.disabled = true;
    try {
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
  // What is typed before the answer comes is not taken away by it.
  let typed = false;
  form.addEventListener("input", () => { typed = true; });
  try {
    const found = await ask(path);
    if (!typed) show(found);
  } catch (refused) {
    if (refused.status !== 404) {
      problem.hidden = false;
      fill(problem, refused.message);
    }
  }
}
