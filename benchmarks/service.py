"""The service under load: submissions at once, reads of a large study, and clients that follow events.

    python benchmarks/service.py                       # 200 submissions, 100,000 trials, 100 clients for 30 s
    python benchmarks/service.py --trials 10000        # a smaller study
    python benchmarks/service.py --long                # the clients for 10 minutes

The server is a process of its own with the real backroom and no scheduler, so that no study takes the processor from
it. Every figure is that of a client on the same machine, whose own work is in it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import sqlalchemy as sa

from autoq.assignment import Assignment
from autoq.scheme import parse_scheme
from autoq.spec import build_spec
from autoq.store import Prepared, Store
from autoq.store import models as m
from autoq.store.checksum import checksum_of_rows, members_checksum, own_of
from autoq.store.dominance import non_dominated
from autoq.store.loading import measurement_row
from autoq.store.packing import pack

OBJECTIVES = [
    ("kl_nats_per_token", "nats/token", "minimize"),
    ("size_bytes", "bytes", "minimize"),
    ("latency_decode_ms", "ms", "minimize"),
]
LAYERS = 210
SUBMITTED = {
    "model": {"id": "demo:smollm2"},
    "target": {"name": "generic"},
    "objectives": ["kl_nats_per_token", "size_bytes"],
}


def serve(db: str) -> None:
    """The child process: a server without a scheduler."""
    from autoq.service.app import create_app
    from autoq.service.backroom import Backroom
    from autoq.service.serving import listen, run
    from autoq.service.settings import Limits, Settings

    with Store.open(db) as store, listen("127.0.0.1", 0) as listening:
        backroom = Backroom(store.address)
        limits = Limits(requests_per_second=1e6, burst=10**6, waiting_studies=None)
        app = create_app(store, Settings(limits=limits), backroom)
        try:
            run(app, listening, lambda: print(listening.getsockname()[1], flush=True))
        finally:
            backroom.stop()


@contextlib.contextmanager
def server(db: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server on a database: its URL and its process."""
    child = subprocess.Popen([sys.executable, __file__, "--serve", db], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield f"http://127.0.0.1:{int(child.stdout.readline())}", psutil.Process(child.pid)
    finally:
        child.terminate()
        child.wait(60)


def fill(store: Store, count: int) -> None:
    """A study of `count` trials with three measurements each and a frontier of some hundred points, written at once."""
    rng = random.Random(0)
    spec = build_spec({"model": {"id": "demo:smollm2"}, "name": "large"})
    study = store.create_study(spec, OBJECTIVES)
    schemes = [parse_scheme(f"rtn-int{bits}-g64") for bits in (2, 3, 4, 5, 6, 8)]
    names = [f"model.layers.{layer // 7}.m{layer % 7}" for layer in range(LAYERS)]
    assignments = [Assignment({name: rng.choice(schemes) for name in names}) for _ in range(500)]
    now = datetime.now(UTC)
    points = []
    for _ in range(count):
        bits = rng.uniform(2, 8)
        loss = 4.0 ** (2 - bits) * rng.lognormvariate(0.35, 0.25)
        points.append((loss, bits * 17e6 * rng.uniform(1, 1.05), 8 + 4 * bits * rng.uniform(0.97, 1.2)))
    with store._database.writing() as connection:
        for each in assignments:
            connection.execute(sa.insert(m.assignments).values(hash=each.hash, body=pack(each)))
        first = (connection.execute(sa.select(sa.func.max(m.trials.c.id))).scalar() or 0) + 1
        rows = [
            {
                "id": first + number, "study_id": study.id, "number": number, "state": "complete", "origin": "sampler",
                "assignment": assignments[number % 500].hash, "attempt": 1, "changed": number + 2, "feasible": True,
                "sampler_attrs": {"nsga2:generation": number // 50}, "created_at": now, "finished_at": now,
                "seconds": 2.0, "worker": "w",
            }
            for number in range(count)
        ]  # fmt: skip
        measured = [
            {
                "trial_id": first + number, "objective": name, "part": "search", "kind": "measured", "value": value,
                "stderr": 0.02 * value, "unit": unit, "n": 2048, "device": "cpu", "detail": {},
            }
            for number, point in enumerate(points)
            for (name, unit, _), value in zip(OBJECTIVES, point, strict=True)
        ]  # fmt: skip
        for number, row in enumerate(rows):
            own = [measurement_row(each) for each in measured[3 * number : 3 * number + 3]]
            row["checksum"] = checksum_of_rows(own_of(row | {"hash": row["assignment"]}), own)
        connection.execute(sa.insert(m.trials), rows)
        connection.execute(sa.insert(m.measurements), measured)
        best = non_dominated(points, ["minimize"] * 3)
        members = [{"study_id": study.id, "trial_id": first + i, "point": list(points[i])} for i in best]
        connection.execute(sa.insert(m.frontier), members)
        texts = [(row["trial_id"], json.dumps(row["point"], separators=(",", ":"))) for row in members]
        sealed = members_checksum(study.id, texts)
        changed = sa.update(m.studies).where(m.studies.c.id == study.id)
        connection.execute(changed.values(changes=count + 2, state="running", members=sealed))
    print(f"a study of {count} trials, {len(best)} on the frontier, {LAYERS} layers")


def said(what: str, seconds: list[float]) -> None:
    """One line: median, 95th percentile and the longest."""
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    shown = " ".join(f"{name} {1000 * value:7.1f} ms" for name, value in
                     (("median", statistics.median(ordered)), ("p95", p95), ("longest", ordered[-1])))  # fmt: skip
    print(f"{what:<58} {shown}  (n={len(ordered)})", flush=True)


def reads(url: str, store: Store, count: int, repeats: int) -> None:
    """Reads of the large study, as it stands and while it changes."""
    rng = random.Random(1)
    study = store.study("large")
    base = f"{url}/api/v1/studies/large"
    with httpx.Client(timeout=120) as client:

        def timed(path: str, change: bool, **headers: str) -> tuple[float, httpx.Response]:
            if change:
                store.put_table(study.id, "touched", rng.random())
            begun = time.perf_counter()
            answer = client.get(f"{base}{path}", headers=headers)
            return time.perf_counter() - begun, answer

        for what, path, change in (
            ("frontier", "/frontier?assignments=false", False),
            ("frontier, after a change", "/frontier?assignments=false", True),
            ("frontier with assignments, after a change", "/frontier", True),
            ("frontier within limits, after a change", "/frontier?assignments=false&max=size_bytes=80MB", True),
            ("a trial", "/trials/{number}", True),
            ("100 trials, from anywhere", "/trials?after={number}&limit=100", True),
            ("the study", "", True),
            ("baselines", "/baselines", True),
            ("list of studies", "/../../studies", True),
            ("metrics", "/../../../../metrics", True),
        ):
            taken, size = [], 0
            for _ in range(repeats):
                spent, answer = timed(path.format(number=rng.randrange(count)), change)
                assert answer.status_code == 200, answer.text
                taken.append(spent)
                size = len(answer.content)
            said(f"{what} ({size / 1000:.0f} kB)", taken[1:])
        _, first = timed("/frontier", False)
        said("frontier, nothing new (304)", [
            timed("/frontier", False, **{"If-None-Match": first.headers["etag"]})[0] for _ in range(repeats)
        ])  # fmt: skip


async def post(url: str, path: str, body: Any, *headers: str) -> tuple[int, Any]:
    """One request on a connection of its own; status and document. A client library takes thrice the server's time."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    text = json.dumps(body).encode()
    told = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close")
    writer.write("\r\n".join([*told, f"Content-Length: {len(text)}", *headers, "", ""]).encode() + text)
    try:
        head, _, document = (await reader.read()).partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(document)
    finally:
        writer.close()


def submissions(url: str, store: Store, count: int) -> None:
    """`count` submissions at once, each sent twice under its key."""
    before = len(store.feed.versions())
    with httpx.Client(timeout=600) as client:
        begun = time.perf_counter()
        checked = client.post(f"{url}/api/v1/specs:check", json={"spec": SUBMITTED, "deep": True})
        assert checked.json()["ok"], checked.text
        print(f"first check of a spec against its model, backroom and all: {time.perf_counter() - begun:.1f} s")

    async def one(number: int) -> tuple[float, int, int]:
        body = {"spec": {**SUBMITTED, "name": f"s{number // 2}"}}
        begun = time.perf_counter()
        status, document = await post(url, "/api/v1/studies", body, f"Idempotency-Key: k{number // 2}")
        return time.perf_counter() - begun, status, int(document.get("id", 0))

    async def all_at_once() -> list[tuple[float, int, int]]:
        return list(await asyncio.gather(*(one(number) for number in range(count))))

    found = asyncio.run(all_at_once())
    said(f"{count} submissions at once, each key twice", [seconds for seconds, _, _ in found])
    made = len(store.feed.versions()) - before
    codes = {code: sum(c == code for _, c, _ in found) for code in sorted({c for _, c, _ in found})}
    ids = [found[2 * pair][2] == found[2 * pair + 1][2] for pair in range(count // 2)]
    print(f"    {made} studies of {count // 2} keys; answers {codes}; both of a key the same: {all(ids)}")


async def follow(url: str, seen: dict[str, Any], until: float, rng: random.Random) -> None:
    """One client: follows, breaks off now and then, and comes back where it was."""
    host, port = url.removeprefix("http://").split(":")
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**24)
        last = f"Last-Event-ID: {seen['last']}\r\n" if seen["last"] is not None else ""
        path = f"/api/v1/studies/followed/events?since={seen['start']}"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{last}\r\n".encode())
        leaves = time.monotonic() + rng.uniform(5, 60)
        try:
            while time.monotonic() < min(until, leaves):
                line = await asyncio.wait_for(reader.readline(), 30)
                if not line:
                    break
                if line.startswith(b"id: "):
                    seen["id"] = int(line[4:])
                elif line.startswith(b"data: "):
                    data = json.loads(line[6:])
                    seen["chain"].append((data["since"], seen["id"]))
                    seen["last"] = seen["id"]
                    seen["times"].append((seen["id"], time.monotonic()))
        except TimeoutError:
            pass
        finally:
            seen["reconnects"] += 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def events(url: str, process: psutil.Process, store: Store, clients: int, seconds: float) -> None:
    """`clients` that follow a study which changes twice a second."""
    spec = build_spec({"model": {"id": "demo:smollm2"}, "name": "followed"})
    study, _ = store.queue.submit(None, None, "x", spec, Prepared(OBJECTIVES, {}))
    known = Assignment({"l": parse_scheme("rtn-int4-g64")})
    store.start_trial(study.id, 0, known, "sampler")
    start = store.study(study.id).changes
    committed: dict[int, float] = {}
    stop = threading.Event()

    def change() -> None:
        while not stop.wait(0.5):
            store.remarks.put(study.id, 0, f"{time.time()}", [], None)
            committed[store.study(study.id).changes] = time.monotonic()

    found = [{"start": start, "last": None, "chain": [], "times": [], "reconnects": 0} for _ in range(clients)]

    async def everybody() -> list[int]:
        until = time.monotonic() + seconds
        rng = random.Random(2)
        tasks = [asyncio.create_task(follow(url, seen, until, rng)) for seen in found]
        memory = []
        while time.monotonic() < until:
            await asyncio.sleep(min(5.0, seconds / 6))
            memory.append(process.memory_info().rss)
            if time.monotonic() > until - 4:
                stop.set()  # what was changed last is to arrive too
        await asyncio.gather(*tasks)
        return memory

    writer = threading.Thread(target=change)
    writer.start()
    memory = asyncio.run(everybody())
    stop.set()
    writer.join()
    end = store.study(study.id).changes
    delays = [at - committed[number] for seen in found for number, at in seen["times"] if number in committed
              and (number == start or seen["reconnects"] >= 0) and at - committed[number] < 60]  # fmt: skip
    said(f"{clients} clients for {seconds:.0f} s: an event after its commit", delays)
    whole = 0
    for seen in found:
        reached, fine = start, True
        for since, upto in seen["chain"]:
            fine = fine and since <= reached
            reached = max(reached, upto)
        whole += fine and reached == end
    grown = (max(memory[1:] or memory) - memory[0]) / 1e6
    print(f"    {whole} of {clients} have all {end - start} changes, after {sum(s['reconnects'] for s in found)} "
          f"connections; server memory grew by {grown:.1f} MB (from {memory[0] / 1e6:.0f} MB)")  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--submissions", type=int, default=200)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--long", action="store_true", help="follow events for 10 minutes")
    parser.add_argument("--db", help="a PostgreSQL URL instead of a new SQLite file")
    parser.add_argument("--only", choices=["submissions", "reads", "events"])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        db = options.db or str(Path(folder) / "autoq.db")
        with Store.open(db) as store, server(db) as (url, process):
            print(f"load {psutil.getloadavg()[0]:.1f}, database {re.sub(r'.*/', '', store.url)}")
            if options.only in (None, "submissions"):
                submissions(url, store, options.submissions)
            if options.only in (None, "reads"):
                fill(store, options.trials)
                reads(url, store, options.trials, options.repeats)
            if options.only in (None, "events"):
                events(url, process, store, options.clients, 600.0 if options.long else options.seconds)


if __name__ == "__main__":
    main()
