"""What is said of studies that wait, and to whom."""

from __future__ import annotations

import pytest

from autoq.service.routes.queue import QueueAnswer, text
from autoq.service.shares import Standing


class Look:
    """A scheduler's last look: bob's study holds two of four places, ada's waits for three, another one behind it."""

    alive = True

    def __init__(self, ids):
        mine, theirs, other = ids
        self._waiting = {
            mine: ("", Standing(mine, "room", 1, 3, 2, 4, (theirs,), (theirs,))),
            other: ("", Standing(other, "line", 2, 1, 2, 4)),
        }
        self._widths = {theirs: ("", 2)}

    def standings(self):
        return self._waiting

    def widths(self):
        return self._widths

    def counts(self):
        return {}


@pytest.fixture
def looked(server):
    ids = [server.store.study(name).id for name in ("mine", "theirs", "nobodys")]
    server.app.state.scheduler = Look(ids)
    return server


def test_an_admin_sees_who_has_the_places(looked):
    found = QueueAnswer(**looked.client("bob-admin").get("/api/v1/queue").json()).waiting
    assert [(each.study, each.why, each.position, each.places, each.free, each.total) for each in found] == [
        ("mine", "room", 1, 3, 2, 4),
        ("nobodys", "line", 2, 1, 2, 4),
    ]
    assert [(holder.study, holder.places, holder.leaving) for holder in found[0].holders] == [("theirs", 2, True)]
    assert found[0].text == (
        "Next in line, waits for 3 of 4 places of this server: 2 are free; theirs has 2."
        " A turn ends, and it starts after the trials that are out."
    )
    assert found[1].text == "Waits for 1 of 4 places of this server: 1 study comes before it."


def test_another_users_study_is_not_named(looked):
    answer = looked.client("ada-viewer").get("/api/v1/queue")
    [mine] = QueueAnswer(**answer.json()).waiting
    assert [(holder.study, holder.study_id, holder.places) for holder in mine.holders] == [(None, None, 2)]
    assert "other users have 2" in mine.text
    assert "theirs" not in answer.text


@pytest.mark.parametrize(
    ("standing", "pool", "holders", "said"),
    [
        (Standing(1, "next", 1, 1, 1, 1), "", [], "Starts now on the one place of this server."),
        (
            Standing(1, "room", 1, 1, 0, 1, (2,)), "", [("big", 1)],
            "Next in line, waits for the one place of this server: big has it.",
        ),
        (
            Standing(1, "room", 1, 4, 1, 4, (2,)), "ray://h:1", [(None, 3)],
            "Next in line, waits for 4 of 4 places of the cluster: 1 is free; other users have 3.",
        ),
        (
            Standing(1, "limit", None, 1, 1, 2), "", [],
            "Waits for 1 of 2 places of this server: its owner has as many as one user may have at a time.",
        ),
        (
            Standing(1, "line", 4, 1, 0, 2), "", [],
            "Waits for 1 of 2 places of this server: 3 studies come before it.",
        ),
    ],
)  # fmt: skip
def test_it_is_said_in_a_line(standing, pool, holders, said):
    assert text(standing, pool, holders) == said
