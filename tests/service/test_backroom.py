"""The backroom: the same verdicts as on the command line, from a process that may die, take long, or take too much."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from autoq.errors import AutoQError, BadInput, SpecError
from autoq.search.controller import create_study
from autoq.search.setup import prepare
from autoq.service.backroom import Backroom
from autoq.spec import build_spec
from autoq.store import Store

KL, SIZE = "kl_nats_per_token", "size_bytes"


def spec(model, **more):
    return build_spec(
        {
            "model": {"id": str(model)},
            "target": {"name": "generic"},
            "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
            "space": {"schemes": ["rtn-int2-g32", "rtn-int4-g32", "rtn-int8-g32"]},
            "objectives": [KL, SIZE],
            **more,
        }
    )


@pytest.fixture
def address(tmp_path):
    with Store.open(str(tmp_path / "autoq.db")) as store:
        yield store.address


@pytest.fixture
def backroom(address):
    backroom = Backroom(address)
    yield backroom
    backroom.stop()


def fake(tmp_path, body):
    """The command of a process that says what `body` makes it say."""
    script = tmp_path / "fake.py"
    script.write_text(
        "import json, os, sys, time\nfor line in sys.stdin:\n    question = json.loads(line)\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
    )
    return (sys.executable, str(script))


PREPARED = '{"objectives": [["a", "u", "minimize"]], "tables": {}, "facts": {}}'


@pytest.mark.slow
def test_it_prepares_as_the_command_line_does_and_shares_what_it_found(backroom, tiny_model_dir, address, tmp_path):
    model = tiny_model_dir("llama")
    wanted = spec(model)
    found = backroom.prepare_now(wanted)
    assert found.to_json() == backroom.prepare_now(wanted).to_json()
    here = prepare(wanted)
    assert found.tables == here.tables | {"layers": found.tables["layers"]}
    assert [tuple(each) for each in found.objectives] == list(here.objectives)
    assert found.facts == here.facts
    with Store.open(address) as store:
        assert store.table(create_study(store, wanted).id, "layers") == found.tables["layers"]
    asked = backroom._asked
    # Another name, seed and budget are the same question; other data are not.
    for same in ({"name": "other"}, {"sampler": {"seed": 7}}, {"budget": {"trials": 3}}):
        assert backroom.prepare_now(spec(model, **same)) == found
    assert backroom._asked == asked
    for broken in ({"data": {"source": str(tmp_path / "none.txt")}}, {"constraints": {SIZE: {"max": 10}}}):
        with pytest.raises(BadInput) as refused:
            backroom.prepare_now(spec(model, **broken))
        with pytest.raises(BadInput) as told:
            prepare(spec(model, **broken))
        assert (type(refused.value), str(refused.value)) == (type(told.value), str(told.value))
    assert backroom.starts == 1


@pytest.mark.slow
def test_what_it_says_of_a_file_is_true_of_that_file_only(backroom, tiny_model_dir, tmp_path):
    text = tmp_path / "text.txt"
    wanted = spec(tiny_model_dir("llama"), data={"source": str(text), "report_tokens": 64, "window_tokens": 32})
    with pytest.raises(BadInput):
        backroom.prepare_now(wanted)
    text.write_text("It is a truth universally acknowledged. " * 2000)
    assert backroom.prepare_now(wanted).facts["layers"] > 0
    text.unlink()
    with pytest.raises(BadInput):
        backroom.prepare_now(wanted)


def test_many_who_ask_the_same_at_once_ask_one_question(address, tmp_path, in_loop):
    goes_on = tmp_path / "goes on"
    command = fake(tmp_path, f"""
        while not os.path.exists({str(goes_on)!r}): time.sleep(0.01)
        print(json.dumps({{"id": question["id"], "answer": {PREPARED}}}), flush=True)
    """)  # fmt: skip
    backroom = Backroom(address, command=command)

    async def all_of_them():
        async def beat():
            for _ in range(10):
                await asyncio.sleep(0.01)
            goes_on.touch()  # there is no answer before: a loop that is blocked gets none

        beating = asyncio.create_task(beat())
        found = await asyncio.gather(*(backroom.prepare(spec("m", name=f"s{i}")) for i in range(100)))
        await beating
        return found

    assert len(in_loop(all_of_them())) == 100
    assert backroom._asked == 1
    backroom.stop()


def test_one_that_waits_and_gives_up_leaves_the_others_their_answer(address, tmp_path, in_loop):
    command = fake(
        tmp_path, f'time.sleep(0.3); print(json.dumps({{"id": question["id"], "answer": {PREPARED}}}), flush=True)'
    )
    backroom = Backroom(address, command=command)

    async def two():
        first = asyncio.create_task(backroom.prepare(spec("m")))
        second = asyncio.create_task(backroom.prepare(spec("m")))
        await asyncio.sleep(0.1)
        first.cancel()
        return await second

    assert in_loop(two()).tables == {}
    backroom.stop()


def test_a_process_that_is_killed_is_started_again(address, tmp_path):
    command = fake(tmp_path, f'print(json.dumps({{"id": question["id"], "answer": {PREPARED}}}), flush=True)')
    backroom = Backroom(address, command=command)
    assert backroom.prepare_now(spec("a")).tables == {}
    backroom._process.kill()
    backroom._process.wait()
    assert backroom.prepare_now(spec("b")).tables == {}
    assert backroom.starts == 2
    backroom.stop()
    with pytest.raises(AutoQError, match="the server is being stopped"):
        backroom.prepare_now(spec("c"))


def test_a_question_that_kills_the_process_is_refused(address, tmp_path):
    command = fake(tmp_path, 'os._exit(9) if question["spec"]["model"]["id"] == "bad" else None\n'
                   f'print(json.dumps({{"id": question["id"], "answer": {PREPARED}}}), flush=True)')  # fmt: skip
    backroom = Backroom(address, command=command)
    with pytest.raises(AutoQError, match=r"the process that was to check the spec .* died of it, twice"):
        backroom.prepare_now(spec("bad"))
    assert backroom.prepare_now(spec("good")).tables == {}
    backroom.stop()


def test_a_question_that_takes_too_long_or_too_much_is_refused_and_leaves_no_process(address, tmp_path):
    command = fake(tmp_path, """
        if question["spec"]["model"]["id"] == "slow": time.sleep(60)
        hog = "x" * 300_000_000
        time.sleep(60)
    """)  # fmt: skip
    backroom = Backroom(address, command=command, prepare_seconds=0.6, memory_bytes=2**40)
    with pytest.raises(AutoQError, match=r"^to check the spec .* took longer than 0\.6 s, and was given up$"):
        backroom.prepare_now(spec("slow"))
    backroom.stop()
    backroom = Backroom(address, command=command, memory_bytes=200 * 2**20)
    with pytest.raises(AutoQError, match=r"^to check the spec .* takes 0\.\d GiB of memory; 0\.2 are allowed$"):
        backroom.prepare_now(spec("large"))
    backroom.stop()
    left = [child.cmdline() for child in psutil.Process().children() if "fake.py" in " ".join(child.cmdline())]
    assert left == []


def test_stopping_refuses_what_is_being_asked(address, tmp_path):
    backroom = Backroom(address, command=fake(tmp_path, "time.sleep(1000)\n"))
    refused = []

    def ask():
        try:
            backroom.prepare_now(spec("m"))
        except AutoQError as problem:
            refused.append(str(problem))

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for each in asking:
        each.start()
    while backroom._process is None:
        time.sleep(0.01)
    backroom.stop()
    for each in asking:
        each.join(250)  # of the 1000 seconds that the answer would take
    assert refused == ["the server is being stopped"] * 2


def test_the_server_side_loads_no_model(tmp_path):
    probe = (
        "import sys, autoq.service.backroom, autoq.store\n"
        "print(sorted({'torch', 'transformers', 'optuna', 'ray', 'plotly', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_errors_keep_their_kind():
    from autoq.errors import restore

    assert type(restore("SpecError", "name: no")) is SpecError
    assert str(restore("SpecError", "name: no")) == "name: no"
    assert (type(restore("KeyError", "x")), str(restore("KeyError", "x"))) == (AutoQError, "KeyError: x")
    assert type(restore("inspect", "x")) is AutoQError
