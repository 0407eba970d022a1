/** What happens on the server, as it happens; where events do not come, by asking now and then. */

import { href } from "./api.js";

const LEAST = 700; // milliseconds between two looks
const ASK = 5000;

/**
 * Call `look` soon after something happened, one call at a time.
 * @param {string} address of a stream of server-sent events
 * @param {string[]} names of the events that matter
 * @param {(event: {type: string, data: any}|null) => Promise<void>|void} look
 * @param {() => boolean} [wanted] whether asking goes on where there are no events
 */
export function follow(address, names, look, wanted = () => true) {
  let busy = false;
  let again = null;
  let last = 0;
  const soon = (event) => {
    if (busy || document.hidden) {
      again = event;
      return;
    }
    busy = true;
    setTimeout(async () => {
      last = Date.now();
      again = null;
      try {
        await look(event);
      } finally {
        busy = false;
        if (again) soon(again);
      }
    }, Math.max(0, last + LEAST - Date.now()));
  };
  document.addEventListener("visibilitychange", () => !document.hidden && again && soon(again));
  let asking = null;
  const ask = () => {
    asking ??= setInterval(() => wanted() && soon({ type: "ask", data: null }), ASK);
  };
  const source = new EventSource(href(address));
  const heard = (event) => {
    let data = null;
    try {
      data = JSON.parse(event.data);
    } catch {
      // A comment or a ping: that something came is enough.
    }
    soon({ type: event.type, data });
  };
  for (const name of ["message", ...names]) source.addEventListener(name, heard);
  source.onerror = () => source.readyState === EventSource.CLOSED && ask();
  source.onopen = () => {
    clearInterval(asking);
    asking = null;
  };
  addEventListener("pagehide", () => source.close());
  return () => {
    clearInterval(asking);
    source.close();
  };
}
