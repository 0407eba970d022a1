"""The house rules that no single module can hold: who may import whom, and what stands nowhere.

One table says which room may import which. `LAZY` adds what a room may import inside functions only
(so that starting the command line loads nothing heavy), `TYPING` what it may import for annotations.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = {"workers": "autoq.workers", "studies": "autoq.studies", "dashboards": "autoq.dashboards"}

VOCABULARY = {
    *("errors", "scheme", "layer", "assignment", "measurement", "statistics", "plugins"),
    *("granularity", "sparsity", "spec", "spec_errors", "spec_fields", "spec_units", "strict_yaml"),
    *("cache", "device", "energy", "folding", "kv_cache", "trained", "user_path"),
}
NUMBERS = {
    *("methods", "targets", "kernels", "models", "calibration", "objectives", "bank", "quantized_model"),
    *("evaluation", "reference", "chunks", "tasks", "recovery", "sequential", "folded_model", "workers"),
}

# room -> what its modules may import at any time, besides the vocabulary and themselves
IMPORTS: dict[str, set[str]] = {
    "vocabulary": set(),
    "methods": set(),
    "models": set(),
    "store": set(),
    "targets": {"kernels"},
    "kernels": {"methods", "models", "targets", "calibration.observers"},
    "calibration": {"models"},
    "objectives": {"targets", "tasks"},
    "tasks": {"models", "objectives"},
    "bank": {"methods"},
    "reference": {"models"},
    "chunks": {"models", "objectives", "reference"},
    "quantized_model": {"methods", "models", "targets", "calibration", "bank"},
    "recovery": {"methods", "models", "calibration", "objectives", "reference", "chunks", "quantized_model"},
    "folded_model": {"methods", "models"},
    "sequential": {"methods", "models", "calibration", "bank", "quantized_model"},
    "evaluation": {
        "models",
        "targets",
        "calibration",
        "objectives",
        "bank",
        "reference",
        "chunks",
        "quantized_model",
        "folded_model",
        "methods",
        "tasks",
    },
    "workers": {"search.executors", "models.sources"},
    "recipes": {"methods", "targets", "kernels", "shipping.manifest"},
    "search": {"recipes", "store", "objectives", "targets", "methods", "models", "evaluation", "tasks"},
    "shipping": {"targets", "display"},
    "study": {"store"},
    "display": {"store", "search.observer", "search.sampler_view"},
    "doctor": {"store"},
    "documents": {"display"},
    "cli": {"display", "documents", "reading"},
    "service": {"store", "display", "documents"},
    "client": {"store", "documents", "reading", "display"},
    "reading": {"documents"},
    "studies": set(),
    "dashboards": {"store", "display", "search.sampler_view"},
}

# room -> what its modules may import besides, inside functions only
LAZY: dict[str, set[str]] = {
    "vocabulary": {"studies"},
    "targets": {"methods", "models"},
    "workers": {"evaluation"},
    "evaluation": {"recovery", "sequential"},
    "search": {"calibration"},
    "tasks": {"calibration"},
    "shipping": {"evaluation", "models"},
    "study": {"search", "display", "dashboards", "shipping", "targets"},
    "doctor": {"targets"},
    "documents": {"study", "targets"},
    "reading": {"study", "display"},
    "cli": {
        "store",
        "search",
        "study",
        "doctor",
        "dashboards",
        "service",
        "client",
        "objectives",
        "targets",
        "shipping",
    },
    "service": {"search", "dashboards", "study", "shipping", "targets", "objectives"},
}

# room -> what its modules may import besides, under `if TYPE_CHECKING:` only
TYPING: dict[str, set[str]] = {
    "documents": {"store"},
    "reading": {"store"},
    "cli": {"store", "search", "study"},
    "display": {"search", "shipping"},
    "shipping": {"store", "evaluation", "methods"},
}

# package -> the rooms that may import it at any time; elsewhere it must not be imported at all
PACKAGES: dict[str, set[str]] = {
    "ray": {"workers"},
    "optuna": {"search"},
    "sqlalchemy": {"store"},
    "alembic": {"store"},
    "torch": NUMBERS,
    "transformers": NUMBERS,
    "accelerate": {"models", "kernels"},
    "gguf": {"models", "methods", "kernels"},
    "libgguf": {"methods", "kernels"},
    "xllamacpp": {"kernels"},
    "compressed_tensors": {"kernels"},
    "onnx": {"kernels"},
    "onnxruntime": {"kernels"},
    "datasets": {"calibration"},
    "PIL": {"calibration"},
    "sacrebleu": {"objectives"},
    "rouge_score": {"objectives"},
    "lm_eval": {"tasks"},
    "typer": {"cli"},
    "click": {"cli"},
    "rich": {"cli", "display", "doctor"},
    "pandas": {"study", "dashboards"},
    "plotly": {"study", "dashboards"},
    "fastapi": {"service"},
    "starlette": {"service"},
    "uvicorn": {"service"},
    "prometheus_client": {"service"},
    "jinja2": {"service", "dashboards", "tasks"},
    "httpx": {"client"},
    "hqq": set(),
}

# modules whose start-up everyone pays for: these packages only inside their functions
LEAN = {
    "cli",
    "documents",
    "recipes",
    "shipping",
    "display",
    "doctor",
    "study",
    "store",
    "search",
    "service",
    "client",
    "dashboards",
    "targets",
    "vocabulary",
}
HEAVY = {"torch", "transformers", "optuna", "pandas", "plotly", "alembic", "ray"}
# Optuna lives in two places of search, which the controller imports when a study runs.
HEAVY_ALLOWED = ("autoq.search.samplers", "autoq.search.optuna_study", "autoq.store.migrations")

PRINTERS = {"cli", "display", "doctor"}
MAX_LINES = 500


@dataclass(frozen=True)
class Import:
    """One imported module: where, what, and `eager`, `lazy` or `typing`."""

    line: int
    target: str
    when: str


def sources(*folders: str) -> list[Path]:
    """The Python files of top-level folders."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The import name of a file of the tree."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [*MAPPED.get(folder, folder).split("."), *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PRODUCT = sources("autoq", *MAPPED)
MODULES = {module_name(path): path for path in PRODUCT}


def room(module: str) -> str:
    """The room that a module of ours lives in: its first name below `autoq`."""
    first = module.split(".")[1] if "." in module else ""
    # Underscore files of targets hold the kernels and may need torch; a target's own file must not.
    if module.startswith("autoq.targets._"):
        return "kernels"
    return "vocabulary" if first in VOCABULARY else first


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a module, those within functions and TYPE_CHECKING blocks too."""

    def walk(node: ast.AST, when: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(child.lineno, alias.name, when) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = module.split(".") if is_package else module.split(".")[:-1]
                    parents = parents[: len(parents) - child.level + 1]
                    base = ".".join([*parents, *([base] if base else [])])
                for alias in child.names:
                    inner = f"{base}.{alias.name}"
                    yield Import(child.lineno, inner if inner in MODULES else base, when)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    yield from walk(ast.Module([statement], []), "typing")
                for statement in child.orelse:
                    yield from walk(ast.Module([statement], []), when)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child, "typing" if when == "typing" else "lazy")
            else:
                yield from walk(child, when)

    yield from walk(tree, "eager")


def allowed(target: str, choices: set[str]) -> bool:
    """Whether a module of ours lives in a room of `choices`, or is one of the modules they name by dots."""
    return room(target) in choices or any(f"{target}.".startswith(f"autoq.{c}.") for c in choices if "." in c)


def broken_rules(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module's imports break, as `line: import: rule`."""
    home = room(module)
    found = []
    for each in imports(ast.parse(source), module, is_package):
        top = each.target.partition(".")[0]
        rule = None
        if top == "autoq":
            choices = IMPORTS.get(home, set()) | {"vocabulary", home}
            if each.when != "eager":
                choices |= LAZY.get(home, set())
            if each.when == "typing":
                choices |= TYPING.get(home, set())
            # The bare package holds the version alone, and its own file hands out `study` on request.
            lends_study = module == "autoq" and each.when != "eager" and allowed(each.target, {"study"})
            if each.target != "autoq" and not lends_study and not allowed(each.target, choices):
                within = {"eager": "at import", "lazy": "in a function", "typing": "for typing"}[each.when]
                listed = ", ".join(sorted(choices - {"vocabulary", home})) or "nothing"
                rule = f"{home or 'autoq'} may import {within}: the vocabulary, itself, and {listed}"
        elif top in PACKAGES and home not in PACKAGES[top] and not (home == "vocabulary" and each.when == "lazy"):
            rule = f"only {', '.join(sorted(PACKAGES[top])) or 'tests'} may import {top}"
        elif top in HEAVY and home in LEAN and each.when == "eager" and not module.startswith(HEAVY_ALLOWED):
            rule = f"{module} must start without {top}: import it in a function"
        if rule:
            found.append(f"{each.line}: {each.target}: {rule}")
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_inward(module: str) -> None:
    path = MODULES[module]
    broken = broken_rules(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not broken, "\n".join(f"{path.relative_to(ROOT)}:{line}" for line in broken)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_room(module: str) -> None:
    known = module == "autoq" or room(module) in IMPORTS
    assert known, f"{module}: which room is it? say so in IMPORTS"


@pytest.mark.parametrize(
    ("source", "module", "fragment"),
    [
        ("import ray", "autoq.search.controller", "only workers may import ray"),
        ("def f():\n    from optuna import create_study", "autoq.cli", "only search may import optuna"),
        ("from autoq.store import Store", "autoq.evaluation", "evaluation may import at import"),
        ("from autoq import store", "autoq.workers.actor", "workers may import at import"),
        ("from ..store import Store", "autoq.workers.actor", "workers may import at import"),
        ("from autoq.evaluation import Evaluator", "autoq.service", "service may import at import"),
        ("def f():\n    from autoq.search import space", "autoq.workers.actor", "workers may import in a function"),
        ("import torch", "autoq.scheme", "may import torch"),
        ("import alembic", "autoq.store.store", "import it in a function"),
        ("import autoq.methods.rtn", "autoq.spec", "vocabulary may import at import"),
    ],
)
def test_the_rules_catch_what_they_forbid(source: str, module: str, fragment: str) -> None:
    (broken,) = broken_rules(source, module)
    assert fragment in broken


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("def f():\n    from autoq.evaluation import Evaluator", "autoq.workers.actor"),
        ("if TYPE_CHECKING:\n    from autoq.models import LoadedModel", "autoq.targets"),
        ("from .actor import Actor", "autoq.workers.executor"),
        ("import ray\nfrom autoq.search.executors import Job", "autoq.workers.executor"),
        ("import torch\nfrom autoq.scheme import Scheme", "autoq.methods.rtn"),
    ],
)
def test_the_rules_let_pass_what_they_allow(source: str, module: str) -> None:
    assert broken_rules(source, module) == []


LEAN_STARTS = {
    "import autoq": "import autoq",
    "autoq --help": """
import sys
from autoq.cli import main
sys.argv = ["autoq", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
""",
    "a spec": "from autoq.spec import load_spec; load_spec('demo')",
    "a store": """
from autoq.store import Store
store = Store.open("studies.db")
assert list(store.studies()) == []
""",
    "plugin names": """
from autoq import plugins
for folder in ("methods", "targets", "objectives", "search.samplers", "tasks.kinds"):
    assert [plugins.summary(folder, name) for name in plugins.names(folder)]
""",
    "targets": """
from autoq import plugins
from autoq.targets import Target
for name in plugins.names("targets"):
    plugins.load("targets", name, Target).unavailable()
""",
    "executors": "import autoq.search.executors, autoq.search.observer",
}


@pytest.mark.parametrize("start", LEAN_STARTS)
def test_starts_lean(start: str, tmp_path: Path) -> None:
    """What everyone pays for at start loads nothing heavy."""
    probe = f"{LEAN_STARTS[start]}\nimport sys\nprint('loaded:', *sorted({{'torch', 'transformers', 'ray', 'optuna', "
    probe += "'pandas', 'plotly', 'scipy', 'datasets'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


def text_files() -> list[Path]:
    """Every text file of the project."""
    kinds = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sql", ".html", ".js", ".css", ".mako", ".json"}
    found = [ROOT / name for name in ("Makefile", "README.md", "pyproject.toml", "constraints.txt", ".ci/run")]
    for folder in ("autoq", *MAPPED, "tests", "benchmarks"):
        found += [p for p in (ROOT / folder).rglob("*") if p.suffix in kinds and "__pycache__" not in p.parts]
    return found


# Written so that this file does not hold what it looks for.
FORBIDDEN_TEXT = {
    "unfinished work": re.compile(r"\b(?:T[O]DO|F[I]XME|X[X]X|H[A]CK)\b"),
    "a path of one machine": re.compile(r"(?<![\w.~}])/(?:work|root|home|Users|farm|tmp)/\w"),
}


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_no_text_that_belongs_elsewhere(what: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN_TEXT[what].search(line)
    ]
    assert not found, f"{what}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "path", sources("autoq", *MAPPED, "benchmarks", "tests"), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines; split it by what it knows"
    if "tests" not in path.relative_to(ROOT).parts:
        documented = ast.get_docstring(ast.parse(text)) is not None
        assert documented, f"{path.relative_to(ROOT)} has no docstring"


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "os.system", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"}
# Ours are children of yaml.SafeLoader; tests/test_spec.py feeds them what they refuse.
STRICT_LOADERS = (["_Loader"], ["_StrictLoader"])
UNSAFE_FLAGS = {"trust_remote_code", "allow_pickle", "shell"}


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls and flags that run what a file brings along, by line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, name) for name in names if name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            loader = [ast.unparse(word.value) for word in node.keywords if word.arg == "Loader"]
            if called in UNSAFE_CALLS or (called == "yaml.load" and loader not in STRICT_LOADERS):
                yield node.lineno, called
            for word in node.keywords:
                if word.arg in UNSAFE_FLAGS and not (
                    isinstance(word.value, ast.Constant) and word.value.value is False
                ):
                    yield node.lineno, f"{called}({word.arg}=…)"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in UNSAFE_FLAGS and ast.unparse(value) != "False":
                    yield node.lineno, f"{{{key.value!r}: …}}"


def test_nothing_runs_what_a_file_brings_along() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in PRODUCT
        for line, what in unsafe(ast.parse(path.read_text(encoding="utf-8")))
        # Workers talk to processes that they started, as Ray itself does; no file is read that way.
        if not (what == "pickle" and path.is_relative_to(ROOT / "workers"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "eval(text)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
        "options = {'trust_remote_code': True}",
        "subprocess.run(line, shell=True)",
    ],
)
def test_unsafe_calls_are_seen(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


def test_only_the_command_line_prints() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for module, path in MODULES.items()
        if room(module) not in PRINTERS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert not found, "\n".join(found)


def test_tests_are_found_by_name_alone() -> None:
    """pytest imports by path here: no packages, and no two test files of one name."""
    files = sources("tests")
    assert [path for path in files if path.name == "__init__.py"] == []
    tests = [path.name for path in files if path.name.startswith("test_")]
    assert sorted({name for name in tests if tests.count(name) > 1}) == []
