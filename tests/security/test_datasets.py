"""Datasets that lead elsewhere: by their cards, their lists of files, a format's name, or columns of addresses."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoq.calibration.text import load_text, open_dataset
from autoq.errors import DataRefused
from autoq.spec import DataSpec, TaskSpec
from autoq.tasks import Source
from autoq.tasks.data import read_rows

datasets = pytest.importorskip("datasets")

SECRET = "the key is under the mat"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A dataset's folder with a file of its own, and a secret beside the folder."""
    (tmp_path / "secret.jsonl").write_text(json.dumps({"text": SECRET}))
    own = tmp_path / "dataset"
    own.mkdir()
    (own / "own.jsonl").write_text('{"text": "harmless"}')
    return own


class _Listener(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        body = json.dumps({"text": SECRET}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def neighbour(monkeypatch) -> Iterator[http.server.HTTPServer]:
    """A server that only this machine should be able to ask; `asked` are the requests that came."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # or nothing would be asked anyway
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Listener)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def card(folder: Path, **config: object) -> None:
    fields = {"configs": [{"config_name": "default", **config}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(fields)}\n---\n# A dataset\n")


def first_text(source: object, **fields: object) -> str:
    """The text of a dataset's first row, read as a task reads it (as a text, a folder with a README is that README)."""
    task = Source("t", TaskSpec(source=str(source), **fields), 0)
    return next(row["text"] for _, row in read_rows(task, {"text": "what is read"}))


def refused(folder: Path, **fields: object) -> str:
    with pytest.raises(DataRefused) as caught:
        first_text(folder, **fields)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def names(folder: Path, neighbour: http.server.HTTPServer) -> dict[str, dict[str, object]]:
    """Ways in which a card names data outside of its folder."""
    away, url = folder.parent / "secret.jsonl", f"http://127.0.0.1:{neighbour.server_port}/x.jsonl"
    return {
        "absolute": {"data_files": str(away)},
        "above": {"data_files": "../secret.jsonl"},
        "above, in a split": {"data_files": [{"split": "train", "path": ["own.jsonl", "../secret.jsonl"]}]},
        "above, by a folder": {"data_dir": ".."},
        "above, through itself": {"data_files": "x/../../secret.jsonl"},
        "a pattern": {"data_files": "../*.jsonl"},
        "an address": {"data_files": url},
        "a chain": {"data_files": f"simplecache::{url}"},
        "file:": {"data_files": f"file://{away}"},
        "another dataset": {"data_files": "hf://datasets/private/notes/notes.jsonl"},
    }


def test_a_card_leads_nowhere(folder, neighbour):
    for way, config in names(folder, neighbour).items():
        card(folder, **config)
        told = refused(folder)
        assert "outside of itself" in told, (way, told)
    assert neighbour.asked == []


def test_without_the_guard_a_card_does_lead_out(folder, neighbour):
    """The control: what the guard refuses would have been read."""
    card(folder, data_files="../secret.jsonl")
    assert datasets.load_dataset(str(folder))["train"][0]["text"] == SECRET
    card(folder, data_files=f"http://127.0.0.1:{neighbour.server_port}/x.jsonl")
    assert datasets.load_dataset(str(folder))["train"][0]["text"] == SECRET
    assert "/x.jsonl" in neighbour.asked


def test_the_second_file_of_a_card_leads_nowhere_either(folder):
    (folder / datasets.config.REPOYAML_FILENAME).write_text(
        json.dumps({"configs": [{"config_name": "default", "data_files": "../secret.jsonl"}]})
    )
    assert "outside of itself" in refused(folder)


def test_a_card_that_names_its_own_files_is_followed(folder):
    card(folder, data_files=[{"split": "train", "path": "own.jsonl"}])
    assert first_text(folder) == "harmless"
    (folder / "README.md").unlink()
    assert load_text(DataSpec(source=str(folder))) == first_text(folder) == "harmless"


def test_a_format_is_no_dataset(folder, monkeypatch):
    """`json` would be every JSON file of the folder that the server runs in."""
    monkeypatch.chdir(folder)
    for name in ("json", "text", "csv", "parquet", "pandas", "webdataset", "imagefolder"):
        with pytest.raises(DataRefused, match="is no dataset's name"):
            load_text(DataSpec(source=name))
        task = TaskSpec(source=name)
        with pytest.raises(DataRefused, match="is no dataset's name"):
            open_dataset(task, Path(name), "tasks.t", "give a file", ["text"])


def saved(folder: Path, text: str) -> Path:
    datasets.Dataset.from_dict({"text": [text]}).save_to_disk(str(folder))
    return folder


def test_a_saved_dataset_leads_nowhere(tmp_path):
    mine, theirs = saved(tmp_path / "mine", "harmless"), saved(tmp_path / "theirs", SECRET)
    assert load_text(DataSpec(source=str(mine))) == "harmless"
    (arrow,) = theirs.glob("*.arrow")
    state = json.loads((mine / "state.json").read_text())
    for name in (str(arrow), f"../theirs/{arrow.name}", "..", "a/b", None, 3, {}):
        (mine / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
        assert "outside of itself" in refused(mine)
    (mine / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": f"../theirs/{arrow.name}"}]}))
    assert datasets.load_from_disk(str(mine))[0]["text"] == SECRET  # the control


def test_a_saved_datasets_splits_are_its_own(tmp_path):
    saved(tmp_path / "theirs", SECRET)
    both = tmp_path / "both"
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["harmless"]})}).save_to_disk(str(both))
    for split in ("../theirs", str(tmp_path / "theirs"), ".."):
        (both / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
        assert "outside of itself" in refused(both, split=split)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[]", "", "\x00", '"x"', "9" * 5000])
def test_a_saved_dataset_whose_list_is_no_list(tmp_path, content):
    mine = saved(tmp_path / "mine", "harmless")
    (mine / "state.json").write_text(content)
    refused(mine)


def test_columns_that_open_files_and_addresses_are_never_decoded(folder, neighbour):
    """A row of an image is a path or an address, and decoding the row opens it."""
    url = f"http://127.0.0.1:{neighbour.server_port}/x.png"
    (folder / "own.jsonl").write_text(
        json.dumps({"text": "harmless", "label": 1, "picture": {"path": url, "bytes": None}})
    )
    features = [
        {"name": "text", "dtype": "string"},
        {"name": "label", "dtype": "int64"},
        {"name": "picture", "dtype": "image"},
    ]
    tree = {"dataset_info": {"features": features}, "configs": [{"config_name": "default", "data_files": "own.jsonl"}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(tree)}\n---\n")
    task = Source("t", TaskSpec(source=str(folder)), 0)
    rows = [row for _, row in read_rows(task, {"text": "what is read", "label": "what is right"})]
    assert rows == [{"text": "harmless", "label": 1}]
    with pytest.raises(DataRefused, match="holds Image, which is never decoded"):
        list(read_rows(task, {"picture": "what is seen"}))
    assert neighbour.asked == []


def test_a_folder_that_is_moved_is_no_escape(folder, tmp_path):
    """The folder's own name may be a link: what is inside is still inside."""
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert first_text(link) == "harmless"
    card(folder, data_files="../secret.jsonl")
    assert "outside of itself" in refused(link)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '"x"', "[]", "NaN", "\x00"])
def test_lines_of_examples_that_are_no_examples(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "x", "label": 1}}\n{line}\n')
    with pytest.raises(DataRefused):
        list(read_rows(Source("t", TaskSpec(source=str(file)), 0), {"text": "x", "label": "y"}))
