"""llama.cpp's recipes: lists of tensor types, and the types in a GGUF file written by gguf's own library."""

import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest

from autoq.layer import Layer
from autoq.recipes import RecipeRefused, _gguf_header
from autoq.recipes._gguf_header import read_header
from autoq.scheme import GGUF_TYPES
from autoq.targets._gguf_names import layer_tensors

from .conftest import Anything, llama

TENSORS = layer_tensors("LlamaForCausalLM", llama().layers)
Q = "model.layers.0.self_attn.q_proj"
SHORTER = replace(llama(), layers=(replace(llama().layers[0], out_features=10), *llama().layers[1:]))


def file(path, types, info=None, architecture="llama", imatrix=False, extra=(), fields=()):
    """A GGUF file with the model's tensors: `types` gives a tensor's type by its name, else Q8_0."""
    info = info or llama()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "d" * 300])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0])
    writer.add_string("tokenizer.chat_template", "x" * 70_000)
    for name, value in fields:
        writer.add_uint16(name, value)
    if imatrix:
        writer.add_string("quantize.imatrix.file", "imatrix.gguf")
    for layer, tensor in layer_tensors(info.architecture, info.layers).items():
        if tensor not in types.get("without", ()):
            shape = info.layer(layer)
            add(writer, tensor, types.get(tensor, "Q8_0"), (shape.out_features, shape.in_features))
    for tensor, kind, shape in [("output_norm.weight", "F32", (256,)), *extra]:
        add(writer, tensor, kind, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, name, kind, shape):
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    data = np.zeros((*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
    writer.add_tensor(name, data, raw_dtype=number)


def test_a_list_is_searched_for_and_the_first_that_fits_decides(recipe):
    found = recipe(
        "types.txt", "attn_v=q8_0\nBLK\\.0\\.ffn_(up|gate)=Q4_K  blk\\.\\d+\\.ffn=iq4_nl\nattn_v=q4_0 ^output=q6_k"
    )
    for name, tensor in TENSORS.items():
        if tensor.endswith("attn_v.weight"):
            assert found[name] == "gguf-q8_0"
        elif tensor in ("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"):
            assert found[name] == "gguf-q4_k"
        elif "ffn" in tensor:
            assert found[name] == "gguf-iq4_nl"
        elif tensor == "output.weight":
            assert found[name] == "gguf-q6_k"
        else:
            assert name not in found


def test_expressions_are_lowered_as_llama_quantize_lowers_them(recipe):
    # \D has become \d, so the rule is about numbers.
    assert set(recipe("t", r"blk\.\D\.attn_Q=q8_0")) == {name for name, t in TENSORS.items() if "attn_q." in t}
    assert set(recipe("t", "blk.[[:digit:]].attn_q=q8_0")) == {name for name, t in TENSORS.items() if "attn_q." in t}


def test_the_model_s_own_numbers_are_kept(recipe):
    assert recipe("t", "attn_q=bf16 attn_k=f16") == {
        name: "gguf-f16" for name, t in TENSORS.items() if t.endswith("attn_k.weight")
    }
    assert recipe("t", "attn_q=f32", llama(dtype="float32")) == {}


def test_a_type_that_needs_an_importance_matrix_gets_one(recipe):
    target = Anything(lambda layer, scheme: None if scheme.importance else "needs an importance matrix")
    assert recipe("t", r"blk\.0\.attn_q=q4_0", target=target) == {Q: "gguf-q4_0-im"}


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (
            "attn_q=q4_k_m",
            "'attn_q=q4_k_m': type 'q4_k_m' has no scheme here for a model in bfloat16; choose from bf16",
        ),
        ("attn_q=f32", "type 'f32' has no scheme here for a model in bfloat16"),
        ("attn_q=q8_0 attn_k", "'attn_k' is not of the form expression=type, such as attn_v=q8_0"),
        ("attn_q=", "'attn_q=' is not of the form"),
        ("attn_q=q8_0 ssm_out=q8_0", "'ssm_out=q8_0' fits no tensor of the model's layers, such as token_embd.weight"),
        ("attn_(q=q8_0", "the pattern 'attn_(q' is not a regular expression"),
    ],
)
def test_what_is_wrong_in_a_list_is_named(recipe, text, fragment):
    with pytest.raises(RecipeRefused) as caught:
        recipe("types.txt", text)
    assert fragment in str(caught.value)


def test_rows_that_a_block_does_not_divide_are_refused(recipe):
    info = llama()
    odd = replace(info, layers=tuple(replace(layer, in_features=96) for layer in info.layers))
    with pytest.raises(RecipeRefused, match=r"cannot run layers model\.layers\.0\.self_attn\.q_proj, model\.layers\.1"):
        recipe("t", "attn_q=q4_k", odd)


def test_a_file_is_read_by_its_types(recipe, tmp_path):
    types = {"blk.0.attn_q.weight": "Q4_K", "blk.1.ffn_down.weight": "Q6_K", "output.weight": "BF16"}
    path = file(tmp_path / "own.gguf", types)
    found = recipe("own.gguf", path.read_bytes())
    expected = dict.fromkeys(TENSORS, "gguf-q8_0") | {Q: "gguf-q4_k", "model.layers.1.mlp.down_proj": "gguf-q6_k"}
    del expected["lm_head"]
    assert found == expected


def test_an_importance_matrix_is_used_where_the_file_was_made_with_one(recipe, tmp_path):
    path = file(tmp_path / "own.gguf", dict.fromkeys(TENSORS.values(), "Q4_K"), imatrix=True)
    found = recipe("own.gguf", path.read_bytes())
    # Rows of an embedding are looked up, so there is nothing to weight them by.
    assert found == dict.fromkeys(TENSORS, "gguf-q4_k-im") | {"model.embed_tokens": "gguf-q4_k"}


def test_a_tied_model_has_one_tensor_for_head_and_embedding(recipe, tmp_path):
    tied = llama(tied=True)
    path = file(tmp_path / "own.gguf", {"token_embd.weight": "Q6_K"}, tied)
    assert recipe("own.gguf", path.read_bytes(), tied)["lm_head"] == "gguf-q6_k"
    with pytest.raises(RecipeRefused, match=r"lacks tensors of the model: output\.weight"):
        recipe("own.gguf", path.read_bytes())
    path = file(tmp_path / "untied.gguf", {})
    with pytest.raises(RecipeRefused, match=r"holds tensors that the model has no layers for: output\.weight"):
        recipe("own.gguf", path.read_bytes(), tied)


def test_positions_stay_as_they_are(recipe, tmp_path):
    info = replace(
        llama(architecture="GPT2LMHeadModel"),
        layers=(
            Layer("transformer.wpe", "embedding", 64, 256, 2),
            Layer("transformer.h.0.attn.c_attn", "conv1d", 768, 256, 2, block=0),
            Layer("lm_head", "head", 300, 256, 2, tied=("transformer.wte",)),
        ),
    )
    path = file(tmp_path / "own.gguf", {"position_embd.weight": "F32"}, info, "gpt2")
    assert recipe("own.gguf", path.read_bytes(), info) == {
        "transformer.h.0.attn.c_attn": "gguf-q8_0",
        "lm_head": "gguf-q8_0",
    }


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"architecture": "qwen2"}, "holds a model of architecture 'qwen2', and LlamaForCausalLM is llama"),
        ({"types": {"without": ["blk.1.ffn_up.weight"]}}, "lacks tensors of the model: blk.1.ffn_up.weight"),
        ({"extra": [("blk.2.attn_q.weight", "F16", (4, 4))]}, "no layers for: blk.2.attn_q.weight"),
        ({"types": {"blk.0.attn_q.weight": "IQ2_XXS"}}, "tensor blk.0.attn_q.weight: type 'iq2_xxs' has no scheme"),
        ({"types": {"blk.0.attn_q.weight": "F32"}}, "tensor blk.0.attn_q.weight: type 'f32' has no scheme"),
        ({"fields": [("split.count", 3)]}, "is one of 3 parts; merge them with llama-gguf-split first"),
        ({"info": SHORTER}, "token_embd.weight has the shape (10, 256), and model.embed_tokens has (300, 256)"),
    ],
)
def test_a_file_that_is_not_of_this_model_is_refused(recipe, tmp_path, arguments, fragment):
    path = file(tmp_path / "x.gguf", **({"types": {}} | arguments))
    with pytest.raises(RecipeRefused) as caught:
        recipe("own.gguf", path.read_bytes())
    assert fragment in str(caught.value)


def test_an_architecture_without_gguf_is_refused(recipe, tmp_path):
    content = file(tmp_path / "own.gguf", {}).read_bytes()
    with pytest.raises(RecipeRefused, match="NewForCausalLM; choose from"):
        recipe("own.gguf", content, replace(llama(), architecture="NewForCausalLM"))


def test_a_file_that_is_cut_off_anywhere_is_refused_in_one_line(recipe, tmp_path):
    whole = file(tmp_path / "own.gguf", {}).read_bytes()
    header = len(whole) - sum(layer.out_features * layer.in_features // 32 * 34 for layer in llama().layers)
    for length in [4, 7, 20, 30, *range(40, header, 1511), header, len(whole) - 2000]:
        with pytest.raises(RecipeRefused, match="is cut off"):
            recipe("own.gguf", whole[:length])


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        (struct.pack("<IQQ", 1, 0, 0), "is GGUF version 1"),
        (struct.pack(">IQQ", 3, 0, 0), "is GGUF version 50331648; choose a little-endian file"),
        (struct.pack("<IQQ", 3, 2**60, 0), "is cut off or damaged"),
        (struct.pack("<IQQ", 3, 0, 2**60), "is cut off or damaged"),
        (struct.pack("<IQQQ", 3, 0, 1, 2**50), "is damaged: a name of 1125899906842624 bytes"),
        (struct.pack("<IQQQcI", 3, 0, 1, 1, b"k", 77), "metadata of the unknown type 77"),
        (struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 0, 2**62), "is cut off or damaged"),
        (struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 9, 5), "an array of the unknown type 9"),
        (struct.pack("<IQQQcI", 3, 1, 0, 1, b"t", 400), "tensor 't' has 400 dimensions"),
        (struct.pack("<IQQ", 3, 0, 0), "names no general.architecture"),
    ],
)
def test_a_damaged_header_is_refused_in_one_line(recipe, fields, fragment):
    with pytest.raises(RecipeRefused) as caught:
        recipe("own.gguf", b"GGUF" + fields)
    assert fragment in str(caught.value)


def test_types_are_those_of_the_library():
    ours = {number: name for number, name in _gguf_header._TYPES.items() if name not in ("q4_2", "q4_3")}
    assert ours == {number: gguf.GGMLQuantizationType(number).name.lower() for number in ours}
    assert set(GGUF_TYPES) <= set(_gguf_header._TYPES.values())


def test_what_is_read_is_what_the_library_reads(tmp_path):
    path = file(tmp_path / "own.gguf", {"blk.0.attn_q.weight": "Q4_K"}, imatrix=True)
    header, library = read_header(path), gguf.GGUFReader(path)
    assert [(t.name, t.shape, t.type) for t in header.tensors] == [
        (t.name, tuple(t.shape), t.tensor_type.name.lower()) for t in library.tensors
    ]
    assert (header.architecture, header.imatrix, header.parts) == ("llama", True, 1)
