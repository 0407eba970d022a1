"""Accuracy of image classifiers: rows, labels by name and number, and what cannot be an example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from autoq.errors import DataRefused
from autoq.layer import Images, ModelInfo
from autoq.spec import TaskSpec
from autoq.tasks import Examples, Source
from autoq.tasks.kinds.labels import Labels

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tiny_vision, tmp_path_factory) -> Path:
    return tiny_vision.folder_of_images(tmp_path_factory.mktemp("images"), 60, seed=2)


def info_of(*labels: str) -> ModelInfo:
    return ModelInfo("Tiny", "classification", "bfloat16", 0, 17, (), 0, labels, images=Images(3, 16, 16, 17))


def source_of(folder: object, search: int = 20, report: int = 40, **fields: Any) -> Source:
    spec = TaskSpec(source=str(folder), search_examples=search, report_examples=report, **fields)
    return Source("mine", spec, 0)


def refused(source: Source, info: ModelInfo) -> str:
    with pytest.raises(DataRefused) as caught:
        Labels().read(source, info)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(folder: Path, labels: Any, feature: Any, column: str = "label") -> Path:
    """A saved dataset whose image number i is of one colour that tells its label's place."""
    pictures = [PIL.Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), column: feature})
    datasets.Dataset.from_dict({"image": pictures, column: labels}, features=features).save_to_disk(folder)
    return folder


def labels_of(examples: Examples) -> dict[int, int]:
    """The place of an image in its source -> its label."""
    from autoq.calibration.images import decoded

    rows = (*examples.search, *examples.report)
    return {int(np.asarray(decoded(row["image"], 3))[0, 0, 0]): row["label"] for row in rows}


def test_no_example_is_in_two_parts(folder, tiny_vision):
    examples = Labels().read(source_of(folder), info_of(*tiny_vision.CLASSES))
    rows = [*examples.search, *examples.report]
    assert len({row["image"] for row in rows}) == 60
    fewer = Labels().read(source_of(folder, report=10), info_of(*tiny_vision.CLASSES))
    assert [row["image"] for row in fewer.search] == [row["image"] for row in examples.search]


@pytest.mark.parametrize(
    ("values", "feature", "own", "expected"),
    [
        (["b", "a", "b"], datasets.Value("string"), ("a", "b"), [1, 0, 1]),
        ([1, 0, 1], datasets.Value("int64"), ("a", "b"), [1, 0, 1]),
        ([1, 0, 1], datasets.ClassLabel(names=["a", "b"]), ("a", "b"), [1, 0, 1]),
        ([1, 0, 1], datasets.ClassLabel(names=["b", "a"]), ("a", "b"), [0, 1, 0]),
        ([1, 0, 1], datasets.ClassLabel(names=["b", "a"]), ("LABEL_0", "LABEL_1"), [1, 0, 1]),
        ([1, 0, 1], datasets.ClassLabel(names=["c", "a"]), ("a", "b", "c"), [0, 2, 0]),
    ],
)
def test_labels_are_names_or_numbers(tmp_path, values, feature, own, expected):
    source = source_of(saved(tmp_path / "rows", values, feature), 1, 2)
    assert labels_of(Labels().read(source, info_of(*own))) == dict(enumerate(expected))


def test_columns_may_have_other_names(tmp_path):
    rows = saved(tmp_path / "rows", [0, 1, 1], datasets.Value("int64"), column="class")
    assert "has no column 'label'; choose from class, image" in refused(source_of(rows, 1, 2), info_of("a", "b"))
    found = Labels().read(source_of(rows, 1, 2, columns={"label": "class"}), info_of("a", "b"))
    assert labels_of(found) == {0: 0, 1: 1, 2: 1}
    told = refused(source_of(rows, 1, 2, columns={"text": "class"}), info_of("a", "b"))
    assert told == "tasks.mine.columns: no column 'text'; choose from image, label"


def test_classes_that_the_model_does_not_have(tmp_path):
    for number, (value, feature) in enumerate(
        ((2, datasets.Value("int64")), (-1, datasets.ClassLabel(names=["a", "b"])), ("c", datasets.Value("string")))
    ):
        rows = saved(tmp_path / str(number), [value] * 3, feature)
        told = refused(source_of(rows, 1, 2), info_of("a", "b"))
        assert "tasks.mine: " in told
        assert f"label {str(value)!r} is no class of the model; choose from a, b or 0 to 1" in told
    some = saved(tmp_path / "some", [0, 1, 2], datasets.ClassLabel(names=["a", "b", "c"]))
    assert "label 'c' is no class of the model" in refused(source_of(some, 1, 2), info_of("a", "b"))


def test_too_few_and_damaged_examples(tmp_path, folder, tiny_vision):
    told = refused(source_of(folder, 20, 41), info_of(*tiny_vision.CLASSES))
    assert told.endswith("has 60 examples that differ, and 61 are needed (search_examples 20, report_examples 41): "
                         "ask for fewer")  # fmt: skip
    for index in range(4):
        own = tmp_path / "ab"[index % 2]  # one class alone is none to datasets
        own.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (4, 4), (index, 0, 0)).save(own / f"{index}.png")
    (tmp_path / "a" / "2.png").write_bytes(b"nothing")
    told = refused(source_of(tmp_path, 2, 2), info_of("a", "b"))
    assert "(2.png): it is damaged, or no image of a known format" in told


def test_a_file_of_lines_holds_no_images(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"image": "a.png", "label": 1}\n')
    told = refused(source_of(file), info_of("a", "b"))
    assert told.startswith("tasks.mine.source: ")
    assert told.endswith("is no dataset, and the model reads images; give a folder of images or of data files")
