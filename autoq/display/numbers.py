"""Measurements as text: a unit that reads well, digits that carry information, and where it came from.

Marks behind a value: `p` predicted and not measured, `e` estimated from operations and bytes, `s` measured
on the search data only. A value that was computed exactly, or measured on the report data, has none.
"""

from __future__ import annotations

import math

from autoq.measurement import Measurement

_BYTE_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB"))


def counted(count: int, one: str) -> str:
    """So many of something: `1 trial`, `2 trials`."""
    return f"{count} {one if count == 1 else one + 's'}"


def size(count: float) -> str:
    """Bytes with a decimal unit and four digits: `91.23 MB`."""
    for factor, unit in _BYTE_UNITS:
        if abs(count) >= factor:
            return f"{_digits(count / factor, 4)} {unit}"
    return f"{count:.0f} B"


def _digits(value: float, significant: int) -> str:
    """A number with so many significant digits; not in exponent form where it is readable without."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    scientific = f"{value:.{significant - 1}e}"
    exponent = int(scientific.partition("e")[2])
    if not -4 <= exponent < 7:
        return scientific
    return f"{value:.{max(0, significant - 1 - exponent)}f}"


def number(value: float, unit: str) -> str:
    """A value without its error, in the given unit; bytes bring their unit along."""
    return size(value) if unit == "bytes" else _digits(value, 4)


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m 20s`, `1h 05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02}m"


def with_error(value: float, stderr: float | None, unit: str) -> str:
    """`0.0312 ±0.0008`: the error to two digits at most, the value to the same decimal place."""
    if not stderr or unit == "bytes":
        return number(value, unit)
    exponent = math.floor(math.log10(stderr))
    if not -6 <= exponent < 5 or abs(value) >= 10**7:
        return f"{_digits(value, 4)} ±{_digits(stderr, 1)}"
    places = max(0, 1 - exponent) if stderr / 10**exponent < 2 else max(0, -exponent)
    return f"{value:.{places}f} ±{stderr:.{places}f}"


def mark(measurement: Measurement, also_reported: bool) -> str:
    """`p`, `e`, `s` or nothing. `also_reported`: other values of the same column come from the report data."""
    if measurement.kind == "predicted":
        return "p"
    if measurement.kind == "computed" and measurement.unit == "J":
        return "e"
    return "s" if also_reported and measurement.kind == "measured" and measurement.part == "search" else ""


def quantity(value: float, unit: str) -> str:
    """A value with its unit, for a sentence."""
    return size(value) if unit == "bytes" else f"{_digits(value, 4)} {unit}".strip()


def full(measurement: Measurement) -> str:
    """A measurement for a sentence or a list: value, error, unit, and how it was obtained."""
    text = with_error(measurement.value, measurement.stderr, measurement.unit)
    unit = "" if measurement.unit == "bytes" else f" {measurement.unit}"
    how = measurement.kind if measurement.kind != "measured" else f"measured on the {measurement.part} part"
    return f"{text}{unit} ({how})"
