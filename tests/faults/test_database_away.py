"""A database that goes away in the middle of writes: stopped, restarted, killed, cut off, and silent after a commit."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import threading
import time

import pytest
import sqlalchemy as sa

from autoq.errors import LeaseLost, StoreAway, StoreError
from autoq.search import holding as holdings
from autoq.search.controller import create_study, run_study
from autoq.store import Store
from autoq.store import database as databases

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TRIALS = 24
COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"


@pytest.fixture(scope="module")
def server(postgresql):
    server = postgresql.Server(postgresql.binaries())
    yield server
    server.stop()


@pytest.fixture(scope="module")
def spec(made_up, tiny_model_dir):
    return lambda **more: made_up.spec(tiny_model_dir("llama"), **({"trials": TRIALS} | more))


@pytest.fixture(scope="module")
def whole(made_up, spec, tmp_path_factory):
    """What a study of a seed comes to without any fault."""
    with Store.open(str(tmp_path_factory.mktemp("whole") / "autoq.db")) as store:
        known = {}

        def of(seed, sampler="random"):
            if (seed, sampler) not in known:
                study = create_study(store, spec(seed=seed, sampler=sampler))
                run_study(store, study.id, make=made_up.make)
                known[seed, sampler] = made_up.outcome(store, study)
            return known[seed, sampler]

        yield of


@pytest.fixture
def beats(monkeypatch):
    """Leases that end soon, so that every outage outlasts them."""
    monkeypatch.setattr(holdings, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(holdings, "BEAT_SECONDS", 0.1)


@pytest.fixture
def patient(monkeypatch):
    """Set for how long a study waits."""
    return lambda text: monkeypatch.setenv("AUTOQ_DB_WAIT", text)


def halt(mode):
    def fault(server, dice):
        server.halt(mode)
        time.sleep(dice.uniform(0, 0.7))
        server.start()

    return fault


def kill_server(server, dice):
    server.kill()
    time.sleep(dice.uniform(0, 0.7))
    server.start()


def kill_backend(server, dice):
    """One of its processes dies; it ends all others and recovers by itself."""
    with contextlib.suppress(sa.exc.OperationalError, ProcessLookupError, IndexError):
        os.kill(dice.choice(server.backends()), signal.SIGKILL)


def terminate(server, dice):
    with contextlib.suppress(sa.exc.OperationalError):
        server.terminate()


FAULTS = {
    "stopped": halt("fast"),
    "crashed": halt("immediate"),
    "killed": kill_server,
    "backend-killed": kill_backend,
    "terminated": terminate,
}


def test_a_server_that_goes_down_in_the_middle_of_writes_pauses_the_study(
    server, spec, whole, made_up, beats, rounds, record_testsuite_property
):
    """All of them in one study, each a random moment after a trial was stored."""
    dice, counts, paused = random.Random(1), dict.fromkeys(FAULTS, 0), 0
    for turn in range(rounds(1, 50)):
        names = dice.sample(list(FAULTS), len(FAULTS))
        moments = dict(zip(sorted(dice.sample(range(1, TRIALS - 2), len(names))), names, strict=True))
        wanted, problems = threading.Semaphore(0), []
        queue = []

        def each(trial, moments=moments, queue=queue, wanted=wanted):
            if (name := moments.pop(trial.number, None)) is not None:
                queue.append(name)
                wanted.release()

        def inject(queue=queue, wanted=wanted, problems=problems):
            try:
                for _ in FAULTS:
                    if not wanted.acquire(timeout=600) or not queue:
                        return
                    time.sleep(dice.uniform(0, 0.05))
                    name = queue.pop(0)
                    FAULTS[name](server, dice)
                    counts[name] += 1
            except BaseException as problem:
                problems.append(problem)

        witness = made_up.Witness(each)
        with Store.open(server.fresh()) as store:
            study = create_study(store, spec(seed=turn % 4))
            injector = threading.Thread(target=inject)
            injector.start()
            try:
                run_study(store, study.id, witness, made_up.make)
            finally:
                for _ in FAULTS:
                    wanted.release()
                injector.join()
                if problems:  # what comes of it says nothing of the study
                    raise problems[0]
            while not reachable(store, study.id):  # the last fault may have come after the last trial
                time.sleep(0.1)
            made_up.check(store, study, witness, whole(turn % 4))
        told = [note for note in witness.notes if "waiting for it" in note]
        assert len(told) == len([note for note in witness.notes if note.startswith("the database answers again")])
        for note in told:
            assert re.match(r"the database '[^']*' [^\n]*; waiting for it, 10 min at most(; [^\n]* is kept)?$", note)
            assert "s3cret" not in note
        paused += len(told)
    assert paused > 0
    record_testsuite_property("database faults", f"{counts}, {paused} pauses")


class Cutter:
    """Stands between the study and its server. Of `chance` of all commits it cuts the connection: before the server
    hears of it, or after it has answered, which nobody hears. Then it lets nobody in for a moment."""

    def __init__(self, port, seed, chance):
        self.server, self.dice, self.chance = port, random.Random(seed), chance
        self.before = self.after = self.refused = 0
        self.closed = 0.0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if time.monotonic() < self.closed:
                self.refused += 1
                client.close()
                continue
            upstream = socket.create_connection(("127.0.0.1", self.server))
            state = {"cut": False}
            threading.Thread(target=self.forward, args=(client, upstream, state), daemon=True).start()
            threading.Thread(target=self.back, args=(upstream, client, state), daemon=True).start()

    def forward(self, client, upstream, state):
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                if data == COMMIT and self.dice.random() < self.chance:
                    self.closed = time.monotonic() + self.dice.uniform(0, 0.3)
                    if self.before <= self.after:  # by turns: each has to be there
                        self.before += 1
                        break
                    state["cut"] = True
                    self.after += 1
                upstream.sendall(data)
        if not state["cut"]:
            self.end(client, upstream)

    def back(self, upstream, client, state):
        with contextlib.suppress(OSError):
            while data := upstream.recv(1 << 16):
                if state["cut"]:
                    break
                client.sendall(data)
        self.end(client, upstream)

    @staticmethod
    def end(*sockets):
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def close(self):
        self.listener.close()


def test_a_commit_that_nobody_answers_is_neither_lost_nor_repeated(
    server, spec, whole, made_up, beats, rounds, record_testsuite_property
):
    before = after = refused = 0
    for turn in range(rounds(1, 25)):
        url = sa.make_url(server.fresh())
        with Store.open(url.render_as_string(hide_password=False)) as direct:
            study = create_study(direct, spec(seed=turn % 4))
            cutter = Cutter(server.port, turn, 0.2)
            witness = made_up.Witness()
            through = url.set(port=cutter.port).render_as_string(hide_password=False)
            try:
                # Only what the study does goes through it.
                chance, cutter.chance = cutter.chance, 0.0
                with Store.open(through) as store:
                    with holdings.holding(store, study.id) as hold:
                        cutter.chance = chance
                        run_study(store, study.id, witness, made_up.make, hold)
                        cutter.chance = 0.0
                    attempts = {trial.number: trial.attempt for trial in direct.trials(study.id)}
            finally:
                cutter.close()
            made_up.check(direct, study, witness, whole(turn % 4))
            # Nothing was sent out again, and nothing was taken for somebody else's result.
            assert set(attempts.values()) == {1}
            assert not [note for note in witness.notes if "late result" in note]
        before, after, refused = before + cutter.before, after + cutter.after, refused + cutter.refused
    assert before > 0 and after > 0
    record_testsuite_property("commits cut", f"{before} before, {after} after, {refused} connections refused")


@pytest.fixture(scope="module")
def elsewhere(postgresql, networks):
    """A server in another network, and the cable to it."""
    network = networks.network_or_skip(networks.try_network())
    try:
        server = postgresql.Server(postgresql.binaries(), network)
        yield server, network
        network.mend()
        server.stop()
    finally:
        network.close()


@pytest.fixture
def soon(monkeypatch, rounds):
    """Clocks by which a silent connection ends: short ones, but in the long form."""
    short = {"keepalives_idle": 1, "keepalives_interval": 1, "keepalives_count": 2, "tcp_user_timeout": 2000}
    monkeypatch.setattr(databases, "_KEEPALIVE", rounds(short, databases._KEEPALIVE))
    monkeypatch.setattr(databases, "CONNECT_SECONDS", rounds(2, databases.CONNECT_SECONDS))
    monkeypatch.setattr(databases, "STALLED_SECONDS", rounds(3, databases.STALLED_SECONDS))


def reachable(store, study_id):
    """Whether the database answers; the kernel remembers for a second that nobody did."""
    try:
        return store.study(study_id) is not None
    except StoreAway:
        return False


def test_a_network_that_drops_everything_in_silence_pauses_the_study(
    elsewhere, soon, spec, whole, made_up, beats, rounds, record_testsuite_property
):
    """No connection is refused or closed: all of them end by the clock, of which the short form has a fast one."""
    (server, network), dice, silent = elsewhere, random.Random(7), []

    class Watcher(made_up.Witness):
        """Cuts the cable a random moment after a trial, and mends it once the study has said that it waits."""

        def __init__(self):
            super().__init__(self.cut_after)
            self.moments = set(dice.sample(range(1, TRIALS - 3), 2))
            self.cut_at, self.knife = None, None

        def cut_after(self, trial):
            if trial.number in self.moments:
                self.knife = threading.Timer(dice.uniform(0, 0.02), self.cut)
                self.knife.start()
                if trial.number == max(self.moments):
                    self.knife.join()  # or the study might be through before

        def cut(self):
            self.cut_at = time.monotonic()
            network.cut()

        def note(self, text):
            super().note(text)
            if "waiting for it" in text:
                silent.append(time.monotonic() - self.cut_at)
                network.mend()

    for turn in range(rounds(1, 5)):
        with Store.open(server.fresh()) as store:
            study = create_study(store, spec(seed=turn % 4))
            witness = Watcher()
            run_study(store, study.id, witness, made_up.make)
            witness.knife.join()
            network.mend()  # where nothing was written after it
            while not reachable(store, study.id):
                time.sleep(0.1)
            made_up.check(store, study, witness, whole(turn % 4))
        for note in witness.notes:
            assert re.match(r"the database ('[^']*' cannot be reached: [^\n]*; waiting for it|answers again)", note), (
                note
            )
            assert "s3cret" not in note
    assert silent
    record_testsuite_property("cables cut", f"{len(silent)}, noticed after {max(silent):.0f} s at most")
    print(f"seed 7: {len(silent)} cuts noticed after {min(silent):.1f} to {max(silent):.1f} s, 0 lost, 0 doubled")


def test_who_is_cut_off_within_a_statement_holds_no_lock_for_hours(elsewhere, soon, spec):
    """A server waits for the rest of a statement, with its locks, as long as its connection seems to live."""
    server, network = elsewhere
    address = server.fresh()
    with Store.open(address) as store:
        study = create_study(store, spec())
        with store._database._engine.connect() as connection:
            client = connection.connection.driver_connection.pgconn
            client.enter_pipeline_mode()
            client.send_query_params(b"SELECT id FROM studies WHERE id = $1 FOR UPDATE", [str(study.id).encode()])
            client.send_flush_request()  # and no Sync
            client.flush()
            while client.is_busy():
                client.consume_input()
            assert client.get_result().ntuples == 1
            network.cut()
            try:
                local = sa.make_url(address).set(host=str(server.folder))
                with sa.create_engine(local, poolclass=sa.NullPool).begin() as beside:
                    beside.exec_driver_sql("SET lock_timeout = '120s'")
                    beside.exec_driver_sql("SELECT id FROM studies FOR UPDATE")
            finally:
                network.mend()
                connection.invalidate()


def test_a_study_gives_up_after_the_limit_and_goes_on_when_it_is_resumed(
    server, spec, whole, made_up, beats, monkeypatch
):
    monkeypatch.setenv("AUTOQ_DB_WAIT", "1s")
    with Store.open(server.fresh()) as store:
        study = create_study(store, spec())

        def stop(trial):
            if trial.number == 5:
                server.halt("immediate")

        witness = made_up.Witness(stop)
        started = time.monotonic()
        try:
            with pytest.raises(StoreAway) as said:
                run_study(store, study.id, witness, made_up.make)
            assert time.monotonic() - started < holdings.WAIT_SECONDS / 2
            assert re.fullmatch(
                r"the database '\S+' [^\n]*, after 1 s of waiting[^\n]*; go on with: autoq resume made-up",
                str(said.value),
            )
            assert said.value.exit_code == 1
        finally:
            server.start()
        assert store.study(study.id).state == "running"
        again = made_up.Witness()
        run_study(store, study.id, again, made_up.make)
        made_up.check(store, study, again, whole(0))
        assert set(range(6)) <= set(witness.acknowledged)


def test_an_interrupt_ends_the_wait(server, spec, whole, made_up, beats):
    with Store.open(server.fresh()) as store:
        study = create_study(store, spec())

        def stop(trial):
            if trial.number == 5:
                server.halt("fast")
                threading.Timer(0.7, signal.raise_signal, [signal.SIGINT]).start()

        started = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                run_study(store, study.id, made_up.Witness(stop), made_up.make)
            assert time.monotonic() - started < holdings.WAIT_SECONDS / 2
        finally:
            server.start()
        run_study(store, study.id, None, made_up.make)
        made_up.check(store, study, None, whole(0))


def test_who_was_taken_over_during_a_pause_is_fenced(server, spec, whole, made_up, beats, patient):
    """Its lease ends while it is cut off, another one takes the study; what it kept is thrown away."""
    patient("90s")
    url = sa.make_url(server.fresh())
    with Store.open(url.render_as_string(hide_password=False)) as direct:
        study = create_study(direct, spec())
        cutter = Cutter(server.port, 0, 0.0)
        other = made_up.Witness()
        alone, taken = threading.Event(), threading.Event()

        def cut(trial):
            if trial.number == 5:
                alone.set()
                cutter.closed = time.monotonic() + 3600
                server.terminate()

        def take_over():
            assert alone.wait(60)
            while direct.queue.lease(study.id).live:
                time.sleep(0.05)
            with holdings.holding(direct, study.id) as hold:
                taken.set()
                cutter.closed = 0.0
                run_study(direct, study.id, other, made_up.make, hold)

        witness = made_up.Witness(cut)
        with Store.open(url.set(port=cutter.port).render_as_string(hide_password=False)) as store:
            # The same host and process hold it, so only the clock says that the lease has ended.
            rival = threading.Thread(target=take_over)
            rival.start()
            with pytest.raises(LeaseLost):
                run_study(store, study.id, witness, made_up.make)
            rival.join()
        cutter.close()
        assert taken.is_set()
        assert direct.queue.lease(study.id).epoch == 2
        made_up.check(direct, study, other, whole(0))


def test_a_database_that_another_program_locks_for_long(spec, whole, made_up, tmp_path, beats):
    path = tmp_path / "autoq.db"
    with Store.open(f"sqlite:///{path}?timeout=0.1") as store:
        study = create_study(store, spec())
        blocker = sa.create_engine(f"sqlite:///{path}", poolclass=sa.NullPool).connect()

        def lock(trial):
            if trial.number == 5:
                blocker.exec_driver_sql("BEGIN IMMEDIATE")

        class Waits(made_up.Witness):
            def note(self, text):
                super().note(text)
                if "waiting for it" in text:
                    blocker.rollback()

        witness = Waits(lock)
        run_study(store, study.id, witness, made_up.make)
        blocker.close()
        assert any("stays locked by another process; try again; waiting for it" in note for note in witness.notes)
        made_up.check(store, study, witness, whole(0))


@pytest.mark.parametrize("what", ["deleted", "replaced", "moved"])
def test_a_file_that_is_taken_away_under_a_study(spec, made_up, tmp_path, what, beats):
    path = tmp_path / "autoq.db"
    with Store.open(str(path)) as store:
        study = create_study(store, spec())

        def take(trial):
            if trial.number == 5:
                if what == "moved":
                    path.rename(tmp_path / "elsewhere.db")
                else:
                    path.unlink()
                if what == "replaced":
                    path.write_bytes(b"")

        witness = made_up.Witness(take)
        with pytest.raises(
            StoreError, match=r"^the database '\S+' was deleted, moved or replaced while it was in use; "
        ):
            run_study(store, study.id, witness, made_up.make)
    assert max(witness.acknowledged) == 5
