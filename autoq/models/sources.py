"""Where a model comes from, and what is refused before a byte of its weights is read.

A model id is a demo model (`demo:smollm2`), a folder, a GGUF file, or a name on the Hugging Face hub,
asked in this order. Weights are read from safetensors only: a pickle can run code when it is read. A
checkpoint that brings its own Python (`auto_map`) is refused even though nothing here would run it,
because its weights mean what that code makes of them. What a tokenizer's settings say goes to its
constructor as it stands, and some constructors open what they are given: settings that name a file
outside of the folder would put it into the vocabulary, and into whatever is exported. They are refused.
This module knows no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoq.errors import AutoQError, ModelRefused
from autoq.models import demo
from autoq.spec import ModelSpec
from autoq.user_path import user_path

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
MAX_CONFIG_BYTES = 1 << 26
# Where a tokenizer's own file says what its constructor is given, and what of that is never opened.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
PREPROCESSOR = "preprocessor_config.json"  # what is done to images before a model of images reads them
_NOT_OPENED = ("name_or_path", "special_tokens_map_file")

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_HUB_LEFT_OUT = ["*/*", "consolidated*", "*.onnx*"]


def resolve(spec: ModelSpec) -> Path:
    """The checked folder, or GGUF file, that holds the model; fetched first where needed.

    Raises `ModelRefused` (or `UnknownName` for a demo model) with one line.
    """
    if demo.is_demo(spec.id):
        found = demo.fetch(spec.id)
    elif (path := user_path(spec.id)).exists():
        found = path
    elif _HUB_ID.fullmatch(spec.id) and not spec.id.endswith((".gguf", ".safetensors", *PICKLES)):
        found = _from_hub(spec)
    else:
        raise ModelRefused(f"model {spec.id!r}: there is no such file or folder, and it is not a hub id or demo:NAME")
    if spec.revision is not None and (demo.is_demo(spec.id) or path.exists()):
        raise ModelRefused(f"model.revision {spec.revision!r} is for hub ids, and {spec.id!r} is none; leave it out")
    if found.is_file():
        _check_file(spec.id, found)
    else:
        check_folder(spec.id, found)
    return found


def _check_file(model_id: str, file: Path) -> None:
    if file.suffix == ".safetensors":
        raise ModelRefused(f"model {model_id!r} is a weight file; give the folder that holds it and its config.json")
    if file.suffix in PICKLES:
        raise ModelRefused(_pickled(model_id, [file]))
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelRefused(f"model {model_id!r} is not a GGUF file")


def check_folder(model_id: str, folder: Path) -> None:
    """Refuse a folder that is not a plain transformers checkpoint with safetensors.

    Raises `ModelRefused`: no config, own code, quantized already, an adapter, pickles only.
    """
    pickles = sorted(file for file in folder.glob("*") if file.suffix in PICKLES and file.name != "training_args.bin")
    stored = [name for name in (WEIGHTS, WEIGHTS_INDEX) if (folder / name).is_file()]
    if not stored and pickles:
        raise ModelRefused(_pickled(model_id, pickles))
    if not (folder / "config.json").is_file():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; give one of its GGUF files: {', '.join(ggufs)}" if ggufs else ""
        raise ModelRefused(f"model {model_id!r} has no config.json{hint}")
    if (folder / "adapter_config.json").is_file():
        raise ModelRefused(f"model {model_id!r} is an adapter (adapter_config.json); merge it into its model first")
    for name in ("config.json", *_SETTINGS):
        if (folder / name).is_file():
            config = check_config(model_id, folder / name)
            if name in _SETTINGS:
                _check_settings(model_id, folder, name, config)
    if not stored:
        raise ModelRefused(f"model {model_id!r} has no {WEIGHTS} and no {WEIGHTS_INDEX}")
    weight_files(model_id, folder)


def check_config(model_id: str, file: Path) -> dict[str, Any]:
    """What a JSON file of a model's folder says. Raises `ModelRefused` for one that asks for code, or for what is not
    read here."""
    name, config = file.name, read_json(model_id, file)
    for key, value in _entries(config):
        if key == "auto_map" and value:
            raise ModelRefused(f"model {model_id!r} brings its own code ('auto_map' in {name}), which is never run")
        if key in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method") if isinstance(value, dict) else None
            raise ModelRefused(
                f"model {model_id!r} is quantized already ({method or key} in {name}); give the unquantized model"
            )
        if "_implementation" in f"_{key}" and "/" in str(value):
            raise ModelRefused(f"model {model_id!r} asks for code from the hub ({key} {value!r} in {name})")
        if key == "transformers_weights" and value:
            raise ModelRefused(f"model {model_id!r} renames its weights ({key} in {name}); only {WEIGHTS} is read")
    return config


def _check_settings(model_id: str, folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Refuse what a tokenizer's constructor would open: positional values, and files that are not the folder's own."""
    if settings.get("init_inputs"):
        raise ModelRefused(f"model {model_id!r} gives its tokenizer values without names (init_inputs in {name})")
    for key, value in settings.items():
        for text in () if key in _NOT_OPENED else _texts(value):
            if _is_file_elsewhere(text, folder):
                raise ModelRefused(
                    f"model {model_id!r} names a file that is not its own ({key} in {name}: {text[:200]!r}); "
                    "take that setting out"
                )


def _texts(tree: Any) -> Iterator[str]:
    """Every text of a JSON tree but its keys."""
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, str):
            yield node
        else:
            left.extend(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())


def _is_file_elsewhere(text: str, folder: Path) -> bool:
    if not text or len(text) > 4096 or "\0" in text:
        return False
    try:
        path = Path(text)
        return path.is_file() and not path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a JSON tree, however deep."""
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            yield from node.items()
            left.extend(node.values())
        elif isinstance(node, list):
            left.extend(node)


def read_json(model_id: str, file: Path) -> dict[str, Any]:
    """The mapping in a JSON file of the model. Raises `ModelRefused`."""
    try:
        with file.open("rb") as opened:
            raw = opened.read(MAX_CONFIG_BYTES + 1)
        if len(raw) > MAX_CONFIG_BYTES:
            raise ModelRefused(f"model {model_id!r}: {file.name} is larger than {MAX_CONFIG_BYTES} bytes")
        tree = json.loads(raw.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelRefused(f"model {model_id!r}: {file.name} cannot be read: {problem}") from None
    if not isinstance(tree, dict):
        raise ModelRefused(f"model {model_id!r}: {file.name} is not a mapping")
    return tree


def weight_files(model_id: str, folder: Path) -> list[Path]:
    """The safetensors files of a checked folder, sorted. Raises `ModelRefused` for an index that
    names anything but safetensors files in the same folder."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = read_json(model_id, folder / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ModelRefused(f"model {model_id!r}: {WEIGHTS_INDEX} has no weight_map")
    for name in sorted({str(name) for name in index.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelRefused(f"model {model_id!r}: {WEIGHTS_INDEX} names {name!r}, not a safetensors file beside it")
        if not (folder / name).is_file():
            raise ModelRefused(f"model {model_id!r} lacks its weight file {name}")
    return [folder / name for name in sorted({str(name) for name in index.values()})]


def _pickled(model_id: str, files: list[Path]) -> str:
    return (
        f"model {model_id!r} has only pickled weights ({files[0].name}), which can run code when they are read; "
        "convert it to safetensors"
    )


def _from_hub(spec: ModelSpec) -> Path:
    """The snapshot of a hub model in the hub's own cache: from the network, or as it is there."""
    import huggingface_hub
    from huggingface_hub import errors

    what = f"model {spec.id!r}" + (f" at revision {spec.revision!r}" if spec.revision else "")
    try:
        snapshot = huggingface_hub.snapshot_download(
            spec.id, revision=spec.revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_LEFT_OUT
        )
    except errors.GatedRepoError:
        raise ModelRefused(f"{what} is gated: accept its terms on the hub, then log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise ModelRefused(f"{what}: there is no such folder here and no such model on the hub") from None
    except errors.RevisionNotFoundError:
        raise ModelRefused(f"{what}: the hub has the model, but not that revision") from None
    except errors.HFValidationError:
        raise ModelRefused(f"{what} is neither a folder here nor a valid hub id") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise ModelRefused(
            f"{what} is neither a folder here nor in the hub's cache, and the hub cannot be reached; "
            "connect, or give a model folder, a GGUF file or demo:smollm2"
        ) from None
    except (errors.HfHubHTTPError, OSError) as problem:
        line = str(problem).partition("\n")[0]
        raise AutoQError(f"{what} could not be fetched from the hub: {line or type(problem).__name__}") from None
    return Path(snapshot)
