"""The search space: what is in it, what is refused and how it says so."""

import pytest

from autoq import plugins
from autoq.assignment import Assignment
from autoq.errors import SchemeRefused, SpecError
from autoq.layer import Layer, ModelInfo
from autoq.methods import Grid
from autoq.scheme import Integer, Keep, PerChannel, PerGroup, parse_scheme
from autoq.search.space import build_space, refusal
from autoq.spec import build_spec
from autoq.targets import Target


class Runtime(Target):
    """Runs rtn at 4 and 8 bits; 4 bits only on rows of at least 32; merges fusion groups if told to."""

    def __init__(self, fuses=False):
        self.fuses = fuses

    def grid(self):
        return Grid(("rtn", "keep"), (4, 8), (PerGroup(32), PerChannel()), ("integer",))

    def refuses(self, layer, scheme):
        if layer.kind in ("embedding", "head") and scheme != Keep():
            return "embeddings stay as they are"
        if isinstance(scheme, Integer) and scheme.bits not in (4, 8):
            return "only 4 and 8 bits have kernels"
        if isinstance(scheme, Integer) and scheme.bits == 4 and layer.in_features < 32:
            return "4 bits need at least 32 inputs"
        return None


LAYERS = (
    Layer("embed", "embedding", 100, 64, 2, block=None),
    Layer("h.0.q", "linear", 64, 64, 2, fusion_group="h.0.q+k", block=0),
    Layer("h.0.k", "linear", 32, 64, 2, fusion_group="h.0.q+k", block=0),
    Layer("h.0.thin", "linear", 64, 16, 2, block=0),
    Layer("h.1.conv", "conv1d", 64, 64, 2, block=1),
)
INFO = ModelInfo("Tiny", "causal", "bfloat16", 100, 64, LAYERS, 128)


def space(target=None, **fields):
    spec = build_spec({"model": {"id": "x"}, "space": fields}).space
    return build_space(INFO, spec, "runtime", target or Runtime())


def test_default_space_is_what_the_target_runs():
    found = space()
    assert [v.name for v in found.variables] == ["h.0.q", "h.0.k", "h.0.thin", "h.1.conv"]
    names = {v.name: [str(s) for s in v.choices] for v in found.variables}
    assert names["h.0.q"] == ["rtn-int4-channel", "rtn-int4-g32", "rtn-int8-channel", "rtn-int8-g32", "keep"]
    assert names["h.0.thin"] == ["rtn-int8-channel", "keep"]
    assert found.size == 5 * 5 * 2 * 5


def test_choices_are_sorted_by_bytes():
    for variable in space().variables:
        sizes = [sum(layer.nbytes(scheme) for layer in variable.members) for scheme in variable.choices]
        assert sizes == sorted(sizes)


def test_assignment_covers_every_layer_and_inverts():
    found = space()
    assignment = found.assignment([0, 1, 1, 2])
    assert set(assignment) == {layer.name for layer in LAYERS}
    assert assignment["embed"] == Keep()
    assert found.indices(assignment) == [0, 1, 1, 2]
    outside = Assignment({**assignment, "h.0.q": parse_scheme("hqq-int4-g32")})
    assert found.indices(outside) is None


def test_fused_layers_share_one_variable():
    found = space(Runtime(fuses=True))
    assert [v.name for v in found.variables] == ["h.0.q+k", "h.0.thin", "h.1.conv"]
    first = found.variables[0]
    assert sum(layer.nbytes(Keep()) for layer in first.members) == (64 * 64 + 32 * 64) * 2


def test_exclude_and_kinds_and_overrides():
    found = space(exclude=["h.1.*"], overrides=[{"match": "*.q", "bits": [8]}])
    names = {v.name: {str(s) for s in v.choices} for v in found.variables}
    assert "h.1.conv" not in names
    assert names["h.0.q"] == {"rtn-int8-channel", "rtn-int8-g32", "keep"}
    assert "rtn-int4-g32" in names["h.0.k"]
    assert space(kinds=["embedding"], schemes=["keep"]).variables[0].name == "embed"


def test_floats_where_the_grid_holds_them():
    found = space(
        methods=["rtn"], bits=[8], zero_points=["none"], group_size=["channel", 32, "48x128"],
        formats=["mxfp8", "fp8"], exclude=["*.thin"],
    )  # fmt: skip
    names = {str(scheme) for scheme in found.variables[0].choices}
    integers = {"rtn-int8-channel-sym", "rtn-int8-g32-sym"}
    assert names == {"rtn-fp8-b48x128", "rtn-fp8-channel", "rtn-fp8-g32", "rtn-mxfp8-g32"} | integers
    overridden = space(
        methods=["rtn"], bits=[8], zero_points=["none"], group_size=["channel"],
        overrides=[{"match": "*.q", "methods": ["rtn"], "bits": [4], "formats": ["fp4"], "zero_points": ["none"]}],
    )  # fmt: skip
    own = {variable.name: {str(scheme) for scheme in variable.choices} for variable in overridden.variables}
    assert {"rtn-fp4-channel", "rtn-fp4-g32"} < own["h.0.q"]
    assert own["h.0.k"] == {"rtn-int8-channel-sym"}


def test_uniform_takes_the_first_scheme_that_runs():
    found = space(schemes=["rtn-int8-channel"])
    preference = [parse_scheme("rtn-int4-g32"), parse_scheme("rtn-int8-channel")]
    uniform = found.uniform(preference, refusal("runtime", Runtime()))
    assert {name: str(s) for name, s in uniform.items()} == {
        "embed": "keep",
        "h.0.q": "rtn-int4-g32",
        "h.0.k": "rtn-int4-g32",
        "h.0.thin": "rtn-int8-channel",
        "h.1.conv": "rtn-int4-g32",
    }


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"schemes": ["rtn-int3-g32"]}, ["h.0.q", "(64, 64)", "runtime: only 4 and 8 bits have kernels"]),
        ({"schemes": ["rtn-int8-channel", "rtn-int3-g32"]}, ["schemes: rtn-int3-g32", "(64, 64)", "only 4 and 8 bits"]),
        ({"bits": [3, 8]}, ["bits: 3", "h.0.q", "only 4 and 8 bits"]),
        ({"bits": [4], "methods": ["rtn"]}, ["h.0.thin", "(64, 16)", "4 bits need at least 32 inputs", "exclude it"]),
        ({"group_size": [48, "channel"], "bits": [8]}, ["group_size: 48", "(64, 64)", "48"]),
        ({"group_size": ["128x128"], "methods": ["rtn"]}, ["the grid spans no scheme"]),
        (
            {"formats": ["mxfp6_e2m3"], "methods": ["rtn"], "zero_points": ["none"]},
            ["formats: mxfp6_e2m3 gives no scheme", "needs the method rtn, group_size 32, bits 6 and zero_points none"],
        ),
        ({"methods": ["keep"], "bits": [4]}, ["space.bits: 4 gives no scheme with the methods keep"]),
        ({"kinds": ["embedding"], "schemes": ["rtn-int8-channel"]}, ["embed", "(100, 64)", "embeddings stay"]),
    ],
)
def test_what_cannot_run_is_refused_with_layer_shape_and_rule(fields, parts):
    with pytest.raises(SchemeRefused) as caught:
        space(**fields)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_sparsity_is_an_axis_of_the_methods_that_prune():
    target = plugins.load("targets", "generic", Target)
    found = space(target, methods=["rtn", "wanda", "keep"], bits=[4], group_size=[16], sparsity=[24, "50"])
    assert {str(scheme) for scheme in found.variables[0].choices} == {
        "keep", "rtn-int4-g16", "wanda24", "wanda50", "wanda24-int4-g16", "wanda50-int4-g16",
    }  # fmt: skip
    with pytest.raises(SpecError, match=r"^space\.methods: wanda prunes, and space\.sparsity is not given; choose 24"):
        space(target, methods=["rtn", "wanda"])
    with pytest.raises(SchemeRefused, match=r"sparsity: 24 gives no scheme with the methods rtn"):
        space(target, methods=["rtn"], sparsity=[24])


def test_nothing_left_to_search_is_refused():
    with pytest.raises(SpecError, match="no layer is left"):
        space(exclude=["*"])
    with pytest.raises(SpecError, match="matches no searched layer"):
        space(overrides=[{"match": "nothing", "bits": [8]}])


def test_an_exclusion_of_nothing_is_a_mistake_and_one_of_what_is_kept_anyway_is_not():
    with pytest.raises(SpecError, match=r"^space\.exclude: 'lm_heed' matches no layer of the model$"):
        space(exclude=["h.1.*", "lm_heed"])
    assert space(exclude=["embed"]).variables == space().variables
