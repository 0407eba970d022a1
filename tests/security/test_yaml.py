"""What YAML can do: multiply, construct, overrule, nest, and keep a parser busy."""

from __future__ import annotations

import time

import pytest

from autoq import strict_yaml
from autoq.errors import SpecError
from autoq.spec import parse_spec

BOMB = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, *a]\n" for i in range(30))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (BOMB, "must not use YAML anchors or aliases"),
        ("model: &x {id: a}", "must not use YAML anchors or aliases"),
        ("model: *x", "must not use YAML anchors or aliases"),
        ("<<: {model: {id: a}}\nname: x", "must not use YAML merge keys"),
        ("model: {<<: [{id: a}, {id: b}], id: c}", "must not use YAML merge keys"),
        ("model: !!python/object/apply:os.system [id]", "must not use YAML tags"),
        ("model: !!binary aGk=", "must not use YAML tags"),
        ("!!map {model: x}", "must not use YAML tags"),
        ("model: !function os.system", "must not use YAML tags"),
        ("model: a\nmodel: b", "holds the key 'model' twice"),
        ("1: a\n0x1: b", "holds a key twice, written in two ways"),
        ("yes: a\ntrue: b", "holds a key twice, written in two ways"),
        ("[" * 40 + "]" * 40, "is nested more than 32 deep"),
        ("a:\n" + "".join(" " * i + "a:\n" for i in range(1, 40)), "is nested more than 32 deep"),
        ("[" * 90_000, "is nested more than 32 deep"),
        ("x" * 200_001, "is larger than 200000 bytes"),
        ("é" * 150_000, "is larger than 200000 bytes"),
        ("a: " + "9" * 5000, "is not valid YAML"),
        ("a: 2024-99-99", "is not valid YAML"),
        ("a: \x00", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("--- a\n--- b", "is not valid YAML"),
        ("? [a]\n: b", "is not valid YAML"),
        ("%YAML 9.9\n---\na: b", "is not valid YAML"),
    ],
)
def test_what_yaml_can_do_and_a_spec_needs_not(text, fragment):
    with pytest.raises(SpecError) as refused:
        strict_yaml.parse(text, "the spec")
    assert fragment in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


SIZE = 199_000
SLOW = {
    "a number of the base 60": "a: " + "1:" * (SIZE // 2) + "1",
    "a long list": "a: [" + "1," * (SIZE // 2 - 5) + "1]",
    "many mappings": "[" + "{}," * (SIZE // 3 - 5) + "{}]",
    "many keys": "\n".join(f"k{i}: 1" for i in range(SIZE // 10)),
    "a hexadecimal number": "a: 0x" + "f" * (SIZE - 10),
    "one word": "a: " + "x" * (SIZE - 10),
    "comments": "#\n" * (SIZE // 2),
    "quotes": "a: '" + "''" * (SIZE // 2 - 5) + "'",
}


@pytest.mark.untraced
@pytest.mark.parametrize("what", SLOW)
def test_no_spec_takes_long(what):
    """The time is one that grows with the size: at the limit seconds of one core, where the square would be minutes."""
    began = time.thread_time()
    with pytest.raises(SpecError):
        parse_spec(SLOW[what])
    assert time.thread_time() - began < 30
