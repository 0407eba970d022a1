/** Elements, without markup: every text becomes a text node. */
import { visible } from "./format.js";

const WORD = 120; // letters of a word from which on it may break anywhere
const PIECE = 40;
const AS_THEY_ARE = new Set(["option", "textarea", "title"]); // hold text alone

/**
 * Text that anybody may have written, as nodes. Where a long word may break is said: a browser that has to find that
 * out takes seconds for a word of 20,000 letters and minutes for one of 100,000. Marks that turn the order of the
 * letters around, also of those after the text, are shown instead.
 */
function nodes(child, tag = "") {
  if (typeof child !== "string") return [child];
  const text = visible(child);
  if (text.length <= WORD || AS_THEY_ARE.has(tag)) return [text];
  return text.split(/(\S{121,})/).flatMap((part) => (part.length <= WORD || /\s/.test(part) ? [part] : pieces(part)));
}

const pieces = (word) => Array.from({ length: Math.ceil(word.length / PIECE) }, (_, i) => [word.slice(i * PIECE, (i + 1) * PIECE), document.createElement("wbr")]).flat();

const all = (children, tag) => children.flat(9).filter((child) => child !== null && child !== undefined && child !== false).flatMap((child) => nodes(child, tag));

/**
 * An element with attributes and children.
 * @param {string} tag
 * @param {Object<string, any>} [attributes] `on…` are listeners, `dataset` an object, false and null are left out
 * @param {...(Node|string|number|null|false|Array)} children
 * @returns {HTMLElement}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "value" || name === "checked" || name === "selected") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...all(children, tag));
  return element;
}

/** The element of an id. */
export const at = (id) => document.getElementById(id);

/** Replace what an element holds. */
export function fill(element, ...children) {
  element.replaceChildren(...all(children));
}

/** The page's own data, as the server wrote it. */
export function pageData() {
  const found = at("data");
  return found ? JSON.parse(found.textContent) : {};
}

/** Names of modules, which may have several lines, and where they may break. */
const isLong = (cell) => typeof cell === "string" && cell.length > 20 && cell.includes(".");
const parts = (name) => name.split(/(?<=\.)/).flatMap((part, i) => (i ? [h("wbr"), part] : [part]));

/**
 * A real table in a box that scrolls.
 * @param {string} caption for whoever cannot see where it stands
 * @param {string[]} headers
 * @param {Array<Array<any>>} rows cells: text, numbers or nodes
 * @param {{right?: Set<number>, head?: boolean}} [options] columns to the right; whether first cells head their rows
 */
export function table(caption, headers, rows, { right = new Set(), head = true } = {}) {
  const side = (index) => (right.has(index) ? "num" : null);
  return h(
    "div",
    { class: "table-wrap", tabindex: "0", role: "region", "aria-label": caption },
    h(
      "table",
      {},
      h("caption", { class: "unseen" }, caption),
      h("thead", {}, h("tr", {}, headers.map((text, i) => h("th", { scope: "col", class: side(i) }, text)))),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h("tr", {}, row.map((cell, i) =>
            i === 0 && head ? h("th", { scope: "row", class: isLong(cell) ? "long" : side(i) }, isLong(cell) ? parts(cell) : cell) : h("td", { class: side(i) }, cell))),
        ),
      ),
    ),
  );
}

let spoken = 0;
let pending = null;

/** Say one line to whoever listens to the page; of many in a row, the last. */
export function say(text) {
  clearTimeout(pending);
  const wait = Math.max(0, spoken + 4000 - Date.now());
  pending = setTimeout(() => {
    spoken = Date.now();
    at("live").textContent = text;
  }, wait);
}

/** Show one line about what went wrong, or take it away. */
export function complain(problem, where = at("problem")) {
  where.hidden = !problem;
  fill(where, problem ? (problem.message ?? String(problem)) : "");
}

let pressed = null;
addEventListener("pointerdown", ({ button }) => {
  if (button !== 0 || pressed) return;
  pressed = {};
  pressed.over = new Promise((resolve) => { pressed.end = resolve; });
}, true);
for (const name of ["pointerup", "pointercancel"]) {
  addEventListener(name, () => setTimeout((own) => {
    own?.end();
    if (pressed === own) pressed = null;
  }, 0, pressed), true);
}

/** Wait until no button is pressed, two seconds at most: what is replaced under a press is not clicked on. */
export const calm = () => pressed && Promise.race([pressed.over, new Promise((resolve) => { setTimeout(resolve, 2000); })]);

/** At most one call per frame. */
export function perFrame(call) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      call();
    });
  };
}

/** The call once nothing has happened for so many milliseconds. */
export function debounced(call, milliseconds) {
  let timer = null;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), milliseconds);
  };
}
