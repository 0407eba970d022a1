"""Tables of a study against what they tabulate, assignment by assignment."""

import numpy as np
import pytest

from autoq.layer import Layer, ModelInfo
from autoq.scheme import Keep, parse_scheme
from autoq.search.priors import make_prior
from autoq.search.setup import pose
from autoq.search.space import SearchSpace, Variable
from autoq.search.tables import tabulate
from autoq.spec import build_spec
from autoq.targets import CostTable

SCHEMES = ["rtn-int4-g32", "rtn-int8-channel-sym", "keep"]
SIZE, DECODE, ENERGY = "size_bytes", "latency_decode_ms", "energy_joule_per_token"


def problem(folder, objectives, constraints=None, target="torch-cpu"):
    return pose(
        build_spec(
            {
                "model": {"id": str(folder)},
                "target": {"name": target},
                "space": {"schemes": SCHEMES},
                "objectives": objectives,
                "constraints": constraints or {},
            }
        )
    )


def drawn(space, count=20):
    """Choices by name, and the assignments that they stand for."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        picked = [int(rng.integers(len(v.choices))) for v in space.variables]
        yield dict(zip([v.name for v in space.variables], picked, strict=True)), space.assignment(picked)


@pytest.fixture
def costs():
    def costs(posed):
        rng = np.random.default_rng(0)
        times = {
            layer.name: {str(s): float(rng.uniform(0.1, 1)) for s in {*posed.space.choices.get(layer.name, ()), Keep()}}
            for layer in posed.info.layers
        }
        return CostTable("a machine", {DECODE: 3.5}, {DECODE: times})

    return costs


def test_sizes_and_latencies_are_sums_over_parameters(tiny_model_dir, costs):
    posed = problem(tiny_model_dir("llama"), ["kl_nats_per_token", SIZE, DECODE], {SIZE: {"max": 50_000}})
    table = costs(posed)
    prior = make_prior(posed, None, table)
    assert prior.losses == {}
    assert prior.additive[1].high == 50_000
    assert prior.limits == []
    for picked, assignment in drawn(posed.space):
        exact = posed.info.other_bytes + sum(layer.nbytes(assignment[layer.name]) for layer in posed.info.layers)
        assert prior.additive[1].of(picked) == pytest.approx(exact, rel=1e-12)
        assert prior.additive[2].of(picked) == pytest.approx(table.predict(DECODE, assignment), rel=1e-9)


def test_energy_is_a_sum_over_parameters(tiny_model_dir):
    posed = problem(tiny_model_dir("llama"), ["kl_nats_per_token", SIZE, ENERGY])
    prior = make_prior(posed, None, None)
    objective = posed.objectives[ENERGY]
    values = set()
    for picked, assignment in drawn(posed.space):
        exact = objective.estimate(posed.info, assignment, posed.spec.target, posed.target).joules
        assert prior.additive[2].of(picked) == pytest.approx(exact, rel=1e-9)
        values.add(exact)
    assert len(values) > 10


def test_what_is_bounded_and_no_objective_is_a_limit(tiny_model_dir):
    posed = problem(tiny_model_dir("llama"), ["kl_nats_per_token"], {SIZE: {"min": 10_000, "max": 50_000}})
    prior = make_prior(posed, None, None)
    assert prior.additive == {}
    (limit,) = prior.limits
    assert (limit.low, limit.high) == (10_000, 50_000)


def test_a_latency_without_a_table_is_not_known(tiny_model_dir):
    posed = problem(tiny_model_dir("llama"), ["kl_nats_per_token", DECODE])
    assert make_prior(posed, None, None).additive == {}


def test_predicted_losses_are_sums_over_the_layers_of_a_parameter(tiny_model_dir):
    posed = problem(tiny_model_dir("llama"), ["kl_nats_per_token", SIZE])
    losses = {
        name: {str(s): 0.1 * i + len(name) for i, s in enumerate(schemes)}
        for name, schemes in posed.space.choices.items()
    }
    prior = make_prior(posed, losses, None)
    for variable in posed.space.variables:
        sums = [sum(losses[layer.name][str(s)] for layer in variable.members) for s in variable.choices]
        assert prior.losses[variable.name].tolist() == pytest.approx(sums)


def space(layers=6):
    schemes = tuple(parse_scheme(f"rtn-int{bits}-g64") for bits in (2, 4, 8))
    found = tuple(Layer(f"l{i}", "linear", 64, 128, 2) for i in range(layers))
    info = ModelInfo("Tiny", "causal", "bfloat16", 10, 10, found, 0)
    return SearchSpace(info, tuple(Variable(layer.name, (layer,), schemes) for layer in found))


def bits(assignment):
    return [scheme.bits for _, scheme in assignment.items()]


def test_layers_of_one_shape_may_count_differently():
    """By their place, as no table of shapes could tell; then each is asked for."""
    searched = space()
    table = tabulate(searched, lambda a: 7.0 + sum((i + 1) * b for i, b in enumerate(bits(a))))
    for picked, assignment in drawn(searched):
        assert table.of(picked) == pytest.approx(7.0 + sum((i + 1) * b for i, b in enumerate(bits(assignment))))


@pytest.mark.parametrize(
    "function",
    [
        lambda a: max(bits(a)) * 1.0,
        lambda a: float(np.prod(bits(a))),
        # Random assignments hardly ever show it.
        lambda a: sum(bits(a)) + 5.0 * (min(bits(a)) == 8),
        lambda a: float("nan"),
    ],
    ids=["max", "product", "all at once", "nan"],
)
def test_what_is_no_sum_has_no_table(function):
    assert tabulate(space(), function) is None
