"""What pydantic found wrong with a spec, as one line for a person.

The line names the field by its path, the value, and what would be right. Values are the user's: they
may be a megabyte long, deeply nested, or hold terminal escapes, and are shown in bounded, printable form.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def _section_fields(root: type[BaseModel] | None, path: Iterable[int | str]) -> list[str]:
    """The field names of the section that `path` leads to, for the choices in a message."""
    model: type[BaseModel] | None = root
    for key in path:
        if isinstance(key, int):
            continue
        field = model.model_fields.get(key) if model else None
        if field is None:
            # A mapping of sections (`constraints`) has the user's own keys between the two.
            continue
        model = next(_sections_in(field.annotation), None)
    return list(model.model_fields) if model else []


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


class _Brief(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write a number of more than 4,300 digits.
        return f"<a whole number of {x.bit_length()} bits>" if x.bit_length() > 256 else repr(x)


_BRIEF = _Brief()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 80, 80


def short(value: object) -> str:
    """A bounded text of any value: a mistake may be a megabyte long or a number of 5,000 digits."""
    return _BRIEF.repr(value)


def _key(key: int | str) -> str:
    return key[:80] if isinstance(key, str) and key.isprintable() else short(key)


def field_path(path: Iterable[int | str]) -> str:
    """Where a mistake is, for programs: keys as they are, but for their length."""
    return ".".join(str(key)[:80] for key in path)


_KINDS = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be finite",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "invalid_key": "keys must be text",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must start with a letter or digit and go on, up to 100 characters, with those or . _ -",
}


def one_line(problem: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake as `field: message (got value)`, and how many more there are."""
    return line_of(problem.errors(include_url=False), root)


def line_of(errors: Sequence[Any], root: type[BaseModel] | None = None) -> str:
    """The first of pydantic's error dicts as one line; without `root`, it names no sections' fields."""
    first = errors[0]
    path, value, context = first["loc"], first.get("input"), first.get("ctx", {})
    where = ".".join(_key(key) for key in path) or "spec"
    got = f" (got {short(value)})"
    match first["type"]:
        case "extra_forbidden":
            choices = _section_fields(root, path[:-1])
            near = difflib.get_close_matches(_key(path[-1]), choices, n=1)
            hint = f"; did you mean {near[0]!r}? choose" if near else "; choose"
            text = f"no such field{hint} from {', '.join(choices)}" if choices else "no such field"
        case "missing":
            text = "is required"
        case "literal_error":
            expected = str(context["expected"])
            near = difflib.get_close_matches(short(value).strip("'"), re.findall(r"'([^']*)'", expected), n=1)
            text = f"{short(value)} is not one of {expected}" + (f"; did you mean {near[0]!r}?" if near else "")
        case "model_type" | "model_attributes_type" | "dict_type":
            fields = _section_fields(root, path)
            names = f" with fields from {', '.join(fields)}" if fields else " of names and values"
            text = f"must be a section{names}" + (got if value is not None else "; leave it out for the default")
        case "value_error":
            text = first["msg"].removeprefix("Value error, ")
            if isinstance(value, str | int | float) and short(value) not in text:
                text += got
        case kind if kind in _KINDS:
            text = _KINDS[kind].format_map(context) + got
        case _:
            text = first["msg"][:1].lower() + first["msg"][1:] + got
    more = len(errors) - 1
    return " ".join(f"{where}: {text}".split()) + (f" (and {more} more)" if more > 0 else "")
