"""Recipes of AutoQ's own, how kinds are told apart, and what no recipe may do."""

import json
import os

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from autoq.assignment import Assignment
from autoq.errors import BadInput
from autoq.recipes import RecipeRefused, read
from autoq.scheme import Float, Integer, Keep, PerChannel, PerGroup, PerTensor
from autoq.shipping.manifest import Manifest
from autoq.targets.generic import Generic

from .conftest import Anything, llama

NAMES = [layer.name for layer in llama().layers]
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
ASSIGNMENT = {Q: "rtn-int4-g64", "model.layers.1.mlp.down_proj": "hqq-int3-g64-rz"}
TRIAL = {"study": "s", "number": 3, "baseline": None, "hash": "x", "measurements": {}, "assignment": ASSIGNMENT}


def manifest(assignment, **more):
    fields = {"autoq": "0", "created": "2026", "study": "s", "trial": 3, "target": "generic", "searched_on": "generic"}
    fields |= {"runtime": "", "written_as": "x", "run": "", "spec": {}, "hash": assignment.hash, "size_bytes": 1.0}
    fields |= {"other_bytes": 1, "measurements": {}, "weights": (), "report_tokens": "0" * 64, "versions": {}}
    return Manifest(**fields, noise={}, files={}).model_dump() | more


def refused(path, info=None, target=None):
    with pytest.raises(RecipeRefused) as caught:
        read(str(path), info or llama(), target or Anything())
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.exit_code == 2
    return line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("assignment.json", ASSIGNMENT),
        ("pick.json", TRIAL),
        ("pick.yaml", yaml.safe_dump(TRIAL, sort_keys=False)),
        ("plain.yaml", yaml.safe_dump(ASSIGNMENT)),
    ],
)
def test_an_assignment_as_it_is_printed(recipe, name, content):
    assert recipe(name, content) == ASSIGNMENT


@pytest.mark.parametrize("given_path", ["out", "out/autoq.json", "out/assignment.json"])
def test_an_export_by_its_folder_or_a_file_of_it(write, tmp_path, given_path):
    write("out/assignment.json", ASSIGNMENT)
    write("out/autoq.json", manifest(Assignment.from_dict(ASSIGNMENT)))
    found = read(str(tmp_path / given_path), llama(), Anything())
    assert found.name == "out"
    assert found.assignment == Assignment.from_dict(dict.fromkeys(NAMES, "keep") | ASSIGNMENT)


def test_an_export_that_was_changed_is_refused(write, tmp_path):
    whole = Assignment.from_dict(ASSIGNMENT)
    write("out/autoq.json", manifest(whole))
    assert "the export is not whole" in refused(tmp_path / "out")
    outside = write("assignment.json", ASSIGNMENT)
    (tmp_path / "out/assignment.json").symlink_to(outside)
    assert "assignment.json is a link to a file outside of the folder" in refused(tmp_path / "out")
    (tmp_path / "out/assignment.json").unlink()
    write("out/assignment.json", ASSIGNMENT | {K: "rtn-int4-g64"})
    assert "assignment.json is not the assignment that autoq.json names" in refused(tmp_path / "out")
    write("out/autoq.json", manifest(whole, format=7))
    assert "autoq.json is not a manifest: format" in refused(tmp_path / "out")


schemes = st.one_of(
    st.just(Keep()),
    st.builds(
        Integer,
        st.sampled_from(["rtn", "hqq"]),
        st.integers(2, 8),
        st.sampled_from([PerChannel(), PerTensor(), PerGroup(32), PerGroup(64)]),
        st.sampled_from(["none", "integer", "real"]),
        st.sampled_from([None, "a8dyn", "a8static"]),
    ),
    st.builds(Float, st.just("rtn"), st.just("fp8"), st.sampled_from([PerChannel(), PerTensor()])),
)


@given(st.fixed_dictionaries(dict.fromkeys(NAMES, schemes)), st.sampled_from(["json", "yaml", "plain"]))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_what_is_printed_reads_back(tmp_path, monkeypatch, wanted, form):
    # Whether a method makes a scheme is another test's business.
    monkeypatch.setattr("autoq.recipes._refusal", lambda *_: None)
    assignment = Assignment(wanted)
    trial = TRIAL | {"assignment": assignment.to_dict()}
    text = {"json": json.dumps(trial), "yaml": yaml.safe_dump(trial), "plain": assignment.json}[form]
    path = tmp_path / "printed"
    path.write_text(text, encoding="utf-8")
    assert read(str(path), llama(), Anything()).assignment == assignment


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("My mix (v2).json", "My-mix-v2"),
        ("out/assignment.json", "out"),
        ("q4/config.json", "q4"),
        ("...json", "recipe"),
        ("ü.json", "recipe"),
        ("a" * 100 + ".json", "a" * 60),
    ],
)
def test_names_are_plain(write, path, name):
    content = ASSIGNMENT if "config" not in path else {"quantization_config": {"bits": 4, "quant_method": "gptq"}}
    assert read(str(write(path, content)), llama(), Anything()).name == name


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("", "is no recipe; choose from a folder or manifest that autoq export wrote"),
        ("some words of text", "is no recipe"),
        ("{}", "is no recipe"),
        ("[1, 2]", "is no recipe"),
        ('{"a": 1}', "is no recipe"),
        ("{", "is not valid JSON"),
        ('{"a": NaN}', "is not valid JSON: NaN is no number"),
        ('{"assignment": {"x": "keep", "x": "rtn-int4-g64"}}', "holds the key 'x' twice"),
        ('{"assignment": ' + "[" * 100_000 + "}", "is not valid JSON"),
        ('{"assignment": {}}', "assignment must map layer names to schemes"),
        ('{"assignment": [1]}', "assignment must map layer names to schemes"),
        ('{"assignment": {"lm_head": 4}}', "must map a name to a scheme text"),
        ('{"assignment": {"lm_head": "int4"}}', "scheme 'int4' is not of a known form"),
        ('{"assignment": {"lm_head": "magic-int4-g64"}}', "no method 'magic'"),
        ("a: &x 1\nb: *x", "must not use YAML anchors"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        ({f"block.{i}": "keep" for i in range(5)}, "no layers block.0, block.1, block.2 and 2 more; its layers are"),
        ({Q: "rtn-int4-g48"}, f"cannot run layers {Q} as the recipe has them (rtn-int4-g48: group size 48 does not"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method must be one of gptq, compressed-tensors"),
        ({"quantization_config": [4]}, "quantization_config must be a mapping (got [4])"),
    ],
)
def test_what_is_not_usable_is_one_line(write, content, fragment):
    path = write("bad", content)
    line = refused(path)
    assert line.startswith("recipe '")
    assert fragment in line


def test_layers_that_the_target_cannot_run_are_named_with_its_rule(write):
    path = write("r.json", dict.fromkeys(NAMES[1:6], "rtn-int8-channel-sym-a8dyn"))
    line = refused(path, target=Generic())
    assert f"layers {NAMES[1]}, {NAMES[2]}, {NAMES[3]} and 2 more" in line
    assert "(rtn-int8-channel-sym-a8dyn: a8dyn needs a kernel" in line


def test_a_fusion_group_must_share_a_scheme_where_the_target_fuses(write):
    path = write("r.json", {Q: "rtn-int4-g64"})
    assert read(str(path), llama(), Anything()).name == "r"
    assert f"runs {Q} and {K} as one layer, and the recipe gives them rtn-int4-g64 and keep" in refused(
        path, target=Anything(fuses=True)
    )


def test_a_path_that_is_not_there_or_no_file(tmp_path):
    assert "No such file" in refused(tmp_path / "nowhere")
    assert "the path is empty" in refused("")
    assert "recipe '" in refused("a\0b")
    assert "recipe '" in refused("\udcff")
    assert "the folder holds no recipe; choose from" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe")


def test_a_link_out_of_the_folder_is_not_followed(write, tmp_path):
    outside = write("elsewhere/config.json", {"quantization_config": {"bits": 4, "quant_method": "gptq"}})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to(outside)
    assert "config.json is a link to a file outside of the folder" in refused(folder)
    # Who names the link itself wants it followed.
    assert read(str(folder / "config.json"), llama(), Anything()).name == "model"
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    assert "config.json is a link" in refused(folder)
    (folder / "config.json").unlink()
    write("model/own.json", outside.read_bytes())
    (folder / "config.json").symlink_to("own.json")
    assert read(str(folder), llama(), Anything()).name == "model"


def test_a_file_that_cannot_be_read_is_one_line(write, monkeypatch):
    def broken(self, *_):
        raise PermissionError(13, "Permission denied")

    path = write("r.json", ASSIGNMENT)
    monkeypatch.setattr("pathlib.Path.open", broken)
    assert refused(path).endswith(": cannot be read: Permission denied")


def test_a_file_that_is_too_large_is_not_read(write, monkeypatch):
    monkeypatch.setattr("autoq.recipes._files.MAX_BYTES", 20)
    assert "big is larger than 20 bytes" in refused(write("big", "x" * 21))


def test_refusals_are_bad_input():
    assert issubclass(RecipeRefused, BadInput)
