"""Sizes and times as people write them: `120MB`, `1h30m`."""

from __future__ import annotations

import re

_BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{0,20})?(?:[eE][+-]?\d{1,2})?)\s*([A-Za-z]*)\s*")
_TIME_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TIME = re.compile(r"\s*(?:\d{1,9}(?:\.\d{0,9})?\s*[smhd]\s*)+")


def parse_bytes(value: object) -> int:
    """Bytes from a whole number or text such as `120MB`, `1.5GiB`. Raises `ValueError`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    # 80mb is taken for bytes; in 80Mb somebody has thought about capitals, and it means bits.
    if not found or found[2].upper() not in _BYTE_UNITS or re.fullmatch("[KMGT]i?b", found[2]):
        raise ValueError("must be a size such as 120MB, with one of the units B, KB, MB, GB, TB, KiB, MiB, GiB, TiB")
    return round(float(found[1]) * _BYTE_UNITS[found[2].upper()])


def parse_seconds(value: object) -> float:
    """Seconds from a number or text such as `90s`, `30m`, `1h30m`. Raises `ValueError`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise ValueError("must be a time such as 90s, 30m or 1h30m, with the units s, m, h, d")
    parts = re.findall(r"([\d.]+)\s*([smhd])", value)
    return sum(float(number) * _TIME_UNITS[unit] for number, unit in parts)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of a Ray cluster's address. Raises `ValueError` with what it must be."""
    host, colon, port = text.removeprefix("ray://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
        form = "auto, HOST:PORT of a Ray cluster, such as 10.0.0.5:6379, or ray://HOST:PORT of its client server"
        raise ValueError(f"must be {form}")
    return host, int(port)
