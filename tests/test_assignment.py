"""Assignments: one canonical text, one hash, and errors in one line."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoq.assignment import Assignment, diff
from autoq.errors import BadInput
from autoq.scheme import Keep, parse_scheme

SCHEMES = ["keep", "rtn-int4-g64", "rtn-int8-channel-sym-a8dyn", "hqq-int3-g64-rz", "kmeans4-channel"]
TEXTS = st.dictionaries(st.text(max_size=30), st.sampled_from(SCHEMES), max_size=12)


@given(texts=TEXTS)
def test_json_round_trip_and_hash(texts):
    assignment = Assignment.from_dict(texts)
    assert assignment.to_dict() == texts
    assert Assignment.from_json(assignment.json) == assignment
    assert assignment.hash == hashlib.sha256(assignment.json.encode()).hexdigest()
    assert assignment.json.isascii()
    assert list(json.loads(assignment.json)) == sorted(texts)


@given(texts=TEXTS, seed=st.randoms())
def test_order_does_not_matter(texts, seed):
    items = list(texts.items())
    seed.shuffle(items)
    one, two = Assignment.from_dict(texts), Assignment.from_dict(dict(items))
    assert one == two
    assert one.json == two.json
    assert hash(one) == hash(two)
    assert len({one, two}) == 1


def test_canonical_json_by_hand():
    assignment = Assignment({"b": Keep(), "a": parse_scheme("rtn-int4-g64")})
    assert assignment.json == '{"a":"rtn-int4-g64","b":"keep"}'
    assert repr(assignment) == f"Assignment(2 layers, {assignment.hash[:12]})"


def test_it_is_a_mapping_that_later_changes_do_not_reach():
    source = {"a": parse_scheme("keep")}
    assignment = Assignment(source)
    source["b"] = parse_scheme("keep")
    assert dict(assignment) == {"a": Keep()}
    assert len(assignment) == 1
    assert "b" not in assignment
    assert assignment != {"a": Keep()}
    with pytest.raises(KeyError):
        assignment["b"]


def test_one_scheme_changes_the_hash():
    assert Assignment.from_dict({"a": "keep"}).hash != Assignment.from_dict({"a": "rtn-int8-channel"}).hash
    assert Assignment.from_dict({"a": "keep"}).hash != Assignment.from_dict({"b": "keep"}).hash


def test_diff_names_both_sides_and_what_is_missing():
    one = Assignment.from_dict({"a": "keep", "b": "rtn-int4-g64", "c": "keep"})
    two = Assignment.from_dict({"a": "keep", "b": "rtn-int8-channel", "d": "keep"})
    assert diff(one, two) == {
        "b": (parse_scheme("rtn-int4-g64"), parse_scheme("rtn-int8-channel")),
        "c": (Keep(), None),
        "d": (None, Keep()),
    }
    assert diff(one, one) == {}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "1", "null", '"keep"', '{"a": 1}', '{"a": null}', '{"a": "int4"}', '{"a": ["keep"]}', "[" * 10**5],
)  # fmt: skip
def test_junk_is_refused_in_one_line(text):
    with pytest.raises(BadInput) as refusal:
        Assignment.from_json(text)
    assert "\n" not in str(refusal.value)


@given(text=st.text())
def test_any_text_is_an_assignment_or_bad_input(text):
    try:
        Assignment.from_json(text)
    except BadInput as problem:
        lines = str(problem).splitlines()
        assert len(lines) == 1
