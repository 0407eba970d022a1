"""Tokens, remarks and the feed, on every database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoq.assignment import Assignment
from autoq.errors import BadInput, NotFound, UnknownName
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.spec import build_spec
from autoq.store import Prepared
from autoq.store.feed import Whose

OBJECTIVES = [("kl_nats_per_token", "nats/token", "minimize"), ("size_bytes", "bytes", "minimize")]
ALL = Whose(True)


def made(store, name="demo", owner=None):
    spec = build_spec({"model": {"id": "tiny"}, "name": name})
    return store.queue.submit(owner, None, name, spec, Prepared(OBJECTIVES, {}))[0]


def assignment(index):
    return Assignment({f"l{place}": parse_scheme(f"rtn-int{2 + index // 7**place % 7}-g64") for place in range(4)})


def trial(store, study, number, values=(1.0, 1.0), predicted=None):
    attrs = {} if predicted is None else {"frontier:predicted": predicted}
    started = store.start_trial(study.id, number, assignment(number), "sampler", None, attrs)
    measured = [Measurement(n, v, u, "measured", "search") for (n, u, _), v in zip(OBJECTIVES, values, strict=True)]
    assert store.finish_trial(started.id, 1, measured, {}, 1.0, "local")


def test_a_token_is_known_by_its_secret_alone(store):
    accounts = store.accounts
    assert not accounts.any()
    secret, record = accounts.create("laptop", "ada", "submitter", timedelta(days=90))
    assert secret.startswith("autoq_")
    assert len(secret) == 49
    assert accounts.any()
    assert record.expires_at - record.created_at == timedelta(days=90)
    found = accounts.find(secret)
    assert (found.id, found.user, found.role, found.used_at) == (record.id, "ada", "submitter", None)
    assert datetime.now(UTC) - accounts.list()[0].used_at < timedelta(seconds=30)
    for other in ("", secret[:-1], secret + "x", secret.swapcase(), "autoq_" + "x" * 43, secret.removeprefix("autoq_")):
        assert accounts.find(other) is None
    assert accounts.still(record.id)
    assert accounts.create("again", "ada", "submitter")[0] != secret


def test_a_revoked_or_expired_token_opens_nothing(store):
    accounts = store.accounts
    secret, record = accounts.create("a", "ada", "admin")
    first = accounts.revoke(record.id)
    assert accounts.find(secret) is None
    assert not accounts.still(record.id)
    assert accounts.revoke(record.id).revoked_at == first.revoked_at, "it was revoked then, not now"
    old, gone = accounts.create("b", "ada", "admin", timedelta(microseconds=1))
    assert accounts.find(old) is None
    assert not accounts.still(gone.id)
    assert [token.valid() for token in accounts.list()] == [False, False]
    with pytest.raises(NotFound, match=r"^no token with id 77$"):
        accounts.revoke(77)
    assert not accounts.still(77)


@pytest.mark.parametrize(
    ("name", "user", "role", "kind"),
    [
        ("", "ada", "admin", BadInput), ("x" * 101, "ada", "admin", BadInput), ("a\nb", "ada", "admin", BadInput),
        ("x", "", "admin", BadInput), ("x", "a b", "admin", BadInput), ("x", "a" * 65, "admin", BadInput),
        ("x", "ada", "root", UnknownName),
    ],
)  # fmt: skip
def test_a_token_needs_a_name_a_user_and_a_role(store, name, user, role, kind):
    with pytest.raises(kind):
        store.accounts.create(name, user, role)
    assert not store.accounts.any()


def test_remarks_replace_each_other_and_count_as_a_change(store):
    study = made(store)
    trial(store, study, 0)
    before = store.feed.stamp("demo").changes
    store.remarks.put(study.id, 0, "first", ["a", "b"], "ada")
    last = store.remarks.put(study.id, 0, "zweites ✓", [], None)
    assert store.remarks.of(study.id) == store.remarks.of(study.id, 0) == [last]
    assert store.remarks.of(study.id, 1) == []
    assert store.feed.stamp("demo").changes == before + 2
    for number in (1, -1, 2**40):
        with pytest.raises(NotFound):
            store.remarks.put(study.id, number, "x", [], None)
    assert store.feed.stamp("demo").changes == before + 2, "what was refused changed nothing"
    with pytest.raises(NotFound):
        store.remarks.put(99, 0, "x", [], None)


def test_a_stamp_is_found_by_name_and_by_id(store):
    study = made(store, owner="ada")
    digits = made(store, str(study.id))
    assert store.feed.stamp("demo") == (study.id, "demo", "ada", "queued", study.changes)
    assert store.feed.stamp(str(study.id)).id == digits.id, "a name goes first"
    assert store.feed.stamp("none") is None
    assert store.feed.stamp("99") is None


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 6), st.integers(0, 40), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_chunks_cover_every_change_once_and_never_part_one(store, limit, since, points):
    study = made(store, f"s{len(store.feed.versions())}")
    for number, point in enumerate(points):
        trial(store, study, number, tuple(map(float, point)))
    changed = {t.number: t.changed for t in store.trials(study.id)}
    wanted = {number for number, change in changed.items() if change > since}
    seen, at = [], since
    for _ in range(200):
        chunk = store.feed.chunk(study.id, at, limit)
        assert all(at < t.changed <= chunk.upto for t in chunk.trials)
        seen += [t.number for t in chunk.trials]
        if chunk.upto <= at:
            break
        at = chunk.upto
        if at == store.feed.versions([study.id])[study.id]:
            break
    assert sorted(seen) == sorted(wanted)


def test_a_chunk_of_a_study_that_is_gone(store):
    with pytest.raises(NotFound):
        store.feed.chunk(99, 0, 10)


def test_lists_are_for_those_who_may_see_them(store):
    for name, owner in (("one", "ada"), ("Two", "bob"), ("thr_ee", "ada"), ("four", None)):
        made(store, name, owner)
    feed, ada = store.feed, Whose(False, "ada")

    def names(whose, **how):
        return [study.name for study in feed.studies(whose, **how)]

    assert names(ALL, sort="created") == ["one", "Two", "thr_ee", "four"]
    assert names(ada) == ["thr_ee", "one"]
    assert names(Whose(False, None)) == [], "nobody in particular owns nothing"
    assert names(ALL, search="t", sort="created") == ["Two", "thr_ee"]
    assert names(ALL, search="_") == ["thr_ee"]
    assert names(ALL, owner="bob") == ["Two"]
    assert names(ALL, states=["running"]) == []
    assert names(ALL, limit=2) == ["four", "thr_ee"]
    assert feed.total(ada)[0] == 2
    assert feed.owned(ada) == {feed.stamp("one").id, feed.stamp("thr_ee").id}
    before = feed.total(ada)
    made(store, "five", "bob")
    assert feed.total(ada) == before, "what one does not see changes nothing"


def test_predictions_are_those_that_are_new(store):
    study = made(store)
    trial(store, study, 0, (1.0, 1.0), 0.9)
    trial(store, study, 1, (2.0, 1.0))
    seen = store.feed.stamp("demo").changes
    trial(store, study, 2, (3.0, 1.0), 3.3)
    assert store.feed.predictions(study.id, "kl_nats_per_token", -1) == {0: (0.9, 1.0), 2: (3.3, 3.0)}
    assert store.feed.predictions(study.id, "kl_nats_per_token", seen) == {2: (3.3, 3.0)}
    assert store.feed.predictions(study.id, "nothing", -1) == {}


def test_counts_are_by_state(store):
    study = made(store)
    trial(store, study, 0)
    store.start_trial(study.id, 1, assignment(1), "sampler")
    studies, trials, workers = store.feed.counts()
    assert studies == {"queued": 1}
    assert (trials["complete"], trials["running"], trials["failed"]) == (1, 1, 0)
    assert workers == {}
