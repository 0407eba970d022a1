"""KV caches without weights: bytes by hand, texts, and assignments that hold them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoq.assignment import Assignment, diff
from autoq.errors import BadInput
from autoq.kv_cache import BITS, GROUP, Cache, KeyValue, parse_choice, parse_key_value
from autoq.scheme import Keep, parse_scheme

CACHE = Cache("h.0.attn", heads=2, key_width=8, value_width=4, dtype_bytes=2)
SLIDING = Cache("h.0.attn", heads=2, key_width=8, value_width=4, dtype_bytes=2, window=40)

caches = st.builds(
    Cache,
    st.just("a"),
    heads=st.integers(1, 8),
    key_width=st.integers(1, 20).map(lambda n: 8 * n),
    value_width=st.integers(1, 20).map(lambda n: 8 * n),
    dtype_bytes=st.sampled_from([2, 4]),
    window=st.none() | st.integers(1, 300),
)


def test_bytes_by_hand():
    # 70 tokens: two whole groups of keys, and 6 tokens that are not 32 yet
    assert CACHE.nbytes(Keep(), 70) == 70 * 2 * (8 + 4) * 2
    keys = 2 * 8 * (2 * (32 * 4 // 8 + 2 + 2) + 6 * 2)
    values = 70 * 2 * (4 * 4 // 8 + 2 + 2)
    assert CACHE.nbytes(KeyValue(4), 70) == keys + values
    # no group is whole: the keys are as they were
    assert CACHE.nbytes(KeyValue(8), 31) == 31 * 2 * 8 * 2 + 31 * 2 * (4 + 4)
    assert CACHE.nbytes(KeyValue(8), 0) == CACHE.nbytes(Keep(), 0) == 0


def test_bytes_of_a_sliding_window_by_hand():
    # Of 80 tokens the last 40 are seen: 40 to 79. Keys 32 to 63 are one group still, 64 to 79 none yet.
    assert SLIDING.nbytes(Keep(), 80) == 40 * 2 * (8 + 4) * 2
    assert SLIDING.nbytes(KeyValue(2), 80) == 2 * 8 * (32 * 2 // 8 + 4 + 16 * 2) + 40 * 2 * (1 + 4)
    assert SLIDING.nbytes(KeyValue(2), 40) == CACHE.nbytes(KeyValue(2), 40)


@given(caches, st.integers(0, 1000))
def test_fewer_bits_never_take_more_bytes_and_more_tokens_never_less_but_where_a_group_is_coded(cache, tokens):
    sizes = [cache.nbytes(KeyValue(bits), tokens) for bits in sorted(BITS)]
    assert sizes == sorted(sizes)
    assert cache.nbytes(Keep(), tokens) <= cache.nbytes(Keep(), tokens + 1)
    if cache.window is None:
        for bits in BITS:
            scheme = KeyValue(bits)
            whole = tokens // GROUP * GROUP
            assert cache.nbytes(scheme, whole) <= cache.nbytes(scheme, tokens)
            assert cache.nbytes(scheme, whole + GROUP) - cache.nbytes(scheme, whole) == cache.nbytes(scheme, GROUP)


def test_texts():
    for bits in BITS:
        assert str(KeyValue(bits)) == f"kv{bits}"
        assert parse_key_value(f"kv{bits}") == parse_choice(f"kv{bits}") == KeyValue(bits)
    assert parse_key_value("keep") is None
    assert parse_choice("keep") == Keep()
    for text in ("kv3", "kv16"):
        with pytest.raises(BadInput, match=f"a KV cache in {text[2:]} bits is not known; choose from 8, 4, 2"):
            parse_key_value(text)


LAYERS = {"h.0.attn.q": parse_scheme("rtn-int4-g32"), "h.1.mlp": Keep()}


def test_an_assignment_without_quantized_caches_is_what_it_was():
    plain = Assignment(LAYERS)
    assert plain == Assignment(LAYERS, caches={})
    assert plain.json == '{"h.0.attn.q":"rtn-int4-g32","h.1.mlp":"keep"}'
    assert plain.hash == "dd7afa112f8bcf67134a12215a6773063552ec00786a79c24389645336c4b9f7"


def test_an_assignment_with_caches_round_trips_and_is_one_of_layers_as_a_mapping():
    found = Assignment(LAYERS, caches={"h.1.attn": KeyValue(4), "h.0.attn": KeyValue(8)})
    assert dict(found) == LAYERS
    assert found != Assignment(LAYERS)
    assert found.hash != Assignment(LAYERS).hash
    assert list(found.to_dict()) == ["h.0.attn", "h.0.attn.q", "h.1.attn", "h.1.mlp"]
    assert found.untrained() == found.to_dict() == json.loads(found.json)
    assert Assignment.from_json(found.json) == found
    assert (found.text("h.0.attn"), found.text("h.7.attn")) == ("kv8", "keep")
    trained = Assignment(LAYERS, {"h.0.attn.q": "a" * 40}, found.caches)
    assert Assignment.from_dict(trained.to_dict()) == trained
    assert trained.untrained() == found.to_dict()


def test_a_difference_names_caches_after_layers():
    kept, coded = Assignment(LAYERS), Assignment({**LAYERS, "h.1.mlp": LAYERS["h.0.attn.q"]}, caches={"a": KeyValue(4)})
    assert list(diff(kept, coded).items()) == [
        ("h.1.mlp", (Keep(), LAYERS["h.0.attn.q"])),
        ("a", (Keep(), KeyValue(4))),
    ]
    assert diff(coded, coded) == {}
