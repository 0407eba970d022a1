"""The three parts of a text: disjoint, stable, spread, and refused in one line where they cannot be."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.calibration import text
from autoq.calibration.text import load_text, windows
from autoq.errors import DataRefused
from autoq.spec import DataSpec


class Counter:
    """A tokenizer whose tokens are the text's words, each a number, so that tokens tell where they stood."""

    def __init__(self, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> None:
        self.before, self.after = list(before), list(after)

    def __call__(self, content: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = [int(word) if word.isdigit() else 0 for word in content.split()]
        return {"input_ids": self.before + ids + self.after if add_special_tokens else ids}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "numbers.txt"
    file.write_text(" ".join(map(str, range(10_000))))
    return file


def spec(source: object, **values) -> DataSpec:
    small = {"calibration_tokens": 64, "search_tokens": 48, "report_tokens": 160, "window_tokens": 16}
    return DataSpec(source=str(source), **(small | values))


def refusal(data: DataSpec, max_positions: int | None = None) -> str:
    with pytest.raises(DataRefused) as caught:
        windows(data, Counter(), max_positions)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parts_have_the_tokens_that_were_asked_for_and_share_none(numbers):
    parts = windows(spec(numbers), Counter(), None)
    assert (parts.calibration.shape, parts.search.shape, parts.report.shape) == ((4, 16), (3, 16), (10, 16))
    together = torch.cat([parts.calibration, parts.search, parts.report]).flatten()
    assert together.dtype == torch.int64
    assert len(together.unique()) == len(together) == 17 * 16


def test_windows_are_consecutive_text_and_spread_over_it(numbers):
    parts = windows(spec(numbers, report_tokens=16 * 100), Counter(), None)
    assert torch.equal(parts.report - parts.report[:, :1], torch.arange(16).expand(100, -1))
    quarters = torch.bincount(parts.report[:, 0] // 2500, minlength=4)
    assert int(quarters.min()) >= 15


@settings(max_examples=40, deadline=None)
@given(
    calibration=st.integers(8, 900),
    search=st.integers(8, 900),
    report=st.tuples(st.integers(8, 3000), st.integers(8, 3000)),
    window=st.integers(8, 64),
    seed=st.integers(0, 5),
)
def test_report_tokens_change_nothing_but_the_report(numbers, calibration, search, report, window, seed):
    values = {"calibration_tokens": calibration, "search_tokens": search, "window_tokens": window, "seed": seed}
    one, two = (windows(spec(numbers, report_tokens=count, **values), Counter(), None) for count in report)
    assert torch.equal(one.calibration, two.calibration)
    assert torch.equal(one.search, two.search)
    fewer = min(len(one.report), len(two.report))
    width = min(one.report.shape[1], two.report.shape[1])
    assert torch.equal(one.report[:fewer, :width], two.report[:fewer, :width])
    for parts, count in ((one, report[0]), (two, report[1])):
        assert parts.calibration.numel() <= calibration < parts.calibration.numel() + window
        assert parts.report.numel() <= count < parts.report.numel() + window
        together = torch.cat([part.flatten() for part in (parts.calibration, parts.search, parts.report)])
        assert len(together.unique()) == len(together)


def test_the_seed_draws_other_windows(numbers):
    one, same, other = (windows(spec(numbers, seed=seed), Counter(), None) for seed in (0, 0, 1))
    assert torch.equal(one.search, same.search)
    assert not torch.equal(one.search, other.search)


def test_windows_shrink_to_the_model_and_to_the_part(numbers):
    parts = windows(spec(numbers, window_tokens=512, calibration_tokens=100, report_tokens=10), Counter(), 32)
    assert (parts.calibration.shape, parts.search.shape, parts.report.shape) == ((3, 32), (1, 32), (1, 10))
    assert "a window needs 8" in refusal(spec(numbers), max_positions=4)
    assert "data.search_tokens is 7; the least is 8" in refusal(spec(numbers, search_tokens=7))


def test_every_window_is_framed_as_the_tokenizer_frames_a_text(numbers):
    parts = windows(spec(numbers), Counter((70001,), (70002, 70003)), None)
    for part in (parts.calibration, parts.search, parts.report):
        assert part.shape[1] == 16
        assert set(part[:, 0].tolist()) == {70001}
        assert part[:, -2:].unique(dim=0).tolist() == [[70002, 70003]]
        assert torch.equal(part[:, 1:-2] - part[:, 1:2], torch.arange(13).expand(len(part), -1))


def test_a_real_tokenizer_round_trips(tiny_models):
    tokenizer = tiny_models.tokenizer(single="<s> $A")
    parts = windows(DataSpec(window_tokens=64, report_tokens=640), tokenizer, 64)
    assert set(parts.report[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert all(tokenizer.decode(window[1:]) in load_text(DataSpec()) for window in parts.report)


def test_too_little_text_names_what_is_needed_and_what_is_there(tmp_path):
    (tmp_path / "short.txt").write_text(" ".join(map(str, range(100))))
    line = refusal(spec(tmp_path / "short.txt"))
    assert "has 100 tokens, which is 6 windows of 16; 17 are needed (calibration 4, search 3, report 10)" in line


def test_the_default_source_is_large_and_deterministic():
    docs = load_text(DataSpec())
    assert len(docs) > 400_000
    assert docs == load_text(DataSpec())


def test_files_and_folders(tmp_path):
    (tmp_path / "b.md").write_text("two", encoding="utf-8-sig")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("thrée")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "z.py").write_text("not text")
    assert load_text(spec(tmp_path)) == "one\n\ntwo\n\nthrée"
    assert load_text(spec(tmp_path / "z.py")) == "not text"


def test_long_texts_are_cut_at_a_fixed_place(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("é" * 7)
    (tmp_path / "b.txt").write_text("ü" * 50)
    assert load_text(spec(tmp_path)) == "é" * 7 + "\n\n" + "üüü"
    (tmp_path / "c.txt").write_bytes(b"a" + "é".encode() * 100)
    assert load_text(spec(tmp_path / "c.txt")) == "a" + "é" * 9


def test_what_is_not_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    assert "is not UTF-8 (byte 3 of 12)" in refusal(spec(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    assert "holds no text" in refusal(spec(tmp_path / "empty.txt"))
    for missing in ("/no/such.txt", "missing.txt", "notes/missing.md"):
        assert "there is no such file or folder" in refusal(spec(missing))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_dict({"text": ["one", "", "two"], "other": ["a", "b", "c"], "label": [1, 2, 3]})
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(str(folder / "dict"))
    rows.save_to_disk(str(folder / "single"))
    (folder / "lines").mkdir()
    rows.to_json(str(folder / "lines" / "train.jsonl"))
    return folder


class TestDatasets:
    @pytest.mark.filterwarnings("ignore::ResourceWarning")
    def test_saved_and_plain_folders(self, saved, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        assert load_text(spec(saved / "dict")) == "one\n\ntwo"
        assert load_text(spec(saved / "dict", split="test", column="other")) == "c"
        assert load_text(spec(saved / "single")) == "one\n\ntwo"
        assert load_text(spec(saved / "lines")) == "one\n\ntwo"

    def test_wrong_split_and_column_list_the_choices(self, saved):
        assert "data.split 'dev' is not in" in refusal(spec(saved / "dict", split="dev"))
        assert "choose from test, train" in refusal(spec(saved / "dict", split="dev"))
        assert "choose from label, other, text" in refusal(spec(saved / "single", column="body"))
        assert "not text" in refusal(spec(saved / "single", column="label"))

    def test_a_name_without_a_network_says_what_to_do(self):
        line = refusal(spec("nobody/no-such-dataset"))
        assert "cannot be loaded as a dataset" in line
        assert "python-docs" in line

    def test_without_the_package_it_says_what_to_install(self, saved, monkeypatch):
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name == "datasets" else real(name, *a)
        )
        assert "pip install 'autoq[datasets]'" in refusal(spec(saved / "single"))


def test_what_is_neither_a_file_nor_a_folder_is_not_looked_up_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(DataRefused, match="there is no such file or folder"):
        load_text(DataSpec(source="pipe"))
