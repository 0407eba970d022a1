"""Files on their way to another machine: whole, right, once, and taken up again."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from autoq.errors import AutoQError
from autoq.spec import StudySpec, build_spec
from autoq.workers import files
from autoq.workers.files import Parcel, Wants, WantsChunk, digest, parcels, placed, supply


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(os.urandom(5000))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "old.bin").write_bytes(b"a pickle, which nothing reads")
    return folder


@pytest.fixture
def spec(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudySpec:
    """A study of that model, on a text and labelled examples, whose other machine sees none of their paths."""
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.md").write_text("text")
    (tmp_path / "labelled.csv").write_text("text,label\nyes,1\n")
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    return build_spec(
        {
            "model": {"id": str(model)},
            "data": {"source": str(tmp_path / "texts")},
            "tasks": {"a.b": {"source": str(tmp_path / "labelled.csv")}},
        }
    )


def elsewhere(own: tuple[Parcel, ...]) -> tuple[Parcel, ...]:
    """The parcels as a machine gets them on which their paths are not."""
    return tuple(Parcel(one.field, f"/nowhere{one.path}", one.single, one.files) for one in own)


def drive(
    steps: Generator[Wants, bytes, StudySpec], own: tuple[Parcel, ...], stop: int = 10**6
) -> tuple[Any, list[Wants]]:
    """Give what is asked for, `stop` times at most; what comes of it, and what was asked."""
    asked: list[Wants] = []
    try:
        wanted = next(steps)
        while len(asked) < stop:
            asked.append(wanted)
            assert isinstance(wanted, WantsChunk)
            wanted = steps.send(supply(wanted, own))
    except StopIteration as end:
        return end.value, asked
    steps.close()
    return None, asked


def test_what_is_there_stays_where_it_is(spec: StudySpec) -> None:
    own = parcels(spec)
    assert [parcel.field for parcel in own] == ["model.id", "tasks.a.b.source", "data.source"]
    assert drive(placed(spec, own), own) == (spec, [])


def test_what_is_not_comes_whole_and_once(spec: StudySpec, tmp_path: Path) -> None:
    own = parcels(spec)
    found, asked = drive(placed(spec, elsewhere(own)), own)
    fetched = tmp_path / "cache" / "fetched"
    folder = Path(found.model.id)
    assert folder.parent == fetched
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "empty.txt", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == Path(spec.model.id, "model.safetensors").read_bytes()
    assert Path(found.data.source, "deep", "a.md").read_text() == "text"
    labelled = Path(found.tasks["a.b"].source)
    assert (labelled.name, labelled.read_text()) == ("labelled.csv", "text,label\nyes,1\n")
    assert len(asked) == 1 + 5 + 1 + 1
    assert drive(placed(spec, elsewhere(own)), own) == (found, [])
    assert not [path for path in fetched.iterdir() if "partial" in path.name]


def test_a_fetch_that_was_cut_off_goes_on_with_the_next_file(spec: StudySpec) -> None:
    own = parcels(spec)
    none, _ = drive(placed(spec, elsewhere(own)), own, stop=4)
    assert none is None
    found, asked = drive(placed(spec, elsewhere(own)), own)
    assert found is not None
    config, weights = (
        next(i for i, f in enumerate(own[0].files) if f.name == n) for n in ("config.json", "model.safetensors")
    )
    assert WantsChunk(0, config, 0) not in asked
    assert [each for each in asked if isinstance(each, WantsChunk) and (each.parcel, each.file) == (0, weights)] == [
        WantsChunk(0, weights, offset) for offset in range(0, 5000, 1000)
    ]


@pytest.mark.parametrize("change", [b"other bytes" * 1000, b"short"])
def test_a_file_that_changes_on_the_way_is_refused(spec: StudySpec, change: bytes) -> None:
    own = parcels(spec)
    Path(spec.model.id, "model.safetensors").write_bytes(change)
    with pytest.raises(AutoQError, match=r"^model\.id: 'model\.safetensors' of .* changed while it was fetched$"):
        drive(placed(spec, elsewhere(own)), own)


def test_a_fetched_file_that_was_damaged_is_fetched_again(spec: StudySpec) -> None:
    own = parcels(spec)
    found, _ = drive(placed(spec, elsewhere(own)), own)
    Path(found.model.id, "model.safetensors").write_bytes(b"x" * 5000)
    again, asked = drive(placed(spec, elsewhere(own)), own)
    assert again == found
    assert len(asked) == 6
    assert (
        Path(found.model.id, "model.safetensors").read_bytes() == Path(spec.model.id, "model.safetensors").read_bytes()
    )


def test_a_file_that_is_gone_is_one_line(spec: StudySpec) -> None:
    own = parcels(spec)
    Path(spec.model.id, "model.safetensors").unlink()
    with pytest.raises(AutoQError, match=r"^a file that a worker on another machine needs cannot be read: "):
        drive(placed(spec, elsewhere(own)), own)


def test_a_cache_without_room_is_one_line(spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = parcels(spec)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        AutoQError, match=r"^model\.id: '/nowhere.*' is not on this machine and cannot be put into its cache"
    ):
        drive(placed(spec, elsewhere(own)), own)


def test_a_large_file_is_hashed_once_until_it_changes(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "REMEMBERED_BYTES", 1)
    path = tmp_path / "large"
    path.write_bytes(b"one")
    first = digest(path)
    monkeypatch.setattr(files, "_hasher", None)  # nothing can be hashed now
    assert digest(path) == first
    monkeypatch.undo()
    path.write_bytes(b"two")
    assert digest(path) != first
