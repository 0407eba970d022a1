/** Numbers as text, by the rules of the command line (autoq/display/numbers.py). */

const BYTE_UNITS = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "KB"]];

function digits(value, significant) {
  if (value === 0 || !Number.isFinite(value)) return String(value);
  const scientific = value.toExponential(significant - 1);
  const exponent = Number(scientific.split("e")[1]);
  if (exponent < -4 || exponent >= 7) return scientific;
  return value.toFixed(Math.max(0, significant - 1 - exponent));
}

/** Bytes with a decimal unit: `91.23 MB`. */
export function size(count) {
  for (const [factor, unit] of BYTE_UNITS) {
    if (Math.abs(count) >= factor) return `${digits(count / factor, 4)} ${unit}`;
  }
  return `${count.toFixed(0)} B`;
}

/** A value in the given unit, without it; bytes bring theirs along. */
export function number(value, unit) {
  if (value === null || value === undefined) return "–";
  return unit === "bytes" ? size(value) : digits(value, 4);
}

/** A value with its unit. */
export function quantity(value, unit) {
  if (value === null || value === undefined) return "–";
  return unit === "bytes" ? size(value) : `${digits(value, 4)} ${unit}`.trim();
}

/** `0.0312 ± 0.0008`: the error to two digits at most, the value to the same place. */
export function withError(value, stderr, unit) {
  if (!stderr || unit === "bytes" || value === null) return number(value, unit);
  const exponent = Math.floor(Math.log10(stderr));
  if (exponent < -6 || exponent >= 5 || Math.abs(value) >= 1e7) return `${digits(value, 4)} ± ${digits(stderr, 1)}`;
  const places = stderr / 10 ** exponent < 2 ? Math.max(0, 1 - exponent) : Math.max(0, -exponent);
  return `${value.toFixed(places)} ± ${stderr.toFixed(places)}`;
}

/** What a measurement's value is worth, in a word or two: predicted, estimated, search part. */
export function provenance(measurement) {
  if (measurement.kind === "predicted") return "predicted";
  if (measurement.kind === "computed") return measurement.unit === "J" ? "estimated" : "exact";
  return measurement.part === "report" ? "measured" : "measured, search part";
}

/** Seconds as `42 s`, `3 m 20 s`, `1 h 05 m`. */
export function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${seconds < 10 ? Number(seconds).toFixed(1) : whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} m ${String(whole % 60).padStart(2, "0")} s`;
  return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} m`;
}

/** A moment as `3 min ago`, or its date where that is more than a week ago. */
export function ago(iso) {
  const seconds = (Date.now() - Date.parse(iso)) / 1000;
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  if (seconds < 604800) return `${Math.floor(seconds / 86400)} d ago`;
  return iso.slice(0, 10);
}

/** `3 trials`, `1 trial`. */
export const counted = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;

const NAMES = {
  kl_nats_per_token: "KL divergence",
  size_bytes: "Size",
  latency_decode_ms: "Decode latency",
  latency_prefill_ms: "Prefill latency",
  energy_joule_per_token: "Energy per token",
  peak_memory_bytes: "Peak memory",
  perplexity: "Perplexity",
  accuracy: "Accuracy",
  next_token_accuracy: "Next-token accuracy",
  masked_token_accuracy: "Masked-token accuracy",
  multiple_choice_accuracy: "Multiple-choice accuracy",
  js_nats_per_token: "JS divergence",
  bits_per_weight: "Bits per weight",
  cosine_distance: "Cosine distance",
  top1_agreement: "Top-1 agreement",
  bleu: "BLEU",
  chrf: "chrF",
  rouge_l: "ROUGE-L",
  f1: "F1",
  ndcg: "nDCG",
  spearman: "Spearman correlation",
  lm_eval: "lm-eval",
};

/** A text whose marks that turn the order of letters around, also of those after it, can be seen. */
export const visible = (text) => text.replaceAll(/[\u202a-\u202e\u2066-\u2069]/g, (mark) => `⟨U+${mark.codePointAt(0).toString(16).toUpperCase()}⟩`);

/** An objective's name for people; the name itself where there is no better one. */
export function objectiveName(name) {
  const [metric, task] = name.split(":");
  const text = NAMES[metric] ?? metric.replaceAll("_", " ");
  return task ? `${text}, ${task}` : text;
}

const KNOWN = new RegExp(`\\b(${Object.keys(NAMES).filter((name) => name.includes("_")).join("|")})\\b`, "g");

/** A sentence with objectives' names for people in it. */
export const readable = (text) => text.replaceAll(KNOWN, (name) => {
  const found = NAMES[name];
  return /^[A-Z][a-z]/.test(found) ? found[0].toLowerCase() + found.slice(1) : found;
});

/** An axis title for people. */
export const axisTitle = ({ name, unit }) => (unit === "bytes" || !unit ? objectiveName(name) : `${visible(objectiveName(name))} (${visible(unit)})`);

/** Text with a unit as a number in an objective's own unit, null where it is none: `90MB`, `1.5 GB`, `0.06`. */
export function parseQuantity(text, unit) {
  const found = /^\s*([+-]?[\d.]+(?:e[+-]?\d+)?)\s*([kmgt]?i?b?)\s*$/i.exec(text);
  if (!found) return null;
  const value = Number(found[1]);
  if (!Number.isFinite(value)) return null;
  const suffix = found[2].toLowerCase();
  if (unit !== "bytes") return suffix ? null : value;
  if (!suffix) return value < 1e5 ? value * 1e6 : value; // nobody means 90 bytes
  const power = "bkmgt".indexOf(suffix[0]);
  return value * (suffix.includes("i") ? 1024 : 1000) ** power;
}
