"""Observers: which range of a layer's inputs 8 bits are spread over, one file each.

A calibrated range is a choice between two errors: what lies outside is cut off, and the wider it is, the coarser
are the levels within. An observer makes it from a histogram of the inputs. To add one, write
`autoq/calibration/observers/NAME.py` with one subclass of `Observer` and give it a text form in
`autoq.scheme.OBSERVERS`; the contract tests enrol it by themselves.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor

from autoq import plugins
from autoq.calibration.histogram import Histogram
from autoq.calibration.observers._levels import AFFINE_INT8, FP8, SYMMETRIC_INT8, Codes
from autoq.errors import SchemeRefused
from autoq.scheme import OBSERVERS, Float, Integer

__all__ = ["AFFINE_INT8", "FP8", "SYMMETRIC_INT8", "Codes", "Observer", "input_range"]


class Observer(abc.ABC):
    """One way of choosing a range."""

    needs_histogram = True

    @abc.abstractmethod
    def choose(self, inputs: Histogram, low: float, high: float, levels: Codes) -> tuple[float, float]:
        """The (least, greatest) input that is not cut off, within [`low`, `high`], which holds 0 and all inputs.

        `levels` says what the range will be spread over. Not asked where `low` and `high` are both 0.
        """


def input_range(scheme: Integer | Float, statistics: Mapping[str, Tensor], levels: Codes) -> Tensor:
    """The calibrated range of a layer's inputs (2,) float32, as the observer that `scheme` names chooses it.

    `statistics` are the layer's, as `autoq.calibration.curvature.gather` names them: `input_range`, and
    `input_counts` with `input_exponent`. Raises `SchemeRefused` where they are missing.
    """
    assert scheme.activation is not None
    assert scheme.activation in OBSERVERS, scheme
    observer = plugins.load("calibration.observers", OBSERVERS[scheme.activation], Observer)
    needed = ["input_range", *(["input_counts", "input_exponent"] if observer.needs_histogram else [])]
    if any(name not in statistics for name in needed):
        raise SchemeRefused("nothing that is measured depends on the layer, so its inputs have no range; choose a8dyn")
    low, high = (float(bound) for bound in statistics["input_range"])
    if not observer.needs_histogram or low == high == 0:
        return statistics["input_range"].float()
    inputs = Histogram(statistics["input_counts"], int(statistics["input_exponent"]))
    return torch.tensor(observer.choose(inputs, low, high, levels))
