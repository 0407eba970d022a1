"""What an option of a figure may be. Values come from Python, or as text from an address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from autoq.errors import BadInput, NotFound, UnknownName

if TYPE_CHECKING:
    from . import Facts


class Option(Protocol):
    """Reads one option's value."""

    def read(self, name: str, value: object, facts: Facts) -> Any:
        """What `build` gets. Raises `BadInput`."""


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    choices: tuple[str, ...]

    def read(self, name: str, value: object, facts: Facts) -> str:
        text = str(value)
        if text not in self.choices:
            raise UnknownName(name, value, self.choices)
        return text


@dataclass(frozen=True)
class Flag:
    """True or false; `1`, `true`, `0`, `false` as text."""

    def read(self, name: str, value: object, facts: Facts) -> bool:
        known = {"true": True, "1": True, "false": False, "0": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() not in known:
            raise BadInput(f"{name} must be true or false (got {str(value)[:80]!r})")
        return known[str(value).lower()]


@dataclass(frozen=True)
class Count:
    """A whole number within bounds."""

    least: int
    most: int

    def read(self, name: str, value: object, facts: Facts) -> int:
        try:
            number = int(str(value))
        except ValueError:
            number = self.least - 1
        if isinstance(value, bool) or not self.least <= number <= self.most:
            raise BadInput(f"{name} must be a whole number from {self.least} to {self.most} (got {str(value)[:80]!r})")
        return number


@dataclass(frozen=True)
class ObjectiveName:
    """An objective that was measured: the study's, and what its report measured besides; `none` where allowed."""

    none: bool = False

    def read(self, name: str, value: object, facts: Facts) -> str:
        known = objectives(facts)
        if self.none and value == "none":
            return "none"
        if value not in known:
            raise UnknownName("objective of this study", value, [*known, *(["none"] if self.none else [])])
        return str(value)


@dataclass(frozen=True)
class TrialName:
    """A trial by its number, or by its baseline's name; a duplicate stands for the trial that has its values."""

    def read(self, name: str, value: object, facts: Facts) -> int:
        text = str(value)
        if text.isascii() and text.isdecimal() and len(text) < 10 and not isinstance(value, bool):
            number = int(text)
        else:
            named = {label: number for number, label in facts.trials.baselines.items()}
            if text not in named:
                known = ", ".join(sorted(named)) or "(there are none)"
                where = f"study {facts.study.name!r} has no trial {text[:80]!r}"
                raise NotFound(f"{where}; {name} takes a number, or a baseline: {known}")
            number = named[text]
        place = facts.trials.place(number)
        if place is None:
            return facts.trial(number).number  # says which there are
        original = int(facts.trials.duplicate_of[place])
        return number if original < 0 else original


@dataclass(frozen=True)
class SchemeName:
    """A scheme whose loss was predicted."""

    def read(self, name: str, value: object, facts: Facts) -> str:
        known = dict.fromkeys(scheme for losses in facts.sensitivity.values() for scheme in losses)
        if value not in known:
            raise UnknownName("scheme of the sensitivities", value, known)
        return str(value)


@dataclass(frozen=True)
class StudyNames:
    """Names or ids of other studies: a sequence, or a text with commas between."""

    most: int

    def read(self, name: str, value: object, facts: Facts) -> tuple[Facts, ...]:
        given: Sequence[object] = value if isinstance(value, list | tuple) else str(value).split(",")
        if len(given) > self.most:
            raise BadInput(f"{name} takes at most {self.most} studies (got {len(given)})")
        found = {other.study.id: other for other in (facts.other(str(each).strip()) for each in given)}
        found.pop(facts.study.id, None)
        return tuple(found.values())


def objectives(facts: Facts) -> dict[str, str]:
    """Objective -> unit: the study's, then what was measured besides."""
    units = {objective.name: objective.unit for objective in facts.study.objectives}
    return units | {name: unit for name, unit in sorted(facts.trials.units.items()) if name not in units}
