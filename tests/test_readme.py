"""What the README says can be typed, can be typed; what it shows as a spec, is one."""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from autoq import plugins
from autoq.spec import load_spec, parse_spec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHEAP = {"methods", "targets", "objectives", "samplers", "doctor"}
SHELL = {"sed", "cd", "git", "export"}


def blocks(*languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(README) if language in languages]


def commands() -> list[str]:
    lines = "".join(blocks("console", "bash", "sh")).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


@functools.cache
def autoq(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    call = [sys.executable, "-c", "import sys; from autoq.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(call, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_every_fence_says_its_language() -> None:
    assert {language for language, _ in FENCE.findall(README)} <= {"console", "yaml", "python", "json", "text"}
    assert README.count("```") == 2 * len(FENCE.findall(README))


def test_commands_are_marked() -> None:
    lines = [line for text in blocks("console") for line in text.splitlines()]
    assert commands()
    assert [line for line in lines if line.startswith(("autoq ", "make ", "pip "))] == [], "begin commands with $"


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("autoq ")])
def test_command_and_options_exist(command: str) -> None:
    name, *arguments = shlex.split(command)[1:]
    within = [arguments.pop(0)] if name == "token" else []
    help_text = autoq(name, *within, "--help")
    assert help_text.returncode == 0, help_text.stderr
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_text.stdout))
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    assert given <= known, f"autoq {name} has no {sorted(given - known)}"
    for option, value in itertools.pairwise(arguments):
        if option in {"--max", "--min", "--best"}:
            assert value.partition("=")[0] in plugins.names("objectives")
        if option == "--set":
            load_spec("demo", [value])
    if name in {"search", "sensitivity"}:
        load_spec(arguments[0])


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("autoq search ")])
def test_searches_fit_their_model_and_target(command: str) -> None:
    """Every check that comes before weights are loaded passes: layers, schemes, target, objectives."""
    from autoq.search.setup import pose

    name, *arguments = shlex.split(command)[2:]
    changes = [value for option, value in itertools.pairwise(arguments) if option == "--set"]
    assert pose(load_spec(name, changes)).space.variables


@pytest.mark.parametrize("name", sorted(CHEAP))
def test_cheap_commands_run(name: str, tmp_path: Path) -> None:
    assert f"$ autoq {name}\n" in README, "shown in the tour"
    done = autoq(name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", [line for line in commands() if not line.startswith("autoq ")])
def test_other_commands_exist(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        targets = [argument for argument in arguments if "=" not in argument]
        done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif program == "ray":
        from ray.scripts.scripts import cli

        known = {option for parameter in cli.commands[arguments[0]].params for option in parameter.opts}
        assert set(arguments[1:]) <= known
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for argument in arguments:
            for listed in re.findall(r"^\.\[(.*)\]$", argument):
                assert set(listed.split(",")) <= set(extras)
    else:
        assert program in SHELL, f"{program} is not something that the README explains"


def test_constraints_hold_the_line_that_gpu_users_take_out() -> None:
    assert "/^torch==/d" in README
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_specs_parse(text: str) -> None:
    whole = text if re.search(r"^model:", text, re.MULTILINE) else f"model: {{id: 'demo:smollm2'}}\n{text}"
    parse_spec(whole)


def test_shipped_specs_are_named() -> None:
    (sentence,) = re.findall(r"Specs that ship: (.*?)\.\n", README, re.DOTALL)
    assert sorted(re.findall(r"`([\w-]+)`", sentence)) == sorted(p.stem for p in (ROOT / "studies").glob("*.yaml"))


@pytest.mark.parametrize("text", blocks("python"))
def test_python_compiles_and_its_imports_are_there(text: str) -> None:
    tree = ast.parse(text)
    compile(tree, "README.md", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("autoq"):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "autoq":
            assert hasattr(importlib.import_module("autoq"), node.attr), f"autoq has no {node.attr}"


def test_the_example_method_is_a_method(tmp_path: Path) -> None:
    """One file is all: it is found, made, and does what its docstring says."""
    import torch

    import autoq.methods
    from autoq.methods import Method
    from autoq.scheme import parse_scheme

    (source,) = [text for text in blocks("python") if "RuledMethod" in text]
    (tmp_path / "narrowed.py").write_text(source, encoding="utf-8")
    # In place: a package's path and its spec's are one list, and both are asked.
    autoq.methods.__path__.append(str(tmp_path))
    plugins.names.cache_clear()
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(torch.tensor(4.0)).sample((64, 128))
    try:
        assert "narrowed" in plugins.names("methods")
        narrowed = plugins.load("methods", "narrowed", Method).quantize(weight, parse_scheme("narrowed-int3-g64"))
    finally:
        autoq.methods.__path__.remove(str(tmp_path))
        plugins.names.cache_clear()
        sys.modules.pop("autoq.methods.narrowed", None)
    plain = plugins.load("methods", "rtn", Method).quantize(weight, parse_scheme("rtn-int3-g64"))

    def error(quantized: autoq.methods.QuantizedWeight) -> float:
        return float((quantized.dequantize() - weight).square().sum())

    assert narrowed.nbytes == plain.nbytes
    assert error(narrowed) < 0.9 * error(plain)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_files_named_in_the_text_exist() -> None:
    named = set(
        re.findall(r"`((?:autoq|tests|workers|studies|benchmarks)/[\w./-]+|constraints\.txt|\.ci/run)`", README)
    )
    assert named
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize(
    "scheme", re.findall(r"^\| `([\w-]+)` \|", README.partition("### Schemes as text")[2], re.MULTILINE)
)
def test_schemes_are_schemes(scheme: str) -> None:
    from autoq.scheme import parse_scheme

    parsed = parse_scheme(scheme)
    assert str(parsed) == scheme
    assert parsed.method in plugins.names("methods")
