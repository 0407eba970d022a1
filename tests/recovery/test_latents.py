"""What is trained of a layer: where it starts, its gradients against autograd, and that it writes what ships."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.methods._uniform import encode
from autoq.methods._weights import CodebookWeight, IntegerWeight
from autoq.methods.kmeans import KMeans
from autoq.methods.rtn import RoundToNearest
from autoq.recovery.latents import EPSILON, IntegerLatent, latent
from autoq.scheme import parse_scheme
from autoq.trained import trainable

INTEGER = [
    *("rtn-int3-g4", "rtn-int3-g4-sym", "rtn-int2-channel", "rtn-int8-channel-sym", "rtn-int4-tensor"),
    *("rtn-int4-tensor-sym", "hqq-int3-g4-rz", "hqq-int4-channel-rz"),
]
CODEBOOK = ["kmeans2-g8", "kmeans3-channel", "kmeans4-tensor"]
RATES = {"weights": 0.05, "scales": 0.02}
WEIGHTS = {
    "plain": lambda: torch.randn(6, 16, generator=torch.Generator().manual_seed(1)),
    "zero": lambda: torch.zeros(6, 16),
    "outlier": lambda: torch.zeros(6, 16).index_fill(1, torch.tensor([3]), 100.0),
    "tiny": lambda: 1e-38 * torch.randn(6, 16, generator=torch.Generator().manual_seed(1)),
    "huge": lambda: 1e37 * torch.randn(6, 16, generator=torch.Generator().manual_seed(1)),
}


def made(text, weight):
    """The layer of a method, or for a real zero point one whose codes are not the nearest."""
    scheme = parse_scheme(text)
    if scheme.method == "kmeans":
        return KMeans().quantize(weight, scheme)
    if scheme.method == "rtn":
        return RoundToNearest().quantize(weight, scheme)
    groups = weight.shape[1] // 4 if "g4" in text else 1
    scale = torch.full((len(weight), groups), 0.25)
    zero = torch.full_like(scale, 2.5)
    codes = encode(weight.view(len(weight), groups, -1), scale[..., None], zero[..., None], scheme.bits)
    codes[0, 0, 0] = (codes[0, 0, 0] + 2) % (2**scheme.bits)  # as a method chooses that looks at more than the weight
    return IntegerWeight.of(scheme, codes.to(torch.uint8).view(weight.shape), scale, zero)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("text", [*INTEGER, *CODEBOOK])
def test_training_begins_at_the_very_layer_that_was_measured(text, kind):
    weight = WEIGHTS[kind]()
    start = made(text, weight)
    found = latent(start, weight).quantized()
    assert found.tensors.keys() == start.tensors.keys()
    for name, tensor in start.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("text", [*INTEGER, *CODEBOOK])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_what_training_sees_is_what_ships_bit_for_bit(text, kind, dtype):
    weight = WEIGHTS[kind]()
    each = latent(made(text, weight), weight)
    generator = torch.Generator().manual_seed(0)
    seen = torch.empty(weight.shape, dtype=dtype)
    for count in range(1, 6):
        each.learn(torch.randn(weight.shape, generator=generator), count, RATES)
        each.write(seen)
        shipped = each.quantized()
        assert torch.equal(seen, shipped.dequantize(dtype))
    assert shipped.scheme == parse_scheme(text)
    assert shipped.nbytes == shipped.scheme.nbytes(*weight.shape, 4)
    assert all(t.isfinite().all() for _, t in each.state())


class Round(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(context, x):
        return x.round()

    @staticmethod
    def backward(context, slope):
        return slope


def by_autograd(each, gradient):
    """∂/∂v, ∂/∂t, ∂/∂z of <gradient, ŵ>, by autograd through clamp and a rounding that passes through."""
    v, t, z = (x.clone().double().requires_grad_() for x in (each.v, each.t, each.z))
    first = each.first.double()
    gradient = gradient.double().view_as(v) / first[..., None]  # s₀ is a constant factor, which is left out
    shipped_scale, shipped_zero = each.scales().double(), each.zeros().double()
    s, zero = first * t.exp(), z
    s = s + (shipped_scale - s).detach()
    zero = zero + (shipped_zero - zero).detach()
    u = (v * first[..., None]) / s[..., None] + zero[..., None]
    inside = (u.detach().round() >= 0) & (u.detach().round() <= each.top)
    q = torch.where(inside, Round.apply(u), u.detach().round().clamp(0, each.top))
    w = (q - zero[..., None]) * s[..., None]
    (w * gradient).sum().backward()
    # `s` depends on t with the derivative of the scale before rounding, which is the shipped one but for 2^-9.
    return v.grad, t.grad, z.grad


@pytest.mark.parametrize("text", INTEGER)
def test_gradients_are_those_of_autograd(text):
    weight = 2 * WEIGHTS["plain"]()
    each = latent(made(text, weight), weight)
    assert isinstance(each, IntegerLatent)
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 4):  # away from the start, where nothing lies outside
        each.learn(torch.randn(weight.shape, generator=generator), count, {"weights": 0.3, "scales": 0.2})
    gradient = torch.randn(weight.shape, generator=generator)
    wanted = dict(zip("vtz", by_autograd(each, gradient), strict=True))
    before = {name: each.moments[name].mean.clone() for name in each.parameters}
    each.learn(gradient, 4, {"weights": 0.0, "scales": 0.0})
    for name in each.parameters:
        found = (each.moments[name].mean - 0.9 * before[name]) / 0.1
        torch.testing.assert_close(found.double(), wanted[name], rtol=1e-2 if name == "t" else 1e-4, atol=1e-4)


def test_a_step_worked_out_by_hand():
    """Two bits, one group: codes 0 … 3, zero 0, scale 1; the second weight is beyond the last code."""
    scheme = parse_scheme("hqq-int2-channel-rz")
    start = IntegerWeight.of(scheme, torch.tensor([[1, 3]], dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1))
    each = latent(start, torch.tensor([[1.25, 7.0]]))
    assert each.v.view(-1).tolist() == pytest.approx([1.25, 3.499])
    each.v[0, 0, 1] = 4.0  # clipped
    gradient = torch.tensor([[2.0, 10.0]])
    # Adam's first step has length one: only signs are left.
    each.learn(gradient, 1, {"weights": 0.5, "scales": 0.25})
    # w: -1 inside, nothing outside; t: 2 (1 - 1.25) + 10 * 3 > 0; z: -10 < 0
    assert each.v.view(-1).tolist() == pytest.approx([0.75, 4.0])
    assert each.t.item() == pytest.approx(-0.25)
    assert each.z.item() == pytest.approx(0.5)
    assert each.moments["t"].mean.item() == pytest.approx(0.1 * 29.5)
    assert each.moments["z"].mean.item() == pytest.approx(0.1 * -10)


@pytest.mark.parametrize("text", CODEBOOK)
def test_centroids_go_where_their_weights_pull_and_stay_in_order(text):
    weight = WEIGHTS["plain"]()
    start = made(text, weight)
    each = latent(start, weight)
    target = weight + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))

    def error():
        return float((each.quantized().dequantize() - target).square().sum())

    before = error()
    for count in range(1, 60):
        each.learn(each.quantized().dequantize() - target, count, {"weights": 0.02, "scales": 0.0})
    assert error() < before
    found = each.quantized()
    assert isinstance(found, CodebookWeight)
    assert (found.tensors["codebook"].float().diff(dim=-1) >= 0).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from(INTEGER))
def test_training_towards_any_weight_lowers_the_error(seed, text):
    """A quadratic around another weight: what rounding to nearest loses is not made worse."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 16, generator=generator)
    target = weight + 0.5 * torch.randn(weight.shape, generator=generator)
    each = latent(made(text, weight), weight)
    seen = torch.empty_like(weight)
    each.write(seen)
    before = float((seen - target).square().sum())
    for count in range(1, 80):
        each.learn(seen - target, count, {"weights": 0.03, "scales": 0.005})
        each.write(seen)
    assert float((seen - target).square().sum()) < before


def test_adam_is_torchs():
    weight = WEIGHTS["plain"]()
    each = latent(made("kmeans3-channel", weight), weight)
    reference = torch.zeros_like(each.x, requires_grad=True)
    adam = torch.optim.Adam([reference], lr=0.01, betas=(0.9, 0.99), eps=EPSILON)
    for count in range(1, 6):
        gradient = torch.randn(each.x.shape, generator=torch.Generator().manual_seed(count))
        reference.grad = gradient.clone()
        adam.step()
        each.x -= each.moments["x"].step(gradient, count).mul_(0.01)
    torch.testing.assert_close(each.x, reference.detach())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, False) for text in ("keep", "rtn-fp8-channel", "gguf-q4_k", "awq-int4-g64", "nf4-g64")),
        *((text, True) for text in ("rtn-int3-g64", "gptq-int4-g64-sym", "kmeans4-channel", "wkmeans4-channel")),
    ],
)
def test_other_schemes_stay(text, expected):
    assert trainable(parse_scheme(text)) is expected
