"""Paths as users write them: what no file can be called is a path where nothing is."""

from __future__ import annotations

import os
from pathlib import Path

_NOWHERE = Path(os.devnull, "nothing")


def user_path(text: str) -> Path:
    """The path of a text, `~` spelled out.

    Of a text that is no name of a file (too long, with a NUL, half a character, the home of nobody), or of a file that
    may not be looked for, one where nothing is: whoever asks whether something is there gets an answer and no error.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError):
        return _NOWHERE
    return path
