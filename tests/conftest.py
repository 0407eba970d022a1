"""What tests of every room share: no network, and tiny models of every family."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

# Read when the hub's library is imported, so it must stand before any test imports it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


# On a developer's machine each run tries other examples; a verdict on a commit must not depend on luck.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI") == "true":
    hypothesis.settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    # Under nohup, or in the background of a script, interrupts are ignored, here and in every process that tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # torch warns of itself when transformers makes it import its compiler.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What takes milliseconds comes last: processes that deal the rest of the tests among them then end together.
    items.sort(key=lambda item: item.path.name == "test_architecture.py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Properties, and what else is marked `untraced`, run without coverage's tracing.

    It makes Python three times slower, and a property's hundredth example runs the lines of its first. (The marker
    `no_cover` of pytest-cov does not stop it in a process of pytest-xdist, where coverage is started twice.)
    """
    if not any(item.get_closest_marker(name) for name in ("hypothesis", "untraced")):
        return (yield)
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture(autouse=True)
def same_luck() -> None:
    """torch's random numbers are those of every other run, whichever tests ran before in this process."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(0)


def _support(name: str) -> ModuleType:
    """A module of `tests/support`, which is no package."""
    if name not in sys.modules:
        found = importlib.util.spec_from_file_location(name, Path(__file__).parent / "support" / f"{name}.py")
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module
        found.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """`tests/support/tiny_models.py`: families, and how to save one or build a tokenizer."""
    return _support("tiny_models")


@pytest.fixture(scope="session")
def believable() -> ModuleType:
    """`tests/support/believable_study.py`: studies as a search leaves them, without a model."""
    return _support("believable_study")


@pytest.fixture(scope="session")
def mutations() -> ModuleType:
    """`tests/support/mutations.py`: good inputs, broken."""
    return _support("mutations")


@pytest.fixture(scope="session")
def postgresql() -> ModuleType:
    """`tests/support/postgresql.py`: a server of our own."""
    return _support("postgresql")


@pytest.fixture(scope="session")
def networks() -> ModuleType:
    """`tests/support/networks.py`: a network namespace at the end of a cable."""
    return _support("networks")


@pytest.fixture(scope="session")
def made_up() -> ModuleType:
    """`tests/support/made_up.py`: whole studies through the real controller, whose qualities are made up."""
    return _support("made_up")


@pytest.fixture(scope="session")
def controllers_module() -> ModuleType:
    """`tests/support/controllers.py`: a made-up evaluator, and controllers that may be killed."""
    return _support("controllers")


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of a tiny bfloat16 checkpoint, made when first asked for. Read only."""
    return _made_once(tiny_models, tmp_path_factory)


@pytest.fixture(scope="session")
def trained_models(tiny_models: ModuleType) -> ModuleType:
    """`tests/support/trained_models.py`: families, and how to train and save one."""
    return _support("trained_models")


@pytest.fixture(scope="session")
def trained_model_dir(trained_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of a small bfloat16 checkpoint that was trained, when first asked for. Read only."""
    return _made_once(trained_models, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_vision() -> ModuleType:
    """`tests/support/tiny_vision.py`: vision transformers, and how to train and save one; pictures for them."""
    return _support("tiny_vision")


@pytest.fixture(scope="session")
def vision_model_dir(tiny_vision: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of a small bfloat16 checkpoint that was trained, when first asked for. Read only."""
    return _made_once(tiny_vision, tmp_path_factory)


@pytest.fixture(scope="module")
def brief_timings() -> Iterator[None]:
    """Latencies of the fewest rounds that a target takes: for studies whose milliseconds nobody judges."""
    from autoq.targets import _llama_cpp_timing, _onnx_session, _torch_cpu_timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torch_cpu_timing, "ROUNDS_SECONDS", 0.0)
        patch.setattr(_llama_cpp_timing, "ROUNDS_SECONDS", 0.0)
        patch.setattr(_onnx_session, "RUNS_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def steady_costs(brief_timings: None) -> Iterator[None]:
    """Layers are timed, and cost what their schemes' bits say: for studies that must find the same trials each time."""
    from autoq.evaluation import Evaluator
    from autoq.scheme import code_bits, parse_scheme
    from autoq.targets import UNQUANTIZED, CostTable

    timed = Evaluator.cost_table

    def steady(self: Evaluator, choices: Any) -> CostTable:
        table = timed(self, choices)
        # What runs on another kernel with as many bits is told apart, as it is by a clock.
        costs = {
            phase: {
                name: {text: code_bits(parse_scheme(text)) + sum(text.encode()) % 7 / 100 for text in entries}
                for name, entries in layers.items()
            }
            for phase, layers in table.layer_ms.items()
        }
        whole = {phase: 1.0 + sum(layer["keep"] for layer in layers.values()) for phase, layers in costs.items()}
        return CostTable(table.device, dict.fromkeys(costs, 1.0), costs, {**table.detail, UNQUANTIZED: whole})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "cost_table", steady)
        yield


@pytest.fixture(scope="session")
def commands() -> Iterator[Any]:
    """`Commands` of `tests/support/commands.py`: command lines as processes that a test may kill."""
    with _support("commands").Commands() as commands:
        yield commands


def _made_once(models: ModuleType, folders: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = models.save(family, folders.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """`RayCluster` of `tests/support/ray_cluster.py`, without a node yet; ended with the module's tests."""
    cluster = _support("ray_cluster").RayCluster()
    yield cluster
    cluster.close()
