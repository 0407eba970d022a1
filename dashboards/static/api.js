/** Talking to the server: JSON in and out, and one line for what went wrong. */

const ROOT = document.body.dataset.root ?? ""; // where a proxy has put this server

/** An address of this server as a browser asks for it. */
export const href = (path) => ROOT + path;

/** What the server refused, in its own words; `field` where it names one. */
export class Problem extends Error {
  constructor(message, status, field = null) {
    super(message);
    this.status = status;
    this.field = field;
  }
}

function problemOf(body, status) {
  const detail = body?.detail ?? body?.error ?? body;
  if (typeof detail === "string") return new Problem(detail, status, body?.field ?? null);
  if (Array.isArray(detail) && detail[0]) {
    const field = (detail[0].loc ?? []).filter((part) => part !== "body" && part !== "query").join(".");
    return new Problem(field ? `${field}: ${detail[0].msg}` : detail[0].msg, status, field);
  }
  if (detail?.message) return new Problem(detail.message, status, detail.field ?? body?.field ?? null);
  return new Problem(`the server answered ${status}`, status);
}

/**
 * Ask the server.
 * @param {string} path
 * @param {{method?: string, body?: any, headers?: Object<string, string>, signal?: AbortSignal, cache?: RequestCache}} [options]
 */
export async function ask(path, { method = "GET", body, headers = {}, signal, cache = "default" } = {}) {
  const sent = { Accept: "application/json", ...headers };
  if (body !== undefined && !sent["Content-Type"]) sent["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(href(path), {
      method, signal, cache, headers: sent,
      body: body === undefined || typeof body === "string" ? body : JSON.stringify(body),
    });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Problem("the server does not answer; is autoq serve still running?", 0);
  }
  if (answer.status === 401 && location.pathname !== href("/login")) {
    location.assign(`${href("/login")}?next=${encodeURIComponent(location.pathname + location.search)}`);
  }
  const text = await answer.text();
  let found = null;
  try {
    found = text ? JSON.parse(text) : null;
  } catch {
    if (answer.ok) return text;
  }
  if (!answer.ok) throw problemOf(found, answer.status);
  return found;
}

const API = "/api/v1";

/** The API's path of a study, or of something below it. */
export const studyPath = (study, ...rest) => [API, "studies", study, ...rest].map((part, i) =>
  i === 0 ? part : encodeURIComponent(part)).join("/");

/** The page of a study, or of a trial of it. */
export const studyPage = (study, number = null) =>
  `${ROOT}/studies/${encodeURIComponent(study)}${number === null ? "" : `/trials/${number}`}`;
