"""The runtime that is none: every scheme that can be evaluated, no timing."""

from __future__ import annotations

import pytest

from autoq import plugins
from autoq.errors import AutoQError
from autoq.layer import Layer
from autoq.scheme import parse_scheme
from autoq.spec import TargetSpec
from autoq.targets import Target

LAYER = Layer("proj", "linear", 10, 96, 2)


@pytest.fixture
def target():
    return plugins.load("targets", "generic", Target)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "head"])
@pytest.mark.parametrize(
    "scheme", ["keep", "rtn-int3-g32", "hqq-int2-g48-rz", "kmeans5-channel", "rtn-int7-tensor-sym"]
)
def test_runs_whatever_can_be_evaluated(target, kind, scheme):
    assert target.refuses(Layer("proj", kind, 10, 96, 2), parse_scheme(scheme)) is None


def test_refuses_groups_that_do_not_divide_and_activations(target):
    assert target.refuses(LAYER, parse_scheme("rtn-int4-g64")) == (
        "group size 64 does not divide the 96 inputs of shape (10, 96)"
    )
    assert "a8dyn" in target.refuses(LAYER, parse_scheme("rtn-int8-channel-sym-a8dyn"))


def test_times_nothing(target):
    assert target.latencies == frozenset()
    with pytest.raises(AutoQError, match="times nothing"):
        target.time(None, {}, TargetSpec(name="generic"))


def test_baselines_go_from_8_to_2_bits(target):
    names = list(target.baselines())
    assert names[:3] == ["unquantized", "uniform-int8", "uniform-int6"]
    assert {"uniform-int4", "uniform-int3", "uniform-int2", "uniform-int4-hqq"} <= set(names)
