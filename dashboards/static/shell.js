/** What every page has: colours, shortcuts. */
import { ask, href } from "./api.js";
import { at, fill, h } from "./dom.js";

const NEXT = { "": "light", light: "dark", dark: "" };
const LOOKS = { "": ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };

function showTheme() {
  const [sign, name] = LOOKS[document.documentElement.dataset.theme ?? ""];
  at("theme").textContent = sign;
  at("theme").setAttribute("aria-label", `Colours: ${name}`);
  at("theme").title = `Colours: ${name}`;
}

function nextTheme() {
  const theme = NEXT[document.documentElement.dataset.theme ?? ""];
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  try {
    if (theme) localStorage.setItem("theme", theme);
    else localStorage.removeItem("theme");
  } catch {
    // Not kept: no storage here.
  }
  showTheme();
  document.dispatchEvent(new Event("theme"));
}

const PLACES = { s: "/", n: "/new", c: "/compare" };
let going = 0;

/** Whether a key is meant for a field and not for the page. */
export function typing(event) {
  const element = event.target;
  return event.ctrlKey || event.metaKey || event.altKey
    || element instanceof HTMLInputElement || element instanceof HTMLTextAreaElement || element instanceof HTMLSelectElement;
}

document.addEventListener("keydown", (event) => {
  if (typing(event) || at("keys-dialog").open) return;
  if (going > Date.now() && event.key in PLACES) {
    going = 0;
    location.assign(href(PLACES[event.key]));
  } else if (event.key === "g") {
    going = Date.now() + 1200;
  } else if (event.key === "?") {
    at("keys-dialog").showModal();
  } else if (event.key === "t") {
    nextTheme();
  } else if (event.key === "/") {
    const field = document.querySelector('input[type="search"], #limits input');
    if (field) {
      event.preventDefault();
      field.focus();
    }
  }
});
at("theme").addEventListener("click", nextTheme);
at("keys").addEventListener("click", () => at("keys-dialog").showModal());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("theme")));
showTheme();

/** Who looks, where the server asks for it, and how to leave. */
async function showUser() {
  const found = await ask("/api/v1/session").catch(() => null);
  if (!found?.user) return;
  at("user").hidden = false;
  fill(at("user"), `${found.user}, ${found.role} `, h("button", { type: "button", class: "link", onclick: async () => {
    await ask("/api/v1/session", { method: "DELETE" });
    location.assign(href("/login"));
  } }, "sign out"));
}

if (location.pathname !== href("/login")) showUser();
