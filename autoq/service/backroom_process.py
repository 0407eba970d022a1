"""The process behind `autoq.service.backroom`: questions come in, answers go out, one JSON document a line.

    {"id": 1, "ask": "prepare", "spec": {…}}                                  → {"id": 1, "answer": {…}}
    {"id": 2, "ask": "offer", "study": 3, "max": {…}, "min": {}, "best": null} → {"id": 2, "error": {"type", "message"}}

It ends when its input does.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from autoq.errors import AutoQError


def _hello(_: Mapping[str, Any]) -> Any:
    """Import what all questions need."""
    import autoq.search.offers  # noqa: F401
    from autoq.search.setup import warm

    warm()
    return {}


def _prepare(question: Mapping[str, Any]) -> Any:
    from autoq.search.setup import prepare
    from autoq.spec import build_spec

    return prepare(build_spec(question["spec"])).to_json()


def _offer(question: Mapping[str, Any]) -> Any:
    from autoq.search.offers import offer_json
    from autoq.store import Store
    from autoq.study import bounds

    with Store.open(os.environ["AUTOQ_DB"], create=False) as store:
        study = store.study(int(question["study"]))
        return offer_json(store, study, bounds(study, question["max"], question["min"]), question["best"])


ANSWERS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {"hello": _hello, "prepare": _prepare, "offer": _offer}


def answer(line: bytes) -> dict[str, Any]:
    """What is said to one question. Every exception becomes an error of the answer."""
    question = json.loads(line)
    try:
        return {"id": question["id"], "answer": ANSWERS[question["ask"]](question)}
    except AutoQError as problem:
        # A child that only its module knows is told by the parent that everyone knows.
        kind = next(each for each in type(problem).__mro__ if each.__module__ == AutoQError.__module__)
        return {"id": question["id"], "error": {"type": kind.__name__, "message": str(problem)}}
    except Exception as bug:
        lines = str(bug).splitlines() or [""]
        return {"id": question["id"], "error": {"type": type(bug).__name__, "message": lines[0]}}


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer until there is nothing more to answer."""
    for line in questions:
        answers.write(json.dumps(answer(line)).encode() + b"\n")
        answers.flush()
        gc.collect()


def main() -> None:
    """Answer on the pipes that this process was started with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends this, not a terminal
    # Libraries print what they like; it goes where errors go, and not between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
