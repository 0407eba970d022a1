"""The wheel holds the tree and nothing else, and every pin of constraints.txt is what runs here."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAPPED = {"workers": "autoq.workers", "studies": "autoq.studies", "dashboards": "autoq.dashboards"}
NOT_SHIPPED = {".pyc", ".pyo", ".png"}  # pictures are of the README


def shipped_files() -> set[str]:
    """Every file of the packages in the tree, by its path inside site-packages."""
    found = set()
    for folder, package in {"autoq": "autoq", **MAPPED}.items():
        if not (ROOT / folder / "__init__.py").is_file():
            continue
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in NOT_SHIPPED and "__pycache__" not in path.parts:
                found.add(f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def packages() -> set[str]:
    """Every package in the tree, by its import name."""
    return {str(Path(file).parent).replace("/", ".") for file in shipped_files() if file.endswith("__init__.py")}


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy so that no build folder of ours leaks into it."""
    base = tmp_path_factory.mktemp("wheel")
    source, out = base / "source", base / "out"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for folder in ("autoq", *MAPPED):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q")
    run("-m", "pip", "wheel", *options, "-w", str(out), str(source), cwd=base)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, without its dependencies."""
    target = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "-q")
    run("-m", "pip", "install", *options, "--target", str(target), str(wheel), cwd=target)
    return target


def test_every_package_is_listed() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages()), "[tool.setuptools] packages differs from the tree"
    assert listed == sorted(listed)


def test_folders_with_python_files_are_packages() -> None:
    for folder in ("autoq", *MAPPED):
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent.relative_to(ROOT)} has no __init__.py"


def test_wheel_holds_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    assert sorted(shipped_files() - held) == [], "in the tree and not in the wheel"
    assert sorted(held - shipped_files()) == [], "in the wheel and not in the tree"
    assert "autoq/py.typed" in held
    assert any(re.fullmatch(r"autoq/studies/[\w-]+\.yaml", name) for name in held)


def test_site_packages_gains_one_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top = {name.partition("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"autoq"}


def test_metadata_names_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
        (licence,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/LICENSE")]
        (commands,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/entry_points.txt")]
    assert "License-Expression: Apache-2.0" in metadata
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert "autoq = autoq.cli:main" in commands


def test_installed_wheel_imports_and_finds_its_specs(installed: Path, tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import autoq, autoq.studies, autoq.workers
from importlib import resources
from autoq import plugins
from autoq.spec import shipped_specs
for module in (autoq, autoq.studies, autoq.workers):
    assert module.__file__.startswith({str(installed)!r}), module.__file__
assert resources.files("autoq.studies").joinpath("demo.yaml").is_file()
print(*sorted(shipped_specs()))
for folder in ("methods", "targets", "objectives", "search.samplers"):
    print(*plugins.names(folder))
"""
    # The current folder is not the tree, and -I keeps PYTHONPATH out: what answers is the wheel.
    lines = run("-I", "-c", script, cwd=tmp_path).splitlines()
    assert lines[0].split() == sorted(path.stem for path in (ROOT / "studies").glob("*.yaml"))
    assert "rtn" in lines[1].split()


def test_editable_install_reads_the_tree() -> None:
    folder = resources.files("autoq.studies")
    assert {entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml")} == {
        path.name for path in (ROOT / "studies").glob("*.yaml")
    }
    import autoq
    import autoq.workers

    assert Path(autoq.__file__).is_relative_to(ROOT / "autoq")
    assert Path(str(autoq.workers.__file__)).is_relative_to(ROOT / "workers")


def test_version_is_said_once() -> None:
    import autoq

    assert autoq.__version__ == PYPROJECT["project"]["version"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))


def direct_dependencies() -> set[str]:
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = {canonical(re.split(r"[^\w.-]", line)[0]) for line in lines}
    return found - {"autoq"}


def imported_packages() -> dict[str, str]:
    """Every top-level module that the product imports: name -> one file that does."""
    found = {}
    for folder in ("autoq", *MAPPED):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    names = [node.module]
                found.update({name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names})
    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names and name != "autoq"}


def test_every_imported_package_is_a_declared_dependency() -> None:
    sold_as = importlib.metadata.packages_distributions()
    undeclared = {
        name: file
        for name, file in imported_packages().items()
        if not {canonical(sold) for sold in sold_as.get(name, [])} & direct_dependencies()
    }
    assert undeclared == {}, "imported, but only here because another package needs it"


def test_every_dependency_is_pinned_and_that_version_runs_here() -> None:
    assert sorted(direct_dependencies() - set(pins())) == [], "named in pyproject.toml, not pinned in constraints.txt"
    # A GPU user lifts the pin of torch alone.
    names = direct_dependencies() - {"torch"}
    here = {name: importlib.metadata.version(name) for name in names}
    assert here == {name: pins()[name] for name in here}


def test_every_installed_package_is_pinned() -> None:
    """What one machine installs another installs too: no version is left to the day."""
    wanted, seen = ["autoq"], set()
    while wanted:
        name = canonical(wanted.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system or Python
        for requirement in map(Requirement, requires):
            extras = ("", *PYPROJECT["project"]["optional-dependencies"]) if name == "autoq" else ("",)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(requirement.name)
    installed = {canonical(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    assert sorted((seen & installed) - set(pins()) - {"autoq"}) == []


def test_torch_is_pinned_without_a_build() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", pins()["torch"]), "a local version (+cpu) is not to be had from an index"


STUB = """#!/bin/sh
# Stands for .venv/bin/python: the first call asks what it is, a call of pip is written down.
case "$*" in
  *"pip install"*) echo "$*" >> calls; [ ! -e offline ] ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the real Makefile and an environment whose Python only notes what it is asked."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    stub = tmp_path / ".venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    stub.write_text(STUB, encoding="utf-8")
    stub.chmod(0o755)
    return tmp_path


def make(checkout: Path, *targets: str, fails: bool = False) -> list[str]:
    """Run make; the pip calls that it made."""
    calls = checkout / "calls"
    calls.unlink(missing_ok=True)
    # Without the variables of a make that runs these tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", *targets], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []


def test_a_second_call_installs_nothing(checkout: Path) -> None:
    (call,) = make(checkout, "install")
    assert "-c constraints.txt" in call
    assert call.endswith("-e .[gguf,serve,client]")
    assert make(checkout, "install") == []
    call, aside = make(checkout, "install-dev")
    assert call.endswith("-e .[dev]")
    assert "-c constraints.txt --no-deps" in aside
    target, *packages = aside.partition(" --target ")[2].split()
    assert target == ".venv/reference"
    assert set(packages) <= set(pins())
    assert make(checkout, "install", "install-dev") == []


def test_what_transformers_would_import_for_seconds_stands_aside() -> None:
    """Whatever is found under these names is imported with transformers, by every process of every test."""
    assert not {"hqq", "optimum-quanto"} & direct_dependencies()


def test_the_larger_install_holds_the_smaller(checkout: Path) -> None:
    assert len(make(checkout, "install-dev")) == 2
    assert make(checkout, "install") == []


def test_an_install_that_failed_is_taken_up_again(checkout: Path) -> None:
    (checkout / "offline").touch()
    assert len(make(checkout, "install", fails=True)) == 1
    (checkout / "offline").unlink()
    assert len(make(checkout, "install")) == 1


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_install_again(checkout: Path, file: str) -> None:
    make(checkout, "install")
    later = (checkout / ".venv" / ".installed").stat().st_mtime + 5
    os.utime(checkout / file, (later, later))
    assert len(make(checkout, "install")) == 1


def test_what_is_imported_is_compiled_once() -> None:
    """Where a container asks Python to keep no bytecode, each process of a test would compile torch again."""
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "KEPT": "1"}
    command = ["make", "--eval", "told: ; @env", "told"]
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    names = {line.partition("=")[0] for line in told.stdout.splitlines()}
    assert "KEPT" in names
    assert "PYTHONDONTWRITEBYTECODE" not in names


def test_an_old_python_is_refused_in_one_line(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    done = subprocess.run(
        ["make", "install", "PYTHON=no-such-python"], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith("AutoQ needs Python 3.11 or newer with venv")
    assert "no-such-python" in done.stderr
    assert not (checkout / ".venv").exists()
