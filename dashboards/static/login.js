/** Sign in: the token goes to the server once, which answers with a cookie that no script can read. */
import { ask, href } from "./api.js";
import { at, complain } from "./dom.js";
import { view } from "./view.js";

/** Where to go afterwards: a path of this server and nowhere else. */
function next() {
  const wanted = URL.parse?.(view("next"), location.origin) ?? null; // null for what is no address
  return view("next") && wanted?.origin === location.origin ? wanted.pathname + wanted.search : href("/");
}

at("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await ask("/api/v1/session", { method: "POST", body: { token: at("token").value.trim() } });
    location.assign(next());
  } catch (problem) {
    complain(problem);
    at("token").setAttribute("aria-invalid", "true");
    at("token").select();
  }
});
at("login").querySelector("button").disabled = false; // pressed before, it would only load the page anew
at("token").focus();
