"""The study spec: what is accepted, what it becomes, and one clear line for everything else."""

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoq.errors import SpecError
from autoq.spec import build_spec, load_spec, parse_spec, shipped_specs
from autoq.spec_units import parse_bytes, parse_seconds
from autoq.strict_yaml import MAX_BYTES

MODEL = "model: {id: some/model}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (12, 12),
        (12.0, 12),
        ("120MB", 120_000_000),
        ("120 mb", 120_000_000),
        ("1.5GiB", 3 * 2**29),
        ("7KiB", 7168),
        ("1e6", 1_000_000),
        ("3B", 3),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "MB", "12XB", "-1MB", "1,5MB", "12 MB MB", True, None, 1.5, "inf", [1], "1e400MB", "80Mb", "80Kib"]
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="size such as 120MB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (90, 90.0),
        ("90s", 90.0),
        ("30m", 1800.0),
        ("1.5h", 5400.0),
        ("1h30m", 5400.0),
        ("1h 30m 5s", 5405.0),
        ("2d", 172800),
    ],
)
def test_times(text, expected):
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("text", ["", "m", "30", "1h30", "12m 7", "1 2m", "30M", "30min", "-5s", True, None, "1:30"])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="time such as 90s"):
        parse_seconds(text)


def test_a_model_is_all_that_a_spec_needs():
    spec = parse_spec(MODEL)
    assert spec.name == "study"
    assert spec.objectives == ("kl_nats_per_token", "size_bytes", "latency_decode_ms")
    assert (spec.target.name, spec.target.plugin) == ("torch-cpu", "torch_cpu")
    assert (spec.workers.executor, spec.workers.count) == ("local", 1)
    assert spec.budget.trials == 96


def test_a_whole_spec_reads_as_written():
    spec = parse_spec(
        """
        name: laptop
        model: {id: some/model, dtype: float32, revision: abc}
        data: {source: python-docs, calibration_tokens: 1024, search_tokens: 512, report_tokens: 2048}
        target: {name: torch-cpu, batch_size: 2, prompt_tokens: 128, threads: 2}
        space:
          methods: [rtn, hqq]
          bits: [3, 4, 8]
          group_size: [64, channel]
          zero_points: [none, integer]
          activations: [none, a8dyn, a8mse]
          exclude: [lm_head]
          overrides: [{match: "*.down_proj", schemes: [rtn-int8-channel-sym, keep]}]
        objectives: [kl_nats_per_token, size_bytes]
        constraints: {size_bytes: {max: 120MB}, latency_decode_ms: {max: 1e1}}
        sampler: {name: tpe, seed: 7, options: {multivariate: true, gamma: 0.1}}
        budget: {trials: 12, wall_time: 30m}
        workers: {executor: ray, count: 2, cpus: 4, gpus: 0.5, address: auto}
        bank: {disk: 5GB}
        """
    )
    assert spec.space.group_size == (64, "channel")
    assert spec.space.activations == ("none", "a8dyn", "a8mse")
    assert spec.space.overrides[0].schemes == ("rtn-int8-channel-sym", "keep")
    assert spec.constraints["size_bytes"].max == 120e6
    assert spec.constraints["latency_decode_ms"].max == 10.0
    assert spec.measured == ("kl_nats_per_token", "size_bytes", "latency_decode_ms")
    assert spec.budget.wall_time == 1800.0
    assert spec.bank.disk == 5 * 10**9
    assert spec.sampler.options == {"multivariate": True, "gamma": 0.1}


def test_a_spec_survives_json():
    spec = load_spec("demo")
    assert build_spec(json.loads(spec.model_dump_json())) == spec


def test_shipped_specs_are_valid_and_named_after_their_files():
    for name, text in shipped_specs().items():
        assert parse_spec(text).name == name


def test_a_file_of_a_shipped_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("name: mine\n" + MODEL)
    assert load_spec("demo").name == "mine"


def test_overrides_set_deep_values_and_make_sections():
    spec = parse_spec(
        MODEL + "space:\nbudget: {trials: 3}\n",
        [
            "sampler.seed=5",
            "budget.trials=7",
            "space.bits=[4, 8]",
            "constraints.size_bytes.max=90MB",
            "name=x1",
        ],
    )
    assert spec.sampler.seed == 5
    assert spec.budget.trials == 7
    assert spec.space.bits == (4, 8)
    assert spec.constraints["size_bytes"].max == 90e6
    assert spec.name == "x1"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sampler.seed", "--set 'sampler.seed' must look like sampler.seed=1"),
        ("=3", "must look like"),
        ("a..b=3", "must look like"),
        ("name.first=3", "'name' is not a section"),
        ("sampler.sed=3", "sampler.sed: no such field; did you mean 'seed'? choose from name, seed, seeds, options"),
        ("budget.trials=many", "budget.trials: must be a whole number (got 'many')"),
        ("budget.trials=[1", "--set 'budget.trials=[1' is not valid YAML"),
        ("budget.trials=&a 1", "must not use YAML anchors"),
        ("space.bits=4", "space.bits: must be a list (got 4)"),
    ],
)
def test_bad_overrides(override, expected):
    with pytest.raises(SpecError) as caught:
        parse_spec(MODEL + "name: n\n", [override])
    assert expected in str(caught.value)


MISTAKES = [
    ("name: x", ["model: is required"]),
    ("[1, 2]", ["must be a mapping with at least the key 'model'"]),
    ("", ["must be a mapping"]),
    ("model: gpt2", ["model: must be a section with fields from id, dtype, revision, transform (got 'gpt2')"]),
    ("model: {}", ["model.id: is required"]),
    ("model: {id: ''}", ["model.id: must not be empty"]),
    ("model: {id: 3}", ["model.id: must be text (got 3)"]),
    ("model: {id: x, dtype: bf16}", ["model.dtype", "'bf16'", "'float32'", "did you mean 'bfloat16'?"]),
    ("model: {id: x, quant: 4}", ["model.quant: no such field", "id, dtype, revision"]),
    ("modle: {id: x}", ["model: is required (and 1 more)"]),
    (MODEL + "objectivs: []", ["objectivs: no such field; did you mean 'objectives'?", "sampler, budget"]),
    (MODEL + "objectives: []", ["objectives: give at least one objective"]),
    (MODEL + "objectives: [perplexty]", ["no objective 'perplexty'; did you mean 'perplexity'?", "size_bytes"]),
    (MODEL + "objectives: [size_bytes, size_bytes]", ["objectives: an objective is named twice"]),
    (MODEL + "objectives: size_bytes", ["objectives: must be a list (got 'size_bytes')"]),
    (MODEL + "target: {name: torch-cup}", ["target.name: no target 'torch-cup'; did you mean 'torch-cpu'?", "generic"]),
    (MODEL + "target: {batch_size: 0}", ["target.batch_size: must be at least 1 (got 0)"]),
    (MODEL + "target: {threads: 2.0}", ["target.threads: must be a whole number (got 2.0)"]),
    (MODEL + "space: {methods: [gtpq, rtn]}", ["space.methods", "no method 'gtpq'", "rtn"]),
    (MODEL + "space: {methods: []}", ["space: methods must not be empty"]),
    (MODEL + "space: {bits: [4, 9]}", ["space.bits.1: must be at most 8 (got 9)"]),
    (MODEL + "space: {bits: ['4']}", ["space.bits.0: must be a whole number (got '4')"]),
    (MODEL + "space: {group_size: [chanel]}", ["space.group_size.0", "channel or tensor (got 'chanel')"]),
    (MODEL + "space: {group_size: [1]}", ["space.group_size.0: must be a whole number from 2 to 65536", "(got 1)"]),
    (MODEL + "space: {group_size: [1x128]}", ["space.group_size.0: must be a block of at least 2x2", "'1x128'"]),
    (MODEL + "space: {group_size: [128x]}", ["space.group_size.0", "a block such as 64x64", "(got '128x')"]),
    (MODEL + "space: {formats: [fp9]}", ["space.formats.0: 'fp9' is not one of 'fp8', 'fp8_e5m2'", "'nvfp4'"]),
    (MODEL + "space: {formats: []}", ["space: formats must not be empty"]),
    (MODEL + "space: {schemes: [keep], formats: [fp8]}", ["not both schemes and formats"]),
    (MODEL + "space: {zero_points: [int]}", ["space.zero_points.0: 'int' is not one of 'none', 'integer' or 'real'"]),
    (MODEL + "space: {activations: [a8dy]}", ["space.activations.0", "did you mean 'a8dyn'?"]),
    ("model: {id: a, transform: hadamart}", ["model.transform", "did you mean 'hadamard'?"]),
    (MODEL + "space: {sparsity: [23]}", ["space.sparsity.0: must be a sparsity: choose 24", "10 to 95", "(got 23)"]),
    (MODEL + "space: {sparsity: ['2:4']}", ["space.sparsity.0", "choose 24", "(got '2:4')"]),
    (MODEL + "space: {sparsity: []}", ["space: sparsity must not be empty"]),
    (MODEL + "space: {schemes: [keep], sparsity: [24]}", ["both schemes and sparsity"]),
    (MODEL + "space: {schemes: [rtn23-int4-g64]}", ["space.schemes: no sparsity 23"]),
    (MODEL + "space: {kinds: [linears]}", ["space.kinds.0", "did you mean 'linear'?", "'embedding'"]),
    (MODEL + "space: {schemes: [rtn-int4]}", ["space.schemes: scheme 'rtn-int4' is not of a known form"]),
    (MODEL + "space: {schemes: [foo-int4-g64]}", ["space.schemes: no method 'foo'", "rtn"]),
    (MODEL + "space: {schemes: [keep], bits: [4]}", ["give either schemes or a grid, not both schemes and bits"]),
    (MODEL + "space: {exclude: lm_head}", ["space.exclude: must be a list (got 'lm_head')"]),
    (MODEL + "space:", ["space: must be a section", "leave it out for the default"]),
    (MODEL + "space: {overrides: [{bits: [4]}]}", ["space.overrides.0.match: is required"]),
    (MODEL + "space: {overrides: [{match: a, bitz: [4]}]}", ["space.overrides.0.bitz", "did you mean 'bits'?"]),
    (MODEL + "constraints: {size: {max: 1}}", ["no objective 'size'", "size_bytes"]),
    (MODEL + "constraints: {size_bytes: {max: 12XB}}", ["constraints: size_bytes.max", "(got '12XB')", "KiB"]),
    (MODEL + "constraints: {latency_decode_ms: {max: 12MB}}", ["latency_decode_ms.max: must be a number (got '12MB')"]),
    (MODEL + "constraints: {size_bytes: {maxi: 1}}", ["constraints.size_bytes.maxi", "did you mean 'max'?"]),
    (MODEL + "constraints: {size_bytes: {}}", ["constraints.size_bytes: give min, max or both"]),
    (MODEL + "constraints: {size_bytes: {min: 2, max: 1}}", ["min 2 is above max 1"]),
    (MODEL + "constraints: {size_bytes: {max: .inf}}", ["must be finite"]),
    (MODEL + "constraints: {size_bytes: {max: .nan}}", ["must be finite"]),
    (MODEL + "constraints: {size_bytes: {max: true}}", ["must be a number (got True)"]),
    (MODEL + "sampler: {name: tpee}", ["no sampler 'tpee'; did you mean 'tpe'?"]),
    (MODEL + "sampler: {seed: -1}", ["sampler.seed: must be at least 0 (got -1)"]),
    (MODEL + "sampler: {options: {a: [1]}}", ["sampler.options: 'a' must be a number, text", "(got [1])"]),
    (MODEL + "sampler: {options: {a: .nan}}", ["sampler.options: 'a' must be finite"]),
    (MODEL + "target: {threads: 100000}", ["target.threads: must be at most 1024 (got 100000)"]),
    (MODEL + "workers: {cpus: 100000}", ["workers.cpus: must be at most 1024"]),
    (MODEL + "budget: {trials: 0}", ["budget.trials: must be at least 1 (got 0)"]),
    (MODEL + "budget: {trials: true}", ["budget.trials: must be a whole number (got True)"]),
    (MODEL + "budget: {wall_time: 1h30}", ["budget.wall_time: must be a time such as", "s, m, h, d (got '1h30')"]),
    (MODEL + "budget: {stop_confidence: 0.5}", ["budget.stop_confidence: must be more than 0.5 (got 0.5)"]),
    (MODEL + "budget: {stop_confidence: 1}", ["budget.stop_confidence: must be less than 1 (got 1)"]),
    (MODEL + "budget: {stop_confidence: true}", ["budget.stop_confidence: must be a number (got True)"]),
    (MODEL + "budget: {wall_time: 0}", ["budget.wall_time: must be more than 0"]),
    (
        MODEL + "workers: {executor: rai}",
        ["workers.executor: 'rai' is not one of 'local' or 'ray'; did you mean 'ray'?"],
    ),
    (MODEL + "workers: {count: 4}", ["workers: count 4 needs executor ray"]),
    (MODEL + "workers: {address: auto}", ["workers: address 'auto' needs executor ray"]),
    *(
        (
            MODEL + f"workers: {{executor: ray, address: '{address}'}}",
            ["workers.address: must be auto, HOST:PORT", address],
        )
        for address in ("local", "10.0.0.5", ":6379", "h:0", "h:65536", "ray://h", "http://h:1", "h:6379/x")
    ),
    (MODEL + "workers: {gpus: -1}", ["workers.gpus: must be at least 0"]),
    (
        MODEL + "workers: {gpus: 1.5, executor: ray}",
        ["workers: gpus 1.5 must be a fraction of one GPU or a whole number"],
    ),
    (MODEL + "workers: {memory: 8GB}", ["workers: memory 8000000000 needs executor ray"]),
    (MODEL + "workers: {device: H100}", ["workers: device 'H100' needs executor ray"]),
    (MODEL + "workers: {executor: ray, memory: lots}", ["workers.memory"]),
    (MODEL + "workers: {executor: ray, placement: packed}", ["'packed' is not one of 'pack' or 'spread'", "'pack'?"]),
    (MODEL + "bank: {disk: -1}", ["bank.disk: must be at least 0"]),
    (MODEL + "name: a b", ["name: must start with a letter or digit", "(got 'a b')"]),
    (MODEL + "name: no", ["name: must be text (got False)"]),
    (MODEL + "data: {window_tokens: 4}", ["data.window_tokens: must be at least 8"]),
    (MODEL + "data: {seed: 0x" + "f" * 6000 + "}", ["data.seed", "(got <a whole number of 24000 bits>)"]),
    (MODEL + "1: 2", ["keys must be text"]),
    (MODEL + 'name: "\\e[31mred"', ["name: must start", r"(got '\x1b[31mred')"]),
    (MODEL + "name: a\nname: b", ["the spec holds the key 'name' twice (line 3)"]),
    ("model: &m {id: x}\ntarget: *m", ["must not use YAML anchors or aliases (line 1)"]),
    ("model: *m", ["must not use YAML anchors or aliases"]),
    ("model: !!python/object:os.system {id: x}", ["must not use YAML tags (line 1)"]),
    ("model: !!timestamp x", ["must not use YAML tags"]),
    ("model: {id: 2024-99-99}", ["is not valid YAML: month must be in 1..12"]),
    ("model: {id: " + "1" * 5000 + "}", ["is not valid YAML", "4300 digits"]),
    ("model: {id: 0b_}", ["is not valid YAML"]),
    ("model: [", ["the spec is not valid YAML"]),
    ("model: a\n---\nmodel: b", ["the spec is not valid YAML"]),
    ("? [1]\n: 2", ["the spec is not valid YAML"]),
    ("a: \x00", ["the spec is not valid YAML"]),
    ("model: " + "[" * 5000, ["is nested more than 32 deep"]),
    ("#" * (MAX_BYTES + 1), [f"the spec is larger than {MAX_BYTES} bytes"]),
]


@pytest.mark.parametrize(("text", "fragments"), MISTAKES, ids=range(len(MISTAKES)))
def test_every_mistake_is_one_line_that_names_it(text, fragments):
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    line = str(caught.value)
    for fragment in fragments:
        assert fragment in line
    assert line.isprintable()
    assert len(line) < 500
    assert caught.value.exit_code == 2


def test_a_name_is_at_most_100_characters():
    assert parse_spec(MODEL + f"name: {'a' * 100}").name == "a" * 100
    with pytest.raises(SpecError, match="up to 100 characters"):
        parse_spec(MODEL + f"name: {'a' * 101}")


def test_a_bomb_is_refused_at_once():
    levels = [f"l{n}: &l{n} [{', '.join(['*l' + str(n - 1)] * 9) if n else 'lol'}]" for n in range(12)]
    with pytest.raises(SpecError, match="anchors"):
        parse_spec("\n".join(levels))


@pytest.mark.parametrize("name", ["nowhere.yaml", "dmeo", "a\0b", "x" * 5000])
def test_no_such_spec_names_those_that_are_shipped(name):
    with pytest.raises(SpecError) as caught:
        load_spec(name)
    assert "demo" in str(caught.value)
    assert "did you mean 'demo'?" in str(caught.value) or name != "dmeo"


def test_files_that_cannot_be_read(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: \xff\xfe\xe9")
    with pytest.raises(SpecError, match="is not UTF-8 text"):
        load_spec(latin)
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        load_spec(tmp_path)
    large = tmp_path / "large.yaml"
    large.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(SpecError, match="is larger than"):
        load_spec(large)


def test_a_folder_does_not_hide_a_shipped_spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert load_spec("demo").name == "demo"


def test_a_byte_order_mark_is_no_part_of_a_spec(tmp_path):
    path = tmp_path / "bom.yaml"
    path.write_text(MODEL, encoding="utf-8-sig")
    assert load_spec(path).model.id == "some/model"


FIELDS = [
    *["model", "id", "dtype", "name", "data", "source", "target", "space", "methods", "bits", "group_size", "schemes"],
    *["overrides", "match", "objectives", "constraints", "size_bytes", "min", "max", "sampler", "options", "seed"],
    *["budget", "trials", "wall_time", "workers", "count", "executor", "address", "gpus", "bank", "disk", "kinds"],
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(15000, 15010).map(lambda bits: -1 << bits),
    st.floats(),
    st.text(),
    st.sampled_from(["120MB", "30m", "rtn", "rtn-int4-g64", "channel", "size_bytes", "x", "ray", "\ud800", "\x1b[2J"]),
)
KEYS = st.one_of(st.sampled_from(FIELDS), st.text(max_size=5), st.integers(), st.none())
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=20
)


def refusal(read):
    """The message of the `SpecError` that `read` raises, or None; any other exception goes through."""
    try:
        read()
    except SpecError as problem:
        return str(problem)
    return None


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, TREES, max_size=6))
def test_no_tree_raises_anything_but_a_spec_error(tree):
    line = refusal(lambda: build_spec({"model": {"id": "x"}, **tree}))
    assert line is None or (line.isprintable() and len(line) < 1500)


SECTIONS = ["model", "data", "target", "space", "constraints", "sampler", "budget", "workers", "bank"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(SECTIONS), st.dictionaries(st.sampled_from(FIELDS), TREES, max_size=4))
def test_no_section_raises_anything_but_a_spec_error(section, fields):
    line = refusal(lambda: build_spec({"model": {"id": "x"}, section: fields}))
    assert line is None or (line.isprintable() and len(line) < 1500)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="{}[]:-?&*!|>'\"%#, \n0ax~<.", max_size=60))
def test_no_text_raises_anything_but_a_spec_error(text):
    for source in (text, MODEL + text):
        line = refusal(lambda source=source: parse_spec(source, [f"budget.trials={text}"]))
        assert line is None or "\n" not in line


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TREES)
def test_yaml_and_plain_data_mean_the_same(tree):
    """What PyYAML writes without aliases, the strict loader reads as PyYAML's own safe loader does."""

    def outcome(read):
        try:
            return read()
        except (SpecError, yaml.YAMLError, ValueError) as problem:
            return type(problem)

    try:
        text = yaml.safe_dump({"model": {"id": "x"}, "sampler": {"options": {"a": tree}}})
    except (yaml.YAMLError, ValueError, TypeError):
        return
    if "&" in text or "!" in text or "? " in text:
        return
    assert outcome(lambda: parse_spec(text)) == outcome(lambda: build_spec(yaml.safe_load(text)))
