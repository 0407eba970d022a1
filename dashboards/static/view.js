/** What is looked at, in the address: shared links show the same. */

const parameters = new URLSearchParams(location.search);
const listeners = [];
let pending = null;

/** The value of a name in the address, or `otherwise`. */
export const view = (name, otherwise = "") => parameters.get(name) ?? otherwise;

/** Names in the address that start with `prefix`, without it, and their values. */
export function views(prefix) {
  return Object.fromEntries(
    [...parameters].filter(([name]) => name.startsWith(prefix)).map(([name, value]) => [name.slice(prefix.length), value]),
  );
}

/** Set names in the address; null and empty take them away. */
export function setView(changes) {
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "") parameters.delete(name);
    else parameters.set(name, String(value));
  }
  clearTimeout(pending);
  pending = setTimeout(write, 120); // browsers limit how often an address may change
}

/** The address as it will stand. */
export function address() {
  const query = parameters.toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
  return location.pathname + (query ? `?${query}` : "") + location.hash;
}

function write() {
  history.replaceState(null, "", address());
  for (const listen of listeners) listen();
}

/** Be told when the address changes. */
export const onView = (listen) => listeners.push(listen);

addEventListener("pagehide", write);
