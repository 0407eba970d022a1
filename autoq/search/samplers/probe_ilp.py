"""Probe ILP: measures every layer alone at a low choice, then solves the measured losses exactly.

HIGGS (Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via the Linearity
Theorem"): where all layers are quantized well, what quality is lost is about linear in each layer's own
error,

    loss(x) − loss(reference) ≈ Σᵢ aᵢ tᵢ(xᵢ),

so a coefficient aᵢ per layer can be measured with all others left alone, and the best assignment for a
budget follows by dynamic programming. The first trials here are the reference, every parameter at its
last choice, and one for each parameter with it alone at the choice `probe`, in random order. The
difference between the two is scaled to the other choices by the ratio of the predicted losses,
(losses[c] − losses[last]) / (losses[probe] − losses[last]), or of 4**-index where there are none; with
`every_choice` each choice is measured. All later trials are exact solutions at budgets along the range,
as in `gradient_ilp`.

Where we differ: HIGGS adds Gaussian noise of several sizes to a layer and fits aᵢ, and its tᵢ are relative
squared errors of weights; our probes are schemes that the study has. What was not measured (`max_probes`,
failures) is predicted, times the median ratio of measured to predicted. Losses below zero are noise of
the measurement: they are raised to a thousandth of the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from autoq.search.prior import Prior
from autoq.search.samplers import Option, Sampler, Value
from autoq.search.samplers._known import Choices, Floats, Known, Proposer, Told, taken
from autoq.search.samplers.gradient_ilp import next_solution

POSITION = "probe_ilp:position"
_FLOOR = 1e-3  # least measured loss, relative to the scaled prediction


class _ProbeIlp(Proposer):
    def propose(self, study: optuna.Study, trial: FrozenTrial, known: Known) -> Choices:
        used = taken(study, trial, known.names)
        design = self._design(known)
        limit = self._options.get("max_probes")
        reference, *probes = design
        for choices in [reference, *probes[: None if limit is None else int(limit)]]:
            if choices not in used:
                return choices
        told = Told.of(study, known)
        losses = measured_losses(known, told, int(self._options.get("probe") or 0))
        return next_solution(study, trial, known, losses, self._seed, POSITION)

    def _design(self, known: Known) -> list[Choices]:
        """The reference, then the probes, in the seed's order; all parameters once before any again."""
        reference = tuple(size - 1 for size in known.sizes)
        rng = np.random.default_rng(self._seed)
        first = int(self._options.get("probe") or 0)
        widest = max(known.sizes) - 1
        probed = [first, *(c for c in range(widest) if c != first)] if self._options.get("every_choice") else [first]
        design = [reference]
        for choice in probed:
            for row in rng.permutation(len(reference)):
                # A parameter with fewer choices is probed at its last but one.
                at = min(choice, known.sizes[row] - 2)
                design.append((*reference[:row], at, *reference[row + 1 :]))
        return list(dict.fromkeys(design))


def measured_losses(known: Known, told: Told, probe: int) -> Floats:
    """Loss of each choice (parameters, choices) over the reference, from the trials that differ from it in one."""
    reference = np.array(known.sizes) - 1
    rows = np.arange(len(reference))
    predicted: Floats = known.losses - known.losses[rows, reference][:, None]
    moved = told.choices != reference
    at_reference = np.flatnonzero(moved.sum(axis=1) == 0)
    single = np.flatnonzero(moved.sum(axis=1) == 1)
    if not len(at_reference) or not len(single):
        return predicted
    rises = told.values[single] - told.values[at_reference[0]]
    # Qualities count alike, whatever their units.
    rise = (rises / np.maximum(np.abs(rises).mean(axis=0), 1e-30)).mean(axis=1)
    found = np.full_like(predicted, np.nan)
    row = moved[single].argmax(axis=1)
    found[row, told.choices[single, row]] = rise
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = found / predicted
    usable = np.isfinite(ratios) & (ratios > 0)
    usual = float(np.median(ratios[usable])) if usable.any() else 1.0
    losses: Floats = usual * predicted
    for i, size in enumerate(known.sizes):
        seen = np.flatnonzero(np.isfinite(found[i, :size]))
        if not len(seen):
            continue
        # The choice that the others are scaled by: `probe`, or the nearest to it that was measured.
        by = int(seen[np.argmin(np.abs(seen - probe))])
        if predicted[i, by] > 0:
            losses[i, :size] = predicted[i, :size] * max(found[i, by] / predicted[i, by], _FLOOR * usual)
        losses[i, seen] = np.maximum(found[i, seen], _FLOOR * usual * predicted[i, seen])
    return losses


class ProbeIlp(Sampler):
    """HIGGS's linear losses, measured with one layer at a time, then exact budget solutions."""

    uses_losses: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        "probe": Option(int, "index of the choice (by bytes, fewest first) that is probed; default: 0", 0, 1000),
        "every_choice": Option(bool, "probe each choice of each parameter, not one; default: false"),
        "max_probes": Option(int, "most probing trials; default: one for each parameter or choice", 1),
    }

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        return _ProbeIlp(seed, options, prior)
