/** A study's trials in the browser: kept by number, filtered by limits, ranked as `autoq pick` ranks them. */

/**
 * @typedef {{value: number, stderr: number|null, kind: string, part: string, search: number|null}} Measured
 * @typedef {{number: number, state: string, origin: string, baseline: string|null, feasible: boolean|null,
 *   on_frontier: boolean, duplicate_of: number|null, parent: number|null, seconds: number|null, error: string|null,
 *   measured: Object<string, Measured>}} Trial
 * @typedef {{min?: number, max?: number}} Bound
 */

/** Trials of one study. */
export class Points {
  constructor(document) {
    /** @type {Map<number, Trial>} */
    this.trials = new Map();
    this.objectives = [];
    this.merge(document);
  }

  /** Take over what changed: a document of the same shape with fewer trials. */
  merge(document) {
    this.known = {}; // what was derived from the trials so far
    this.study = document.study;
    this.state = document.state;
    this.changes = document.changes;
    const known = new Set(this.objectives.map((objective) => objective.name));
    this.objectives.push(...document.objectives.filter((objective) => !known.has(objective.name)));
    const { columns, measured } = document;
    const facts = Object.keys(columns);
    columns.number.forEach((number, row) => {
      const trial = { measured: {} };
      for (const fact of facts) trial[fact] = columns[fact][row];
      for (const [name, own] of Object.entries(measured)) {
        if (own.value[row] === null) continue;
        trial.measured[name] = {
          value: own.value[row], stderr: own.stderr[row], kind: own.kind[row], part: own.part[row], search: own.search[row],
        };
      }
      this.trials.set(number, trial);
    });
  }

  /** The study's own objectives: those with a direction. */
  get own() {
    return this.objectives.filter((objective) => objective.direction);
  }

  objective(name) {
    return this.objectives.find((objective) => objective.name === name);
  }

  /** Complete trials, in the order of their numbers. */
  get complete() {
    this.known.complete ??= [...this.trials.values()].filter((trial) => trial.state === "complete").sort((a, b) => a.number - b.number);
    return this.known.complete;
  }

  /** Those that no other one beats. */
  get frontier() {
    this.known.frontier ??= this.complete.filter((trial) => trial.on_frontier);
    return this.known.frontier;
  }

  /** How many trials ended how. */
  get counts() {
    const found = {};
    for (const trial of this.trials.values()) found[trial.state] = (found[trial.state] ?? 0) + 1;
    return found;
  }

  /**
   * The frontier's trial that keeps all limits and is best in one objective. Limits are held against reported values,
   * the ranking goes by the search part, equal ones by the other objectives and then by number, as on the command line.
   * @param {Object<string, Bound>} limits
   * @param {string} best
   * @returns {Trial|null}
   */
  pick(limits, best) {
    const own = this.own;
    const order = [own.find((objective) => objective.name === best) ?? own[0], ...own];
    const rank = (trial) => [
      ...order.map(({ name, direction }) => {
        const value = trial.measured[name]?.search ?? Infinity;
        return direction === "minimize" ? value : -value;
      }),
      trial.number,
    ];
    let found = null;
    let first = null;
    for (const trial of this.frontier) {
      if (!fits(trial, limits)) continue;
      const own_rank = rank(trial);
      if (first === null || before(own_rank, first)) [found, first] = [trial, own_rank];
    }
    return found;
  }

  /** Of the frontier, the trial that misses the limits by the least share of them. */
  closest(limits) {
    const miss = (trial) => Object.entries(limits).reduce((sum, [name, { min, max }]) => {
      const value = trial.measured[name]?.value;
      if (value === undefined) return Infinity;
      const over = max !== undefined && value > max ? (value - max) / (Math.abs(max) || 1) : 0;
      return sum + over + (min !== undefined && value < min ? (min - value) / (Math.abs(min) || 1) : 0);
    }, 0);
    return this.frontier.reduce((best, trial) => (best === null || miss(trial) < miss(best) ? trial : best), null);
  }
}

/** Whether a trial keeps all limits; one that was not measured by an objective breaks every limit on it. */
export function fits(trial, limits) {
  return Object.entries(limits).every(([name, { min, max }]) => {
    const value = trial.measured[name]?.value;
    if (value === undefined) return max === undefined && min === undefined;
    return (max === undefined || value <= max) && (min === undefined || value >= min);
  });
}

function before(a, b) {
  for (let i = 0; i < a.length; i += 1) {
    if (a[i] !== b[i]) return a[i] < b[i];
  }
  return false;
}

/** What a trial is called: its baseline's name, else its number. */
export const trialName = (trial) => trial.baseline ?? `trial ${trial.number}`;
