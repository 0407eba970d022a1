"""The command line: `autoq COMMAND`.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. Errors are one line on standard error;
`--debug`, anywhere on the line, shows the traceback. Results go to standard output, progress does not.
Commands import what they need when they run, so that help and queries answer at once.
"""

from __future__ import annotations

from autoq.cli import (  # registers the commands
    plan,
    recover,
    remote,
    removal,
    report,
    run,
    sensitivity,
    sequential,
    ship,
    stored,
    web,
)
from autoq.cli.app import app, main

__all__ = [
    "app",
    "main",
    "plan",
    "recover",
    "remote",
    "removal",
    "report",
    "run",
    "sensitivity",
    "sequential",
    "ship",
    "stored",
    "web",
]
