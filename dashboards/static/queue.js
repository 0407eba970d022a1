/** What waits, and for what: which study has the places that another one needs. */
import { ask, studyPage } from "./api.js";
import { counted } from "./format.js";
import { h } from "./dom.js";

/** Study's name -> why it waits, as the server's scheduler saw it last; empty where there is none. */
export async function standings() {
  try {
    return new Map((await ask("/api/v1/queue", { cache: "no-store" })).waiting.map((each) => [each.study, each]));
  } catch {
    return new Map(); // what waits is said without why
  }
}

/** One line: where a queued study stands. */
export const waits = (standing) => standing?.text ?? "Waits in the queue of the server that runs it.";

/** Where a study stands in the line, in a word or two. */
export const placed = (standing) => (standing?.position ? `number ${standing.position} in line` : null);

/** Links to those who hold the places. */
export function holders(standing) {
  const known = (standing?.holders ?? []).filter((holder) => holder.study !== null);
  return known.map((holder, i) => [i ? ", " : "", h("a", { href: studyPage(holder.study) }, holder.study), ` (${counted(holder.places, "place")}${holder.leaving ? ", ends its turn" : ""})`]);
}

/** What is said of a study on Ray whose cluster has no room for all its workers; null where all are up. */
export function short(wanted, up) {
  return wanted > up ? `${up} of ${counted(wanted, "worker")} ${up === 1 ? "is" : "are"} up; ${wanted - up === 1 ? "one waits" : `${wanted - up} wait`} for room in the cluster.` : null;
}
