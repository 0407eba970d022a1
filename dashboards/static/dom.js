/** Elements, without markup: every text goes through textContent. */

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
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** The element of an id. */
export const at = (id) => document.getElementById(id);

/** Replace what an element holds. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
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
  where.textContent = problem ? (problem.message ?? String(problem)) : "";
}

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
