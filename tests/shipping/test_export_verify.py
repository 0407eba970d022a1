"""Exports that are refused, interrupted or tampered with; what the folder holds; the picture."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

import autoq
from autoq.errors import AutoQError, BadInput, ExportBroken, SchemeRefused
from autoq.search.controller import create_study, run_study
from autoq.search.recovering import Training, recover_trial
from autoq.shipping import export as exporting
from autoq.shipping import manifest as files
from autoq.shipping.export import export
from autoq.shipping.picture import Dot, svg
from autoq.shipping.verify import verify
from autoq.spec import build_spec
from autoq.store import Store
from autoq.targets import torch_cpu

SCHEMES = ["rtn-int4-g32", "rtn-int8-channel-sym", "rtn-int8-channel-sym-a8dyn", "keep"]


@pytest.fixture(scope="module")
def study(steady_costs, tiny_model_dir, tmp_path_factory):
    """A finished study of a tiny model on torch-cpu: (store, study, folder)."""
    folder = tmp_path_factory.mktemp("shipping")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQ_CACHE", str(folder / "cache"))
        spec = build_spec(
            {
                "name": "tiny",
                "model": {"id": str(tiny_model_dir("llama-tied"))},
                "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 128, "window_tokens": 32},
                "target": {"name": "torch-cpu", "prompt_tokens": 16, "threads": 1},
                "space": {"schemes": SCHEMES, "kinds": ["linear", "head"], "overrides": [
                    {"match": "lm_head", "schemes": ["rtn-int8-channel-sym", "keep"]}]},
                "objectives": ["kl_nats_per_token", "size_bytes", "latency_decode_ms", "latency_prefill_ms"],
                "budget": {"trials": 12},
                "workers": {"cpus": 1},
            }
        )  # fmt: skip
        with Store.open(str(folder / "autoq.db")) as store:
            made = create_study(store, spec)
            run_study(store, made.id)
            yield store, store.study(made.id), folder


@pytest.fixture(scope="module")
def trial(study):
    store, record, _ = study
    # The smallest: which others are on the frontier depends on how fast this machine was.
    frontier = store.frontier(record.id, with_assignments=True)
    return min(frontier, key=lambda t: t.best_measurements()["size_bytes"].value)


@pytest.fixture(scope="module")
def shipped(study, trial):
    """An export, not to be changed."""
    store, record, folder = study
    export(store, record, trial, folder / "shipped")
    return folder / "shipped"


@pytest.fixture
def copy(shipped, tmp_path):
    """A copy of the export, to be tampered with."""
    return shutil.copytree(shipped, tmp_path / "copy")


def test_the_folder_holds_everything_and_says_what_it_is(study, trial, shipped):
    manifest = files.read(shipped)
    assert set(manifest.files) >= {"model.safetensors", "config.json", "assignment.json", "README.md", "frontier.svg"}
    assert files.read_assignment(shipped, manifest) == trial.assignment
    assert manifest.measurements["kl_nats_per_token"].part == "report"
    assert manifest.size_bytes == trial.best_measurements()["size_bytes"].value
    card = (shipped / "README.md").read_text()
    assert "autoq.load('shipped')" in card
    assert "kl_nats_per_token" in card
    ET.parse(shipped / "frontier.svg")


def test_the_export_verifies_and_latency_stands_beside_what_was_promised(shipped):
    checks = {check.name: check for check in verify(shipped).checks}
    assert {"files", "bytes", "formats", "outputs", "latency_decode_ms", "latency_prefill_ms"} <= set(checks)
    # Whether a tiny model's microseconds are the same on a busy machine is not this test's to judge.
    assert all(check.ok for name, check in checks.items() if not name.startswith("latency")), checks


def test_the_loader_gives_a_model_that_generates(shipped):
    model, tokenizer = autoq.load(shipped)
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, ids.shape[1] + 3)
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=ids).logits).all()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x" + (f / "model.safetensors").read_bytes()[1:]),
         "model.safetensors was changed"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "more.bin").write_bytes(b"1"), "more.bin is not of this export"),
        (lambda f: (f / "assignment.json").write_text("{}"), "assignment.json has 2 bytes"),
    ],
)  # fmt: skip
def test_what_was_tampered_with_is_named(copy, damage, told):
    damage(copy)
    report = verify(copy)
    assert not report.ok
    (check,) = report.checks
    assert told in check.found


def rewrite(folder, **changes):
    path = folder / "autoq.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_manifests_that_lead_elsewhere_are_refused(copy):
    entry = {"bytes": 1, "sha256": "0" * 64}
    for name in ("../x", "/etc/passwd", "a/../../x", "", "autoq.json"):
        rewrite(copy, files={name: entry})
        with pytest.raises(ExportBroken, match="outside of the export"):
            verify(copy)


def test_links_are_not_followed(copy):
    (copy / "config.json").rename(copy.parent / "config.json")
    (copy / "config.json").symlink_to(copy.parent / "config.json")
    with pytest.raises(ExportBroken, match=r"config\.json is not a plain file"):
        verify(copy)


def test_manifests_that_are_none_are_refused(copy, tmp_path):
    rewrite(copy, surprise=1)
    with pytest.raises(ExportBroken, match="surprise"):
        verify(copy)
    (copy / "autoq.json").write_text("[" * 100000)
    with pytest.raises(ExportBroken, match=r"autoq\.json cannot be read"):
        verify(copy)
    with pytest.raises(BadInput, match="is not an export of AutoQ"):
        verify(tmp_path / "nowhere")


def test_an_assignment_of_another_trial_is_refused(copy):
    assignment = json.loads((copy / "assignment.json").read_text())
    text = json.dumps(dict.fromkeys(assignment, "keep"))
    (copy / "assignment.json").write_text(text)
    entries = {name: entry.model_dump() for name, entry in files.read(copy).files.items()}
    entries["assignment.json"] = files.digest(copy / "assignment.json").model_dump()
    rewrite(copy, files=entries)
    with pytest.raises(ExportBroken, match="not the assignment"):
        verify(copy)


def test_a_worse_checkpoint_than_promised_fails_on_quality(copy):
    """Tampered weights with a manifest that fits them: only running it can tell."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = copy / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in tensors:
        if name.endswith(".weight.scales"):
            tensors[name] = tensors[name] * 8
    save_file(tensors, path, metadata=told)
    entries = {n: entry.model_dump() for n, entry in files.read(copy).files.items()}
    entries["model.safetensors"] = files.digest(path).model_dump()
    rewrite(copy, files=entries)
    checks = {check.name: check.ok for check in verify(copy, latency=False).checks}
    assert checks["files"]
    assert checks["formats"]
    assert not checks["outputs"]
    assert not checks["kl_nats_per_token"]


def test_a_quality_that_was_never_measured_fails(copy):
    promised = json.loads((copy / "autoq.json").read_text())["measurements"]
    promised["kl_nats_per_token"]["value"] *= 0.1
    promised["kl_nats_per_token"]["stderr"] = 1e-9
    rewrite(copy, measurements=promised)
    checks = {check.name: check for check in verify(copy, latency=False).checks}
    assert checks["outputs"].ok
    assert checks["kl_nats_per_token"].ok is False


@pytest.mark.parametrize(("shift", "ok"), [(0.0, True), (2.0, True), (-0.5, True), (-3.0, False), (0.5, False)])
def test_quality_may_be_better_by_rounding_and_worse_by_its_error_only(monkeypatch, shipped, shift, ok):
    """`shift` below 0 is better, in units of what the outputs are apart; above 1, in units of the error."""
    from autoq.evaluation import Comparison, Evaluator
    from autoq.measurement import Measurement

    promise = files.read(shipped).measurements["kl_nats_per_token"]
    apart, error = 4e-3, promise.stderr
    assert error is not None
    moved = shift * apart if shift < 0 or shift == 0.5 else shift * 0.4 * error

    def compare(self, assignment, outputs, tokens):
        here = Measurement("kl_nats_per_token", promise.value, "nats/token", "measured", "report", error)
        there = Measurement("kl_nats_per_token", promise.value + moved, "nats/token", "measured", "report", apart)
        return Comparison([here], [there], apart, 0.1, {"kl_nats_per_token": error / 100}, 128)

    monkeypatch.setattr(Evaluator, "compare", compare)
    checks = {check.name: check.ok for check in verify(shipped, latency=False).checks}
    assert checks["kl_nats_per_token"] is ok


def test_out_must_be_new_and_its_parent_there(study, trial, tmp_path):
    store, record, _ = study
    with pytest.raises(BadInput, match="exists; name a folder that is not there"):
        export(store, record, trial, tmp_path)
    with pytest.raises(BadInput, match="make it first"):
        export(store, record, trial, tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="exists"):
        export(store, record, trial, tmp_path / "link")


def test_a_target_that_cannot_run_the_assignment_names_layers_and_rules(study, trial, tmp_path):
    store, record, _ = study
    with pytest.raises(SchemeRefused, match=rf"llama-cpp cannot run trial {trial.number}: \S+ as rtn-int"):
        export(store, record, trial, tmp_path / "out", "llama-cpp")
    with pytest.raises(BadInput, match=r"generic exports nothing; choose --target from .*torch-cpu"):
        export(store, record, trial, tmp_path / "out", "generic")
    with pytest.raises(BadInput, match="no target 'tensorrt'; choose from"):
        export(store, record, trial, tmp_path / "out", "tensorrt")
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_is_missing_is_named_with_what_installs_it(study, trial, shipped, tmp_path, monkeypatch):
    store, record, _ = study
    monkeypatch.setattr(torch_cpu.TorchCpu, "unavailable", lambda _: "PyTorch is not installed")
    with pytest.raises(AutoQError, match="target torch-cpu cannot export on this machine: PyTorch is not installed"):
        export(store, record, trial, tmp_path / "out")
    with pytest.raises(AutoQError, match="cannot run on this machine: PyTorch is not installed"):
        verify(shipped)


def test_only_complete_trials_are_exported(study, tmp_path, trial):
    import dataclasses

    store, record, _ = study
    with pytest.raises(BadInput, match="is failed; only a complete one"):
        export(store, record, dataclasses.replace(trial, state="failed"), tmp_path / "out")


def test_a_full_disk_leaves_nothing(study, trial, tmp_path, monkeypatch):
    store, record, _ = study

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_cpu.TorchCpu, "export", full)
    with pytest.raises(AutoQError, match=r"cannot be written to .*: No space left on device"):
        export(store, record, trial, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_swept_by_the_next(study, trial, tmp_path):
    _store, _record, _ = study
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, running = tmp_path / f".out.partial-{dead.pid}", tmp_path / f".out.partial-{os.getppid()}"
    left.mkdir(), running.mkdir()
    with exporting._beside(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [running.name, "out"]


def test_the_picture_survives_odd_numbers():
    for dots in ([Dot(1.0, 0.0)], [Dot(5.0, -1.0, 2.0), Dot(5.0, -1.0, name="a<b&c")], [Dot(1, 1e-6), Dot(1e9, 10.0)]):
        ET.fromstring(svg(dots, "a & b", "x <", "y >"))


def test_the_picture_joins_what_nothing_beats_and_leaves_out_what_would_hide_it():
    dots = [Dot(1, 1.0), Dot(2, 0.5), Dot(3, 0.7), Dot(4, 0.1), Dot(9, 1e-6, name="unquantized")]
    tree = ET.fromstring(svg(dots, "t", "x", "y"))
    space = "{http://www.w3.org/2000/svg}"
    (line,) = [path for path in tree.iter(f"{space}path") if path.get("class") == "line"]
    assert line.get("d").count(",") == 3
    assert len([c for c in tree.iter(f"{space}circle") if c.get("class") == "front"]) == 4
    assert "unquantized" not in ET.tostring(tree, encoding="unicode")
    assert "unquantized" in svg([*dots[:4], Dot(9, 1e-6, name="unquantized", picked=True)], "t", "x", "y")


def test_what_was_trained_ships_and_verifies_against_what_was_measured(study, trial, tmp_path, monkeypatch):
    store, record, folder = study
    monkeypatch.setenv("AUTOQ_CACHE", str(folder / "cache"))
    found = recover_trial(store, record.id, trial.number, Training(20, rate=3.0))
    manifest = export(store, record, found, tmp_path / "trained")
    assert manifest.hash == found.hash != trial.hash
    assert manifest.size_bytes == trial.best_measurements()["size_bytes"].value
    assert files.read_assignment(tmp_path / "trained", manifest) == found.assignment
    assert f"{len(found.assignment.trained)} layers were trained" in (tmp_path / "trained" / "README.md").read_text()
    # On another machine, whose database is asked for what was trained of the searched model.
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "another-machine"))
    alone = verify(tmp_path / "trained", latency=False)
    (quality,) = [check for check in alone.checks if check.name == "quality"]
    assert (quality.ok, quality.note) == (None, "trained layers of the searched model are not here: give --db")
    with Store.open(str(tmp_path / "empty.db")) as empty:
        elsewhere = verify(tmp_path / "trained", latency=False, fetch=empty.trained_layers)
    assert "no trained layer with digest" in elsewhere.checks[-1].note
    whole = verify(tmp_path / "trained", latency=False, fetch=store.trained_layers)
    assert whole.ok, whole.checks
    assert {"bytes", "formats", "outputs", "kl_nats_per_token"} <= {check.name for check in whole.checks}
    # The parent's weights in the trained one's name are not what was measured.
    export(store, record, trial, tmp_path / "parent")
    shutil.copy(tmp_path / "parent" / "model.safetensors", tmp_path / "trained" / "model.safetensors")
    entry = files.digest(tmp_path / "trained" / "model.safetensors")
    swapped = manifest.model_copy(update={"files": {**manifest.files, "model.safetensors": entry}})
    files.write(tmp_path / "trained", swapped)
    assert not verify(tmp_path / "trained", latency=False, fetch=store.trained_layers).ok
