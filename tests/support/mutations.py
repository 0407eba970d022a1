"""Inputs that somebody who means no good would send: good ones, broken in ways that have broken parsers before."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

TEXTS = (
    "", " ", "\0", "\n", "\r\n", "\t", "\\", "/", "..", "../..", "/etc/passwd", "~", "file:///etc/passwd", "a" * 5000,
    "\ufeff", "\u202e", "\u2028", "\ud800", "é" * 300, "𝟙𝟚", "٣", "İ", "ſ", "%s%n", "{0.__class__}", "{{7*7}}",
    "${HOME}", "`id`", "<script>", "' OR 1=1 --", "=1+1", "\x1b[2J",
    "!!python/object/apply:os.system [id]", "!function os.system",
    "&a [*a]", "*a", "<<: {a: 1}", "? [a]\n: b", "- - - -", "[[[[[[", "{{{{{{", "}]", "---", "...", "%YAML 9.9",
    "1e999", "-1e999", "nan", ".nan", "inf", ".inf", "-0", "0x" + "f" * 3000, "9" * 5000, "1:2:3", "1_000", "0b1",
    "1e-999", "true", "null", "~", "2024-99-99", "0o7", "1.5", "-1", "4294967296", "18446744073709551616",
    "NaN", "Infinity",
    "(a+)+$", "(?:a|a)*b", "[", "(?P<a>", "\\", "((((((((((", "a{99999}", ".*.*.*.*.*x", "[^", "(?#", "*", "**",
    "[!a]",
    "int4-g64", "rtn-", "-g0", "#", "kv4", "keep", "rtn-int4-g64", "gptq-int99-g64", "rtn-int4-g-1", "24", "x128x128",
    "120MB", "-1MB", "1e300MB", "MB", "30m", "1e400m", "-5s", "5y", "auto", "ray://x:1", "10.0.0.1:6379", "[::1]:1",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -1e308, 0.5, float("nan"), float("inf"),
    [], {}, [[]], {"": None}, {"a": {"b": {"c": {}}}}, [None] * 300, {str(i): i for i in range(300)}, {"__class__": 1},
    {"auto_map": {"AutoModel": "x.Y"}}, ["a"] * 3, [1, "a", None, {}], {"min": 1, "max": -1}, [{"match": "*"}],
)  # fmt: skip
_WORDS = tuple(text for text in TEXTS if text)


class Mutations:
    """A stream of broken inputs; the same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self, good: str) -> str:
        """A good text with one to six things done to it."""
        found = good
        for _ in range(self.random.choice((1, 1, 1, 2, 2, 3, 6))):
            found = self._text_once(found)[:60_000]
        return found

    def _text_once(self, text: str) -> str:
        r = self.random
        a, b = sorted((r.randint(0, len(text)), r.randint(0, len(text))))
        b = min(b, a + r.choice((1, 2, 8, 40, 400)))
        how = r.randrange(9)
        if how == 0:
            return text[:a] + text[b:]
        if how == 1:
            return text[:b] + text[a:b] * r.choice((1, 2, 30)) + text[b:]
        if how in (2, 3):
            return text[:a] + r.choice(_WORDS) + text[b if how == 3 else a :]
        if how == 4:
            return text[:a]
        if how == 5:
            return (
                text[:a]
                + chr(r.choice((0, 9, 10, 32, 34, 39, 44, 58, 91, 93, 123, 125, 127, 133, 0xFEFF, 0x2028)))
                + text[a:]
            )
        if how == 6:
            c, d = sorted((r.randint(0, len(text)), r.randint(0, len(text))))
            return text[:a] + text[c : min(d, c + 200)] + text[a:]
        if how == 7:
            lines = text.split("\n")
            r.shuffle(lines)
            return "\n".join(lines)
        return r.choice(TEXTS) + text if r.random() < 0.5 else text + r.choice(TEXTS)

    def tree(self, good: Any) -> Any:
        """A good document (plain data) with one to four values or keys exchanged, added or taken out."""
        found = json.loads(json.dumps(good))
        for _ in range(self.random.choice((1, 1, 2, 4))):
            found = self._tree_once(found, good)
        return found

    def value(self) -> Any:
        """Something that hardly anybody expects."""
        return self.random.choice(TEXTS) if self.random.random() < 0.5 else copy.deepcopy(self.random.choice(VALUES))

    def _tree_once(self, tree: Any, good: Any) -> Any:
        r = self.random
        places = list(_places(tree))
        if not places or r.random() < 0.02:
            return self.value()
        holder, key = r.choice(places)
        how = r.randrange(6)
        if how <= 2:
            holder[key] = self.value()
        elif how == 3:
            del holder[key]
        elif how == 4 and isinstance(holder, dict):
            holder[str(r.choice(TEXTS))] = self.value() if r.random() < 0.5 else json.loads(json.dumps(good))
        else:
            other, name = r.choice(places)
            with_it = other.get(name) if isinstance(other, dict) else other[name] if name < len(other) else None
            holder[key] = json.loads(json.dumps(with_it))
        return tree

    def json(self, good: Any) -> str:
        """The text of a broken document, sometimes broken itself."""
        text = json.dumps(self.tree(good))
        return self.text(text) if self.random.random() < 0.25 else text

    def bytes(self, good: bytes, words: Callable[[random.Random], bytes] | None = None) -> bytes:
        """Good bytes, broken: bits, lengths, cuts, and numbers at the edges of what they can be."""
        r, found = self.random, bytearray(good)
        for _ in range(r.choice((1, 1, 2, 4, 16))):
            place = r.randrange(len(found) + 1)
            how = r.randrange(7)
            if how == 0 and place < len(found):
                found[place] ^= 1 << r.randrange(8)
            elif how in (1, 2):
                width = r.choice((1, 2, 4, 8))
                number = r.choice(
                    (0, 1, 2, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(good))
                )
                found[place : place + width] = (number % 256**width).to_bytes(width, "little")
            elif how == 3:
                del found[place:]
            elif how == 4:
                del found[place : place + r.choice((1, 4, 8, 32))]
            elif how == 5:
                found[place:place] = r.randbytes(r.choice((1, 4, 8, 64)))
            elif words is not None:
                found[place:place] = words(r)
            if not found:
                found = bytearray(good)
        return bytes(found)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, dict | list):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                yield node, key
                left.append(node[key])
