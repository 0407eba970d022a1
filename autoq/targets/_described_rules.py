"""What a described device runs, and what it takes: kernels by rule, milliseconds by a roofline. No torch.

The roofline (S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model
for multicore architectures", CACM 52(4), 2009): a kernel takes at least as long as its operations at the
peak rate and at least as long as its bytes at the peak bandwidth,

    t = max(operations / rate[format], bytes / bandwidth) + launch

so what comes out is the best that the device could do, and the order of assignments is worth more than
the milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoq.energy import work
from autoq.energy.work import DTYPE_FORMATS, ComputeFormat, Phase, Work
from autoq.errors import SpecError
from autoq.layer import Layer, ModelInfo
from autoq.scheme import (
    Codebook,
    Float,
    Gguf,
    Integer,
    Keep,
    Levels,
    PerGroup,
    Scheme,
    Sparse,
    kernel_activation,
    parse_scheme,
)
from autoq.spec import TargetSpec
from autoq.targets import UNQUANTIZED, CostTable
from autoq.targets._described_device import Device, KernelRule


def _weights(scheme: Integer | Levels | Codebook | Float) -> str:
    if isinstance(scheme, Float):
        return scheme.format
    if isinstance(scheme, Levels):
        return f"{scheme.method}{scheme.bits}"
    return f"{'int' if isinstance(scheme, Integer) else 'codebook'}{scheme.bits}"


def _granularity(scheme: Integer | Levels | Codebook | Float) -> int | str:
    if isinstance(scheme.granularity, PerGroup):
        return scheme.granularity.size
    return str(scheme.granularity).removeprefix("b")  # of a block, as a spec writes it


def rule_for(device: Device, layer: Layer, scheme: Scheme) -> KernelRule | str:
    """The kernel that runs `scheme` on `layer`, or the reason (one clause) why none does. Not for `keep`."""
    assert not isinstance(scheme, Keep)
    if isinstance(scheme, Gguf):
        return "a GGUF type belongs to the target llama-cpp"
    if isinstance(scheme, Integer) and scheme.ships_input_scales:
        return f"{device.name} has no kernels that divide a layer's input by scales, as {scheme.method} needs"
    if isinstance(scheme, Sparse):
        return f"{device.name} says nothing of pruned weights"
    weights = _weights(scheme)
    same = [rule for rule in device.kernels if rule.weights == weights]
    if not same:
        known = ", ".join(dict.fromkeys(rule.weights for rule in device.kernels))
        return f"{device.name} runs weights in {known}, not {weights}"
    activation = kernel_activation(scheme) or "none"
    fitting = [rule for rule in same if activation in rule.activations]
    if not fitting:
        known = ", ".join(dict.fromkeys(a for rule in same for a in rule.activations))
        return f"{device.name} runs {weights} weights with activations {known}, not {activation}"
    # A tied head is looked up too.
    places = {layer.kind, "embedding"} if layer.tied else {layer.kind}
    rule = next((rule for rule in fitting if places <= set(rule.layers)), None)
    if rule is None:
        return f"{device.name} has no {weights} kernel with activations {activation} for {' and '.join(sorted(places))}"
    return _misfit(device, rule, layer, scheme) or rule


def _misfit(device: Device, rule: KernelRule, layer: Layer, scheme: Integer | Levels | Codebook | Float) -> str | None:
    shape = f"shape ({layer.out_features}, {layer.in_features})"
    size = _granularity(scheme)
    # Block formats of floats carry their own granularity.
    own = isinstance(scheme, Float) and scheme.form.group is not None
    if size not in rule.group_sizes and not own:
        known = ", ".join(map(str, rule.group_sizes))
        return f"{device.name} runs {rule.weights} weights by group size {known}, not {size}"
    if isinstance(size, int) and layer.in_features % size:
        return f"group size {size} does not divide the {layer.in_features} inputs of {shape}"
    if isinstance(scheme, Integer) and scheme.zero not in rule.zero_points:
        known = ", ".join(rule.zero_points)
        return f"{device.name} runs {rule.weights} weights with zero points {known}, not {scheme.zero}"
    if layer.in_features % rule.in_multiple:
        return f"{device.name} needs inputs in multiples of {rule.in_multiple}, and the layer has {shape}"
    if layer.out_features % rule.out_multiple:
        return f"{device.name} needs outputs in multiples of {rule.out_multiple}, and the layer has {shape}"
    return None


def computes(device: Device, layer: Layer, scheme: Scheme, dtype: str) -> ComputeFormat:
    """What `layer` is multiplied in under `scheme`, which must run on the device."""
    if isinstance(scheme, Keep):
        return DTYPE_FORMATS[dtype]
    rule = rule_for(device, layer, scheme)
    assert isinstance(rule, KernelRule), rule
    return rule.computes or DTYPE_FORMATS[dtype]


def seconds(device: Device, share: Work, computed: ComputeFormat, launches: float = 1) -> float:
    """The roofline of some work; 0 for none."""
    if not share:
        return 0.0
    arithmetic = share.operations / device.arithmetic[computed].operations_per_second.value
    memory = share.moved / device.memory.bandwidth_bytes_per_second.value
    return max(arithmetic, memory) + launches * device.launch.seconds.value


def layer_seconds(
    device: Device, info: ModelInfo, layer: Layer, scheme: Scheme, phase: Phase, workload: TargetSpec
) -> float:
    """One layer's share of one pass."""
    share = work.layer_work(info, layer, scheme, phase, workload)
    launches = work.runs(info, layer, phase, workload)
    return seconds(device, share, computes(device, layer, scheme, info.dtype), launches)


def other_seconds(device: Device, info: ModelInfo, phase: Phase, workload: TargetSpec) -> float:
    """What one pass takes beside its layers: attention with its cache, norms and what else is read."""
    blocks = sum(1 for _ in work.active(info, phase))
    launches = blocks * device.launch.others_per_block.value
    return seconds(device, work.other_work(info, phase, workload), DTYPE_FORMATS[info.dtype], launches)


def cost_table(
    device: Device, title: str, info: ModelInfo, choices: Mapping[str, Sequence[str]], workload: TargetSpec
) -> CostTable:
    """The table of predictions; layers that `choices` does not name are in the base, kept.

    Raises `SpecError` where not even the smallest of the choices fits the device's memory.
    """
    layers = {layer.name: layer for layer in info.layers}
    options = {
        name: [parse_scheme(text) for text in dict.fromkeys(["keep", *choices.get(name, ())])] for name in layers
    }
    least = sum(min(layer.nbytes(s) for s in options[name]) for name, layer in layers.items())
    least += info.other_bytes + work.cache_bytes(info, workload)
    capacity = device.memory.capacity_bytes.value
    if least > capacity:
        raise SpecError(
            f"target.device: {device.name} has {capacity} bytes of memory, and the smallest choice of every layer "
            f"with keys and values for {workload.batch_size} × {workload.prompt_tokens} tokens needs {least}"
        )
    base_ms: dict[str, float] = {}
    layer_ms: dict[str, dict[str, dict[str, float]]] = {}
    unquantized: dict[str, float] = {}
    for phase in work.phases(info):
        table = {
            name: {str(s): 1e3 * layer_seconds(device, info, layers[name], s, phase, workload) for s in schemes}
            for name, schemes in options.items()
        }
        rest = sum(table[name]["keep"] for name in layers if name not in choices)
        base_ms[phase] = 1e3 * other_seconds(device, info, phase, workload) + rest
        layer_ms[phase] = {name: table[name] for name in layers if name in choices}
        unquantized[phase] = base_ms[phase] + sum(costs["keep"] for costs in layer_ms[phase].values())
    detail = {
        "description": title,
        "batch_size": workload.batch_size,
        "prompt_tokens": workload.prompt_tokens,
        "cache_bytes": work.cache_bytes(info, workload),
        "capacity_bytes": capacity,
        UNQUANTIZED: unquantized,
    }
    return CostTable(title, base_ms, layer_ms, detail)
