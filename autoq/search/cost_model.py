"""What a study costs before it is run: how time, memory, database, bank and network grow, and with what.

A model of arithmetic, not of machines: every figure is a product of the study's counts and a rate that is named in
`Rates`. What comes out is a prediction, and its assumptions are printed beside it. A test holds the parts that can be
measured here (bytes of a database, seconds of simulated trials) against a small study.

    symbol      grows with
    P           weights of the searched layers           bank, statistics, loading, a trial's reading
    A           all weights that a token multiplies       a forward pass: 2 A floating-point operations a token
    L, C        searched layers, choices of each          assignments, sampler, tables, statistics
    T           search tokens                             a trial, its values in the database, a result on the wire
    N           trials                                    database, controller's memory
    W           workers                                   trials an hour, until the controller is full
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A decoder's shapes: `layers` are (outputs, inputs) of the searched linears, `head` weights of the head, which
    runs and is not searched; `stored` bytes of the whole checkpoint, 16 bits a weight."""

    name: str
    layers: tuple[tuple[int, int], ...]
    head: int
    stored: int

    @classmethod
    def llama(
        cls, name: str, blocks: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
    ) -> Model:
        """Of a Llama: q, k, v, o, gate, up and down in every block."""
        narrow = hidden // heads * kv_heads
        attention = ((hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden))
        block = (*attention, (inner, hidden), (inner, hidden), (hidden, inner))
        layers = block * blocks
        head = hidden * vocabulary
        norms = hidden * (2 * blocks + 1)
        stored = 2 * (sum(math.prod(shape) for shape in layers) + head * (1 if tied else 2) + norms)
        return cls(name, layers, head, stored)

    @property
    def searched(self) -> int:
        """P: weights of the searched layers."""
        return sum(math.prod(shape) for shape in self.layers)

    @property
    def active(self) -> int:
        """A: weights that every token multiplies."""
        return self.searched + self.head


SMOLLM2 = Model.llama("SmolLM2-135M", 30, 576, 1536, 9, 3, 49152, True)
LLAMA_8B = Model.llama("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128256, False)
LLAMA_70B = Model.llama("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128256, False)


@dataclass(frozen=True)
class Rates:
    """What machines do. `origin` says where each figure comes from."""

    name: str
    flops: float  # a worker's sustained operations a second in a forward pass
    device_bytes: float  # a worker's memory for weights
    read: float  # bytes a second that a worker reads quantized layers at, from the node's page cache or disk
    network: float  # bytes a second between nodes
    origin: str


TWO_CORES = Rates(
    "2 cores", 0.5e12, 8e9, 2e9, 1e9 / 8,
    "the demo: 1.11 s for a pass of 2,048 tokens, 2 A T operations, two threads with AVX-512 BF16",
)  # fmt: skip
ONE_H100 = Rates(
    "H100 80 GB", 0.4 * 989e12, 80e9, 10e9, 25e9,
    "data sheet: 989e12 dense BF16 operations a second, of which 40 % assumed; 10 GB/s from page cache over PCIe and "
    "200 Gbit/s between nodes assumed; no GPU has measured any of it",
)  # fmt: skip


@dataclass(frozen=True)
class Software:
    """What AutoQ itself takes; measured on SQLite and SmolLM2's 210 layers, see benchmarks/LOG.md."""

    calibration_passes: float = 5.2  # forward passes' worth for all statistics
    quantize_flops: float = 5.4e9  # gptq, one thread: 32 s for 2 Σ out in² = 1.7e11 operations
    slopes_passes: float = 3.5  # forward passes' worth of a trial with slopes, beyond its own
    slopes_trials: int = 16
    row_bytes: float = 1050.0  # a trial without what follows: rows, hashes, indexes
    value_bytes: float = 2.25  # a token's value: 14.5 bits, and pages round up
    layer_bytes: float = 3.6  # a layer's choice in a stored assignment, compressed
    wire_bytes: float = 60.0  # a layer's choice as it is sent to a worker
    controller_seconds: float = 0.8e-3  # a result in a group, as many workers have them, without what grows with layers
    controller_layer_seconds: float = 0.5e-5  # a result and layer
    frontier_seconds: float = 3.0e-4  # a proposal of `frontier` and layer, after 10,000 trials
    trial_memory: float = 3500.0  # of the controller, without choices
    controller_memory: float = 500e6  # before the first trial


@dataclass(frozen=True)
class Study:
    """What is asked for. `bits` are those of the choices; `given_up` is the share of tokens that stopping saves."""

    model: Model
    bits: Sequence[float]
    trials: int
    tokens: int = 2048
    calibration_tokens: int = 4096
    report_tokens: int = 16384
    report_points: int = 24
    given_up: float = 0.0


def forward_seconds(model: Model, tokens: float, rates: Rates) -> float:
    """One pass: two operations for every weight and token. Attention's own, below 2 % at 2,048 tokens, is left out."""
    return 2 * model.active * tokens / rates.flops


def bank_bytes(study: Study) -> float:
    """Every searched layer under every choice, once per node: codes, and 5 % for scales and zero points."""
    return study.model.searched * sum(study.bits) / 8 * 1.05


def statistics_bytes(study: Study) -> float:
    """Second moments of every layer's inputs, float32, where it has at most 16,384 of them; shared by q, k and v,
    and by gate and up, in computation but not in storage."""
    return float(sum(4 * inputs**2 for _, inputs in study.model.layers if inputs <= 16384))


def quantize_operations(study: Study) -> float:
    """gptq passes what rounding an input loses on to all later ones, row by row: out · in² products a layer and choice.

    A layer of more than 16,384 inputs has no second moments and goes by a method that needs none; it is counted alike.
    """
    return len(study.bits) * 2.0 * sum(outputs * inputs**2 for outputs, inputs in study.model.layers)


def trial_seconds(study: Study, rates: Rates) -> float:
    """A pass over the tokens that are not given up, and reading an assignment's layers if they are not in memory."""
    mean_bits = sum(study.bits) / len(study.bits)
    reading = 0.0 if bank_in_memory(study, rates) else study.model.searched * mean_bits / 8 / rates.read
    return forward_seconds(study.model, study.tokens * (1 - study.given_up), rates) + reading


def bank_in_memory(study: Study, rates: Rates) -> bool:
    """Whether a worker holds the model and every choice dequantized: then an assignment is a swap of pointers."""
    return study.model.stored + 2 * study.model.searched * len(study.bits) <= rates.device_bytes


def devices_per_worker(study: Study, rates: Rates) -> int:
    """Devices that hold the model once and half as much again for an assignment's weights and activations."""
    return math.ceil(1.5 * study.model.stored / rates.device_bytes)


def database_bytes(study: Study, software: Software) -> float:
    """Rows, values per token and assignments of all trials."""
    layers = len(study.model.layers)
    values = software.value_bytes * study.tokens * (1 - study.given_up)
    return study.trials * (software.row_bytes + values + software.layer_bytes * layers)


def controller_seconds(study: Study, software: Software, sampler: str = "random") -> float:
    """Of a result: store, sampler and bookkeeping."""
    layers = len(study.model.layers)
    asking = software.frontier_seconds * layers if sampler == "frontier" else 0.0
    return software.controller_seconds + software.controller_layer_seconds * layers + asking


def controller_memory(study: Study, software: Software) -> float:
    """Bytes of the controller's process after the last trial."""
    return software.controller_memory + study.trials * (software.trial_memory + len(study.model.layers))


def wire_bytes(study: Study, software: Software) -> float:
    """Bytes of one trial to a worker and back: the assignment, the rival's values per token, its own."""
    return len(study.model.layers) * software.wire_bytes + 2 * 4 * study.tokens


def plan(
    study: Study, rates: Rates, software: Software, nodes: int, devices: int, cores: int = 16
) -> list[tuple[str, str, str]]:
    """Rows (what, predicted, how) of a study on `nodes` of `devices` each, `cores` of a node quantizing."""
    model = study.model
    per_worker = devices_per_worker(study, rates)
    workers = nodes * devices // per_worker
    if not workers:
        raise ValueError(
            f"{model.name} needs {per_worker} devices of {rates.name} a worker; there are {nodes * devices}"
        )
    spread = f", {per_worker} devices each" if per_worker > 1 else ""
    each = trial_seconds(study, rates)
    slopes = software.slopes_trials * software.slopes_passes * forward_seconds(model, study.tokens, rates)
    asking = controller_seconds(study, software, "frontier")
    made, taken = workers / each, 1 / asking
    search = study.trials / min(made, taken) + slopes / workers
    loading = model.stored / rates.read
    calibrating = software.calibration_passes * forward_seconds(model, study.calibration_tokens, rates)
    quantizing = quantize_operations(study) / (software.quantize_flops * nodes * cores)
    reporting = study.report_points * forward_seconds(model, study.report_tokens, rates) / workers
    bank = bank_bytes(study)
    moving = (bank * (nodes - 1) + model.stored * (nodes - 1)) / rates.network
    whole = loading + calibrating + quantizing + moving + search + reporting
    return [
        ("workers", f"{workers}{spread}", "1.5 times the checkpoint fits a worker's devices"),
        ("loading the model", _time(loading), "checkpoint bytes / read"),
        (
            "calibration",
            _time(calibrating),
            f"{software.calibration_passes} passes of {study.calibration_tokens} tokens",
        ),
        ("quantizing all choices once", _time(quantizing), f"C · 2 Σ out · in² by gptq on {cores} cores a node"),
        ("weights and bank to the other nodes", _time(moving), "(checkpoint + bank) · (nodes - 1) / network"),
        ("a trial", _time(each), "2 A T / flops" + ("" if bank_in_memory(study, rates) else " + layers / read")),
        ("trials an hour that the workers make", f"{3600 * made:,.0f}", "workers / trial"),
        ("trials an hour that the controller takes", f"{3600 * taken:,.0f}", "sampler frontier after 10,000 trials"),
        ("search", _time(search), f"{study.trials:,} trials at the smaller of the two, and slopes"),
        ("report", _time(reporting), f"{study.report_points} points of {study.report_tokens:,} tokens"),
        ("all of it", _time(whole), f"{nodes * devices * whole / 3600:,.1f} device-hours"),
        ("bank, each node", _bytes(bank), "P · Σ bits / 8 · 1.05"),
        ("statistics, each node", _bytes(statistics_bytes(study)), "4 · Σ inputs²"),
        ("database", _bytes(database_bytes(study, software)), "rows, values per token, assignments"),
        ("controller's memory", _bytes(controller_memory(study, software)), "N · (trial + L)"),
        ("network, a trial", _bytes(wire_bytes(study, software)), "assignment, rival's and own values"),
    ]


def growth(software: Software) -> list[tuple[str, ...]]:
    """How figures grow when one count does: rows (what, base, and each count ten-fold)."""
    base = Study(SMOLLM2, (2, 3, 4, 5, 6, 8), 10_000)
    deep = Model("ten times the layers", SMOLLM2.layers * 10, SMOLLM2.head, SMOLLM2.stored * 10)
    cases = [
        base,
        Study(deep, base.bits, base.trials),
        Study(base.model, tuple(base.bits) * 10, base.trials),
        Study(base.model, base.bits, base.trials * 10),
        Study(base.model, base.bits, base.trials, tokens=base.tokens * 10),
    ]
    return [
        ("a trial, 2 cores", *(_time(trial_seconds(case, TWO_CORES)) for case in cases)),
        ("controller, a result", *(_time(controller_seconds(case, software)) for case in cases)),
        ("the same, `frontier`", *(_time(controller_seconds(case, software, "frontier")) for case in cases)),
        ("database", *(_bytes(database_bytes(case, software)) for case in cases)),
        ("controller's memory", *(_bytes(controller_memory(case, software)) for case in cases)),
        ("bank", *(_bytes(bank_bytes(case)) for case in cases)),
        ("network, a trial", *(_bytes(wire_bytes(case, software)) for case in cases)),
    ]


def _time(seconds: float) -> str:
    for limit, unit, name in ((1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"
