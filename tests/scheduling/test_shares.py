"""Fair shares on a simulated clock: nobody starves, shares follow weights, no slot is given twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.service.shares import Running, Standing, Start, Waiting, Yield, account, decide, standings, weight

QUANTUM, TICK = 60.0, 5.0


@dataclass
class Study:
    """So many seconds of work, in trials of so many."""

    id: int
    owner: str
    priority: int
    arrives: float
    work: float
    trial: float = 10.0
    width: int = 1
    started: float | None = None  # for the first time
    ended: float | None = None
    slice: float = 0.0  # since when it runs
    leaving: float | None = None  # when it will have stopped
    done: float = 0.0


@dataclass
class Pool:
    """A scheduler's thread without the thread."""

    studies: list[Study]
    slots: int
    limit: int | None = None
    now: float = 0.0
    usage: dict[str, float] = field(default_factory=dict)
    running: dict[int, Study] = field(default_factory=dict)
    served: Counter[str] = field(default_factory=Counter)
    yields: int = 0

    def step(self) -> None:
        waiting = [
            Waiting(s.id, s.owner, s.priority, s.arrives, s.width)
            for s in self.studies
            if s.arrives <= self.now and s.ended is None and s.id not in self.running
        ]
        running = [
            Running(s.id, s.owner, s.priority, s.slice, min(s.width, self.slots), s.leaving is not None)
            for s in self.running.values()
        ]
        self.usage = account(self.usage, waiting, running, TICK if self.now else 0.0)
        by_id = {s.id: s for s in self.studies}
        for action in decide(waiting, running, self.usage, self.slots, self.now, QUANTUM, self.limit):
            study = by_id[action.study_id]
            if isinstance(action, Yield):
                assert study.leaving is None
                assert self.now - study.slice >= QUANTUM
                study.leaving = self.now + study.trial
                self.yields += 1
            else:
                assert study.id not in self.running
                study.slice, study.leaving = self.now, None
                study.started = self.now if study.started is None else study.started
                self.running[study.id] = study
        used = sum(min(s.width, self.slots) for s in self.running.values())
        assert used <= self.slots
        self.now += TICK
        for study in list(self.running.values()):
            study.done += TICK
            self.served[study.owner] += TICK * min(study.width, self.slots)
            if study.done >= study.work:
                study.ended = self.now
            if study.ended is not None or (study.leaving is not None and study.leaving <= self.now):
                del self.running[study.id]

    def run(self, until: float) -> Pool:
        while self.now < until and any(s.ended is None for s in self.studies):
            self.step()
        return self


def test_slots_are_filled_by_priority_and_then_in_order():
    waiting = [Waiting(1, "a", 0, 5.0), Waiting(2, "a", 1, 9.0), Waiting(3, "a", 1, 7.0)]
    assert decide(waiting, [], {}, 2, 10.0) == [Start(3), Start(2)]


def test_of_two_owners_the_one_that_had_less_is_served_and_a_free_deal_alternates():
    waiting = [Waiting(i, owner, 0, float(i)) for i, owner in enumerate("aabb")]
    assert decide(waiting, [], {"a": 100.0, "b": 0.0}, 1, 10.0) == [Start(2)]
    assert decide(waiting, [], {"a": 0.0, "b": 0.0}, 3, 10.0) == [Start(0), Start(2), Start(1)]


@pytest.mark.parametrize(
    ("passes", "ran", "leaving", "expected"),
    [
        ({"a": 61.0, "b": 0.0}, 60.0, False, [Yield(1)]),
        ({"a": 61.0, "b": 0.0}, 59.0, False, []),  # not for a quantum yet
        ({"a": 61.0, "b": 61.0}, 500.0, False, []),  # not ahead
        ({"a": 61.0, "b": 0.0}, 500.0, True, []),  # asked already
    ],
)
def test_what_is_ahead_gives_way_after_a_quantum_once(passes, ran, leaving, expected):
    running = [Running(1, "a", 0, 1000.0 - ran, leaving=leaving)]
    assert decide([Waiting(2, "b", 0, 990.0)], running, passes, 1, 1000.0) == expected


def test_a_higher_priority_of_the_same_owner_goes_first_and_an_equal_one_waits():
    running = [Running(1, "a", 0, 0.0)]
    assert decide([Waiting(2, "a", 1, 5.0)], running, {"a": 99.0}, 1, 100.0) == [Yield(1)]
    assert decide([Waiting(2, "a", 0, 5.0)], running, {"a": 99.0}, 1, 100.0) == []


def test_a_wide_study_keeps_slots_free_until_it_has_enough():
    running = [Running(1, "a", 0, 0.0), Running(2, "a", 0, 0.0)]
    waiting = [Waiting(3, "b", 0, 5.0, width=3), Waiting(4, "c", 0, 6.0)]
    passes = {"a": 100.0, "b": 0.0, "c": 0.0}
    # Three slots, one of them free: c's study would fit and does not slip by.
    assert decide(waiting, running, passes, 3, 100.0) == [Yield(1), Yield(2)]
    assert decide(waiting, running, passes, 3, 30.0) == []
    # Wider than all there is: it runs alone.
    assert decide([Waiting(3, "b", 0, 5.0, width=9)], [], {}, 3, 30.0) == [Start(3)]


def test_an_owner_has_no_more_slots_than_its_limit():
    waiting = [Waiting(i, "a", 0, float(i)) for i in range(4)] + [Waiting(9, "b", 0, 9.0)]
    assert decide(waiting, [], {}, 4, 10.0, limit=2) == [Start(0), Start(9), Start(1)]


def test_going_away_forgives_nothing_and_coming_gives_no_credit():
    waits = [Waiting(1, "a", 0, 0.0)]
    usage = account({}, [], [Running(1, "a", 0, 0.0)], 100.0)
    assert usage == {"a": 100.0}
    usage = account(usage, [Waiting(2, "b", 0, 0.0)], [Running(1, "a", 0, 0.0)], 0.0)
    assert usage == {"a": 100.0, "b": 100.0}  # what nobody wanted is no debt
    usage = account(usage, [], [Running(1, "a", 0, 0.0), Running(2, "b", 1, 0.0)], 50.0)
    assert usage == {"a": 150.0, "b": 125.0}
    usage = account(usage, [Waiting(2, "b", 0, 0.0)], [], 5.0)
    assert usage["a"] == 150.0  # it went away
    assert account(usage, waits, [], 5.0)["a"] == 150.0
    assert account(usage, [], [], 5.0) == {}


def test_weights_double_and_are_clipped():
    assert [weight(p) for p in (-9, -3, -1, 0, 1, 3, 9)] == [1 / 8, 1 / 8, 0.5, 1, 2, 8, 8]


@pytest.mark.untraced
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("priorities", [(0, 0), (0, 1, 2), (0, 0, 0, 0), (-1, 0, 2), (3, 0)])
def test_in_the_long_run_shares_are_as_the_weights(slots, priorities):
    """Owners that always have enough to do."""
    studies = [
        Study(100 * o + i, f"o{o}", priority, 0.0, 10**9, trial=7.0)
        for o, priority in enumerate(priorities)
        for i in range(slots)
    ]
    pool = Pool(studies, slots).run(QUANTUM * 600)
    total = sum(pool.served.values())
    assert total >= 0.99 * slots * pool.now  # no slot is idle for long
    weights = [weight(priority) for priority in priorities]
    for o, mine in enumerate(weights):
        share, due = pool.served[f"o{o}"] / total, mine / sum(weights)
        assert share == pytest.approx(due, rel=0.1), pool.served


STUDY = st.tuples(
    st.sampled_from("abcd"),
    st.integers(-4, 4),
    st.integers(0, 400),  # arrives, in ticks
    st.integers(1, 120),  # work, in ticks
    st.integers(1, 8),  # a trial, in ticks
    st.integers(1, 4),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STUDY, min_size=1, max_size=14), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 4)))
def test_every_study_starts_and_ends_within_a_bound(drawn, slots, limit):
    """All the work, one after the other on one slot, bounds when the last one ends; an idle pool starts at once."""
    studies = [
        Study(i, owner, priority, TICK * arrives, TICK * work, TICK * trial, width)
        for i, (owner, priority, arrives, work, trial, width) in enumerate(drawn)
    ]
    pool = Pool(studies, slots, limit)
    last = max(s.arrives for s in studies)
    # While something waits, something runs: a wide one waits for others no longer than a quantum and their trials.
    turns = sum(s.work / QUANTUM + 2 for s in studies)
    bound = last + sum(s.work for s in studies) + turns * (QUANTUM + 8 * TICK + 2 * TICK)
    pool.run(bound)
    assert all(s.ended is not None for s in studies), (pool.now, studies)
    assert all(s.done >= s.work for s in studies)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.data())
def test_who_comes_to_a_full_pool_is_served_within_a_few_quanta(owners, slots, data):
    """However much the others have to do, and have had: the first study of a newcomer starts soon."""
    studies = [
        Study(100 * o + i, f"o{o}", data.draw(st.integers(-3, 3)), 0.0, 10**9, trial=20.0)
        for o in range(owners)
        for i in range(slots)
    ]
    arrives = TICK * data.draw(st.integers(1, 400))
    newcomer = Study(9999, "new", data.draw(st.integers(-3, 3)), arrives, 10**9, trial=20.0)
    pool = Pool([*studies, newcomer], slots)
    # It starts at the least pass there is, so before it comes at most who has the same, each for a quantum's pass:
    # a heavy owner's quantum is 8 · 8 light ones at the utmost.
    pool.run(arrives + owners * (64 * QUANTUM + 20.0) + QUANTUM)
    assert newcomer.started is not None


def test_a_wide_study_waits_for_room_and_the_rest_behind_it():
    waiting = [Waiting(2, "ann", 0, 10.0, 3), Waiting(3, "bob", 0, 20.0, 1), Waiting(4, "ann", 0, 30.0, 9)]
    running = [Running(1, "cid", 0, 0.0, 2, leaving=True)]
    assert standings(waiting, running, {"cid": 60.0}, 4) == [
        Standing(2, "room", 1, 3, 2, 4, running=(1,), leaving=(1,)),
        Standing(3, "line", 2, 1, 2, 4),
        Standing(4, "line", 3, 4, 2, 4),  # as wide as the pool, no wider
    ]


def test_who_has_all_that_one_may_have_waits_for_oneself_alone():
    waiting = [Waiting(2, "ann", 0, 10.0), Waiting(3, "ann", 0, 11.0), Waiting(4, "bob", 0, 20.0)]
    running = [Running(1, "ann", 0, 0.0)]
    assert standings(waiting, running, {}, 2, limit=1) == [
        Standing(4, "next", 1, 1, 1, 2),
        Standing(2, "limit", None, 1, 1, 2),
        Standing(3, "limit", None, 1, 1, 2),
    ]


ONE = st.tuples(st.sampled_from("abc"), st.integers(-3, 3), st.integers(0, 9), st.integers(1, 5))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(ONE, max_size=8),
    st.lists(ONE, max_size=3),
    st.dictionaries(st.sampled_from("abc"), st.floats(0, 500)),
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_what_is_said_of_those_that_wait_is_what_is_done(waits, runs, usage, slots, limit):
    waiting = [Waiting(i, *one) for i, one in enumerate(waits)]
    running = [Running(100 + i, owner, p, float(s), min(w, slots)) for i, (owner, p, s, w) in enumerate(runs)]
    told = standings(waiting, running, usage, slots, QUANTUM, limit)
    started = [
        each.study_id for each in decide(waiting, running, usage, slots, 0.0, QUANTUM, limit) if isinstance(each, Start)
    ]
    assert [each.study_id for each in told if each.why == "next"] == started
    assert sorted(each.study_id for each in told) == [each.study_id for each in waiting]
    assert [each.position for each in told if each.position] == list(range(1, 1 + sum(e.why != "limit" for e in told)))
    assert sum(each.why == "room" for each in told) <= 1
    for each in told:
        assert each.why != "room" or each.width > each.free
