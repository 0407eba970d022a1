"""How long what everyone pays for takes: importing, the command line, opening a store.

CPU time of a fresh process, of which Python's own start is a part; medians of seven.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from _report import cpu_of_process, print_table

COMMAND = [sys.executable, "-c", "import sys; from autoq.cli import main; sys.exit(main())"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = str(Path(folder) / "studies.db")
        open_store = f"from autoq.store import Store; Store.open({database!r}).studies()"
        starts = {
            "python, nothing else": [sys.executable, "-c", "pass"],
            "import autoq": [sys.executable, "-c", "import autoq"],
            "parse a spec": [sys.executable, "-c", "from autoq.spec import load_spec; load_spec('demo')"],
            "open a store and list its studies": [sys.executable, "-c", open_store],
            "autoq --help": [*COMMAND, "--help"],
            "autoq methods": [*COMMAND, "methods"],
            "autoq studies": [*COMMAND, "studies", "--db", database],
        }
        # The warm-up run of each creates the database and Python's byte code.
        rows = [(name, cpu_of_process(command)) for name, command in starts.items()]
    print_table("Start-up, CPU time", ("what", "median ± half its interquartile range"), rows)


if __name__ == "__main__":
    main()
