"""Parsers on broken inputs: each is read, or refused as documented; none takes long, writes, or asks anybody.

`rounds(short, long)`: some hundreds of each in every run, over a hundred thousand together on request.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autoq import bank, recipes, strict_yaml
from autoq.assignment import Assignment
from autoq.errors import AutoQError, BadInput, ExportBroken, ModelRefused, SpecError
from autoq.kv_cache import parse_key_value
from autoq.layer import Layer, ModelInfo
from autoq.methods import Grid
from autoq.models.conversion import open_weights
from autoq.recipes._gguf_header import read_header
from autoq.scheme import parse_scheme
from autoq.shipping import manifest as exported
from autoq.sparsity import parse_pattern
from autoq.spec import StudySpec, build_spec, parse_spec, shipped_specs
from autoq.spec_units import parse_bytes, parse_seconds
from autoq.targets import Target
from autoq.targets._described_device import parse_device
from autoq.targets._described_device import shipped as shipped_devices

FULL = """
name: full
model: {id: demo:smollm2, dtype: float32, transform: hadamard}
data: {source: python-docs, calibration_tokens: 64, search_tokens: 64, report_tokens: 128, window_tokens: 16, seed: 1}
tasks: {mine: {source: rows.jsonl, columns: {text: sentence}, search_examples: 8}}
target: {name: torch-cpu, batch_size: 1, prompt_tokens: 8, threads: 2}
space:
  methods: [rtn, hqq]
  bits: [3, 4]
  group_size: [64, channel, 64x64]
  zero_points: [none]
  sparsity: [24, 50]
  exclude: ["*.lm_head"]
  overrides: [{match: "*.down_proj", bits: [4, 8]}, {match: "*.q_proj", schemes: [rtn-int4-g64, keep]}]
  kv_cache: [8, 4]
objectives: [kl_nats_per_token, size_bytes, "accuracy:mine"]
constraints: {size_bytes: {max: 120MB}, kl_nats_per_token: {min: 0}}
sampler: {name: frontier, seed: 3, options: {n: 1, name: x}}
budget: {trials: 10, wall_time: 30m, stop_confidence: 0.9}
workers: {executor: ray, count: 2, cpus: 1, gpus: 0.5, address: auto}
bank: {disk: 1GB, memory: 1MB}
recipes: [a.json]
"""
SCHEMES = (
    "rtn-int4-g64", "gptq-int3-g64-sym", "rtn-int8-channel-sym-a8dyn", "kmeans4-channel", "nf4-g64", "hqq-int2-g32",
    "keep", "fp8", "wanda24-int4-g64", "gguf-q4_0", "gguf-q4_k-im", "rtn-int4-b64x64", "log4-g64", "mxfp4", "nvfp4",
    "awq-int4-g128",
)  # fmt: skip


@contextlib.contextmanager
def one_line(kind: type[Exception], most: int = 20_000) -> Iterator[None]:
    """It may be refused so, in one line that is no longer."""
    try:
        yield
    except kind as problem:
        text = str(problem)
        assert "\n" not in text
        assert len(text) < most


@pytest.fixture
def broken(mutations, request):
    """Inputs that depend on the test alone."""
    return mutations.Mutations(sum(request.node.nodeid.encode()))


def test_specs(broken, rounds, harmless):
    corpus = [FULL, *shipped_specs().values()]
    assert all(isinstance(parse_spec(text), StudySpec) for text in corpus[1:])
    for _ in range(rounds(400, 20_000)):
        text = broken.text(broken.random.choice(corpus))
        with harmless(text), one_line(SpecError, 5000):
            spec = parse_spec(text)
            assert build_spec(spec.model_dump(mode="json")) == spec


def test_spec_trees(broken, rounds, harmless):
    """As they come over HTTP."""
    tree = strict_yaml.parse(FULL, "it")
    assert build_spec(tree | {"constraints": {}}).name == "full"
    for _ in range(rounds(800, 25_000)):
        other = broken.tree(tree)
        with harmless(other), one_line(SpecError, 5000):
            try:
                build_spec(other if isinstance(other, dict) else {"model": other})
            except SpecError as problem:
                if problem.field is None:
                    raise AssertionError("which field it is") from problem
                raise


def test_schemes(broken, rounds, harmless):
    readers = (parse_scheme, parse_pattern, parse_key_value)
    for _ in range(rounds(2_000, 30_000)):
        text = broken.text(broken.random.choice(SCHEMES))
        with harmless(text):
            for read in readers:
                with one_line(BadInput):
                    found = read(text)
                    assert found is None or read(str(found)) == found


def test_units(broken, rounds, harmless):
    for _ in range(rounds(1_000, 15_000)):
        text = broken.text(broken.random.choice(("120MB", "1.5GiB", "30m", "2h", "10", "1e3")))
        value = text if broken.random.random() < 0.9 else broken.value()
        with harmless(value):
            for read in (parse_bytes, parse_seconds):
                with one_line(ValueError, 500):
                    read(value)


def test_assignments(broken, rounds, harmless):
    good = {f"model.layers.{i}.q_proj": scheme for i, scheme in enumerate(SCHEMES)}
    good |= {"model.layers.0.self_attn": "kv4", "model.layers.9.k_proj": "rtn-int4-g64#" + "a" * 40}
    for _ in range(rounds(600, 15_000)):
        text = broken.json(good)
        with harmless(text), one_line(BadInput, 20_000):
            found = Assignment.from_json(text)
            assert Assignment.from_json(found.json) == found


def test_manifests(broken, rounds, harmless, tmp_path):
    good = {
        "autoq": "0", "created": "", "study": "s", "trial": 1, "target": "gguf", "searched_on": "t", "runtime": "r",
        "written_as": "w", "run": "", "spec": {"model": {"id": "x"}}, "hash": "", "size_bytes": 1.0, "other_bytes": 0,
        "measurements": {"kl": {"value": 1.0, "stderr": None, "unit": "", "kind": "measured", "part": "report", "n": 1,
                                "device": "", "detail": {}}},
        "weights": ["model.gguf"], "report_tokens": "0" * 64, "versions": {"torch": "1"}, "noise": {"x": 1.0},
        "files": {"model.gguf": {"bytes": 1, "sha256": "0" * 64}},
    }  # fmt: skip
    file = tmp_path / "autoq.json"
    file.write_text(json.dumps(good))
    exported.read(tmp_path)
    for _ in range(rounds(400, 10_000)):
        text = broken.json(good)
        file.write_text(text, errors="replace")
        with harmless(text), one_line(ExportBroken):
            found = exported.read(tmp_path)
            exported.changed_files(tmp_path, found.files)
            for name in found.files:
                assert (tmp_path / name).resolve().is_relative_to(tmp_path)


def test_devices(broken, rounds, harmless):
    corpus = list(shipped_devices().values())
    for _ in range(rounds(150, 4_000)):
        text = broken.text(broken.random.choice(corpus))
        with harmless(text), one_line(AutoQError):
            parse_device(text)


class _Anything(Target):
    """Runs every scheme on every layer."""

    def grid(self):
        return Grid(("rtn",), (4,), (), ("integer",))

    def refuses(self, layer, scheme):
        return None


def _model() -> ModelInfo:
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    layers = [Layer(f"model.layers.{b}.{name}", "linear", 256, 256, 2, block=b) for b in range(2) for name in names]
    layers += [Layer("model.embed_tokens", "embedding", 300, 256, 2), Layer("lm_head", "head", 300, 256, 2)]
    return ModelInfo("LlamaForCausalLM", "causal", "bfloat16", 300, 128, tuple(layers), 1000)


RECIPES = {
    "list.txt": "blk\\.[01]\\.attn_q=q4_k\nattn_v=q8_0 ffn_down=q6_k\n^token_embd=q8_0",
    "gptq.json": json.dumps(
        {"bits": 4, "group_size": 64, "sym": True, "desc_act": False, "quant_method": "gptq", "lm_head": True,
         "dynamic": {"+:.*down_proj": {"bits": 8}, "-:.*q_proj": {}},
         "modules_in_block_to_quantize": [["mlp.down_proj"]]}
    ),
    "config.json": json.dumps(
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "ignore": ["lm_head"],
         "config_groups": {"group_0": {"targets": ["Linear", "re:.*q_proj"], "weights": {"num_bits": 4, "type": "int",
         "symmetric": True, "strategy": "group", "group_size": 64}, "input_activations": None}}}}
    ),
    "assignment.json": json.dumps({"model.layers.0.self_attn.q_proj": "rtn-int4-g64", "lm_head": "keep"}),
    "pick.yaml": "assignment:\n  model.layers.0.self_attn.q_proj: rtn-int4-g64\n  lm_head: keep\n",
}  # fmt: skip


def test_recipes(broken, rounds, harmless, tmp_path, monkeypatch):
    """Among them expressions that would take longer than anyone lives: their time is bounded."""
    from autoq.recipes import _files

    monkeypatch.setattr(_files, "MAX_MATCHING_SECONDS", 0.5)
    info, target = _model(), _Anything()
    for name, text in RECIPES.items():
        (tmp_path / name).write_text(text)
        assert recipes.read(str(tmp_path / name), info, target).assignment
    for _ in range(rounds(400, 10_000)):
        name = broken.random.choice(list(RECIPES))
        good = RECIPES[name]
        text = broken.json(json.loads(good)) if name.endswith(".json") else broken.text(good)
        file = tmp_path / name
        file.write_text(text, errors="replace")
        with harmless((name, text)), one_line(BadInput, 20_000):
            recipes.read(str(file), info, target)


def gguf() -> bytes:
    """A whole GGUF file with fields of several types and two tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.alignment") + struct.pack("<II", 4, 32),
        text("llama.block_count") + struct.pack("<II", 4, 2),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("b") + text("c"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<ff", 0, 1),
        text("x.flag") + struct.pack("<I?", 7, True),
        text("x.number") + struct.pack("<Id", 12, 1.5),
    ]
    tensors = [
        text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 4, 2, 0),
        text("output_norm.weight") + struct.pack("<IQIQ", 1, 8, 0, 96),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(fields) + b"".join(tensors)
    head += b"\0" * (-len(head) % 32)
    return head + b"\1" * 128


def test_gguf_headers(broken, rounds, harmless, tmp_path):
    good, file = gguf(), tmp_path / "x.gguf"
    file.write_bytes(good)
    assert [tensor.type for tensor in read_header(file).tensors] == ["q4_0", "f32"]
    for _ in range(rounds(600, 30_000)):
        content = broken.bytes(good)
        file.write_bytes(content)
        with harmless(content), one_line(BadInput, 500):
            read_header(file)


def _read_all(file: Path) -> int:
    """The bytes of all tensors of a file."""
    with open_weights("x", file) as opened:
        return sum(opened.get_tensor(name).nbytes for name in list(opened.keys()))


def safetensors_file() -> tuple[dict, bytes]:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    return header, b"\0" * 32


def _pack(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def test_safetensors(broken, rounds, harmless, tmp_path):
    """Files of weights, and entries of the bank: headers that lie about lengths, types, shapes and places."""
    header, data = safetensors_file()
    file = tmp_path / "x.safetensors"
    scheme = parse_scheme("rtn-int8-channel-sym")
    for _ in range(rounds(1_500, 30_000)):
        how = broken.random.randrange(3)
        told = json.dumps(header if how == 0 else broken.tree(header)).encode("utf-8", "replace")
        lengths = (0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(told) - 1, len(told) + 1, len(told) + len(data))
        content = _pack(told, data, broken.random.choice(lengths) if broken.random.random() < 0.2 else None)
        content = broken.bytes(content) if how == 0 else content
        file.write_bytes(content)
        with harmless(content):
            with one_line(ModelRefused), open_weights("x", file) as opened:
                for name in list(opened.keys()):
                    assert opened.get_tensor(name).nbytes <= len(content)
            with one_line(AutoQError):
                bank.unpack(content, scheme, (2, 3), "0" * 40)
                raise AssertionError("nothing broken has this digest")


ENTRY = '"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}'


@pytest.mark.parametrize(
    "entries",
    [
        ENTRY + ', "a": {"dtype": "F32", "shape": [1], "data_offsets": [24, 28]}',
        ENTRY + ', "b": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}',
        ENTRY + ', "b": {"dtype": "F32", "shape": [3], "data_offsets": [16, 28]}',
        '"a": {"dtype": "F64", "shape": [2, 3], "data_offsets": [0, 24]}',
        '"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]}',
        '"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]}',
        '"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 24]}',
        '"a": {"dtype": "F32", "shape": [9223372036854775807, 2], "data_offsets": [0, 24]}',
        '"a": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}',
        '"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 99999999999]}',
        '"a": {"dtype": "OBJECT", "shape": [2, 3], "data_offsets": [0, 24]}',
    ],
)  # fmt: skip
def test_safetensors_that_lie(tmp_path, entries):
    """Keys that stand twice, tensors over each other, types and shapes that need other bytes, places past the end."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(_pack(f"{{{entries}}}".encode(), b"\0" * 32))
    with pytest.raises(ModelRefused, match="not a whole safetensors file"):
        _read_all(file)


def test_a_header_of_a_terabyte_is_not_read(tmp_path):
    file = tmp_path / "x.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", 1 << 39))
        opened.truncate(1 << 40)  # it takes no room
    with pytest.raises(ModelRefused), open_weights("x", file):
        pass


def test_what_the_bank_reads_is_what_it_wrote_or_nothing(broken, rounds, harmless, tmp_path):
    """An entry with a byte changed is made again."""
    weight = torch.arange(64, dtype=torch.float32).view(4, 16)
    scheme = parse_scheme("rtn-int8-channel-sym")
    kept = bank.Bank(tmp_path / "bank", 10**8, 0)
    made = kept.quantized(weight, bank.weight_hash(weight), scheme)
    (entry,) = Path(tmp_path / "bank").rglob("*.safetensors")
    good = entry.read_bytes()
    for number in range(rounds(200, 3_000)):
        content = broken.bytes(good)
        entry.write_bytes(content)
        found = kept.quantized(weight, bank.weight_hash(weight), scheme)
        assert torch.equal(found.dequantize(torch.float32), made.dequantize(torch.float32)), number
        with harmless(content), one_line(AutoQError):
            assert bank.unpack(content, scheme, (4, 16), bank.digest(made)) is not None
