"""Models of images: what is found in them, what they weigh, what they answer, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autoq.errors import ModelRefused
from autoq.models import LoadedModel, inspect, load, pixels
from autoq.models.prefix import cut, run
from autoq.scheme import Keep
from autoq.spec import ModelSpec

FAMILIES = ("vit", "deit")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tiny_vision, tmp_path_factory) -> Path:
    return tiny_vision.save(family, tmp_path_factory.mktemp(family), steps=0)


@pytest.fixture(scope="module")
def loaded(folder) -> LoadedModel:
    return load(ModelSpec(id=str(folder)))


@pytest.fixture
def images(loaded) -> torch.Tensor:
    return torch.randn(3, 3, 16, 16)


def test_every_family_is_here(tiny_vision):
    assert set(FAMILIES) == set(tiny_vision.FAMILIES)


def test_the_skeleton_is_that_of_the_loaded_model(family, folder, loaded, tiny_vision):
    info = inspect(ModelSpec(id=str(folder)))
    assert info == loaded.info
    assert (info.task, info.vocab_size, info.labels) == ("classification", 0, tiny_vision.CLASSES[::-1])
    tokens = tiny_vision.FAMILIES[family][2]
    assert vars(info.images) == {"channels": 3, "height": 16, "width": 16, "tokens": tokens}
    assert (info.max_positions, info.answers) == (tokens, 10)


def test_the_layers_are_those_of_two_blocks_and_the_head(loaded):
    names = [layer.name.rpartition(".")[2] for layer in loaded.info.layers]
    assert names == [*(["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"] * 2), "classifier"]
    assert [layer.block for layer in loaded.info.layers] == [0] * 6 + [1] * 6 + [None]
    groups = [layer.fusion_group for layer in loaded.info.layers]
    assert groups[0] == groups[1] == groups[2] != groups[6] == groups[7] == groups[8]
    assert {kind for layer in loaded.info.layers for kind in [layer.kind]} == {"linear"}


def test_bytes_add_up_to_the_checkpoint(folder, loaded):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert sum(layer.nbytes(Keep()) for layer in loaded.info.layers) + loaded.info.other_bytes == stored


def test_outputs_are_transformers_own(loaded, images):
    outputs = loaded.outputs(images)
    assert outputs.shape == (3, 1, 10)
    with torch.no_grad():
        expected = loaded.model(pixel_values=images.to(torch.bfloat16)).logits
    assert torch.equal(outputs[:, 0], expected)


def test_an_image_is_one_sequence(family, loaded, images, tiny_vision):
    tokens = tiny_vision.FAMILIES[family][2]
    assert (loaded.length(images), loaded.tokens(images), loaded.positions(tokens)) == (tokens, 3 * tokens, 1)
    assert loaded.shortened(images, 4) is images
    assert loaded.next_tokens(images[0]).tolist() == [-1]


def test_swapping_any_layer_changes_the_outputs_and_restoring_is_exact(loaded, images):
    before = loaded.outputs(images)
    for layer in loaded.info.layers:
        loaded.swap({layer.name: torch.randn(layer.out_features, layer.in_features).bfloat16()})
        assert not torch.equal(loaded.outputs(images), before), layer.name
        loaded.restore()
        assert torch.equal(loaded.outputs(images), before), layer.name


def test_the_blocks_are_a_chain_that_can_be_entered_anywhere(family, loaded, images, tiny_vision):
    found = cut(loaded, images[:1])
    assert found is not None
    chain, token_bytes = found
    assert token_bytes == 64 * 2
    states: dict[int, torch.Tensor] = {}
    expected = run(loaded, chain, images[1:2], 0, None, range(2), states.__setitem__)
    assert states[1].shape == (1, tiny_vision.FAMILIES[family][2], 64)
    assert torch.equal(run(loaded, chain, images[1:2], 1, states[1]), expected)


def test_float32_is_the_same_model_and_reads_the_checkpoints_own_preparation(folder, tmp_path, monkeypatch, images):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    copy = shutil.copytree(folder, tmp_path / "copy")
    wide = load(ModelSpec(id=str(copy), dtype="float32"))
    narrow = load(ModelSpec(id=str(copy)))
    assert torch.allclose(wide.outputs(images), narrow.outputs(images).float(), atol=0.05)
    told = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(told | {"image_mean": [0.1, 0.2, 0.3]}))
    # The converted weights are kept; what stands beside them is read anew.
    assert load(ModelSpec(id=str(copy), dtype="float32")).tokenizer.image_mean == (0.1, 0.2, 0.3)


def test_pixels_are_made_by_pillow_as_the_checkpoint_says(loaded):
    grey = PIL.Image.fromarray(np.full((16, 16, 3), 51, np.uint8))
    found = loaded.tokenizer(images=grey, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, torch.full((1, 3, 16, 16), (0.2 - 0.5) / 0.5))
    assert "Pil" in type(loaded.tokenizer).__name__


@pytest.mark.parametrize("kind", [{}, {"feature_extractor_type": "ViTFeatureExtractor"}])
def test_a_preparation_as_older_checkpoints_have_it(vision_config_folder, tmp_path, kind):
    former = {"image_processor_type": None, "do_convert_rgb": None, "size": 16, **kind}
    model = load(changed(vision_config_folder, tmp_path / "former", "preprocessor_config.json", **former))
    assert type(model.tokenizer).__name__ == "ViTImageProcessorPil"
    image = PIL.Image.new("RGB", (40, 20), "white")
    assert torch.equal(model.tokenizer(images=image, return_tensors="pt")["pixel_values"], torch.ones(1, 3, 16, 16))


def test_a_model_that_could_read_text_too_is_found_by_its_tower_of_images(tiny_vision, tmp_path):
    import transformers

    tower = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(vision_config=tower, num_labels=4)
    transformers.CLIPForImageClassification(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_vision.processor(side=32).save_pretrained(tmp_path)
    info = inspect(ModelSpec(id=str(tmp_path)))
    assert info.images is not None
    assert (info.images.tokens, len(info.layers)) == (17, 13 + 1)
    assert info == load(ModelSpec(id=str(tmp_path))).info


def changed(folder: Path, to: Path, file: str, **values: Any) -> ModelSpec:
    """A copy of a model's folder with other values in one of its files; None takes an entry out."""
    shutil.copytree(folder, to)
    told = json.loads((to / file).read_text()) | values
    (to / file).write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return ModelSpec(id=str(to))


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"num_channels": 4}, "reads num_channels 4; images have 1 or 3"),
            ({"num_channels": None, "architectures": ["Nothing"]}, "classifier of texts or images"),
            ({"image_size": [16, 16, 16]}, "image_size"),
            ({"image_size": 0}, "image_size"),
            ({"id2label": {"0": "one"}, "label2id": {"one": 0}}, "a classifier needs two classes or more"),
            ({"id2label": {"0": "one", "5": "two"}}, "must name classes 0 to"),
            ({"problem_type": "multi_label_classification"}, "one of which is right"),
            ({"patch_size": 32}, "does not run on images alone|cannot be built"),
            ({"auto_map": {"AutoModel": "x.py"}}, "brings its own code"),
        ],
    )
    def test_a_config_that_does_not_say_what_is_needed(self, vision_config_folder, tmp_path, values, said):
        spec = changed(vision_config_folder, tmp_path / "changed", "config.json", **values)
        self.refused(spec, said)

    def refused(self, spec: ModelSpec, said: str, how: Any = inspect) -> None:
        with pytest.raises(ModelRefused, match=said) as caught:
            how(spec)
        assert "\n" not in str(caught.value)

    def test_a_model_without_a_preparation(self, vision_config_folder, tmp_path):
        spec = changed(vision_config_folder, tmp_path / "changed", "config.json")
        (tmp_path / "changed" / "preprocessor_config.json").unlink()
        self.refused(spec, "has no preprocessor_config.json, which says how images become its inputs")

    def test_a_preparation_that_is_none(self, vision_config_folder, tmp_path):
        spec = changed(vision_config_folder, tmp_path / "changed", "config.json")
        file = tmp_path / "changed" / "preprocessor_config.json"
        for content, said in (
            ("{", "cannot be read"),
            ("[]", "is not a mapping"),
            ('{"auto_map": {"AutoImageProcessor": "evil.Evil"}}', "brings its own code"),
            ('{"image_processor_type": "ViTImageProcessor", "size": 3.5}', "is not usable"),
        ):
            file.write_text(content)
            self.refused(spec, said, load)

    def test_a_processor_of_a_name_that_is_unknown(self, vision_config_folder, tmp_path):
        spec = changed(vision_config_folder, tmp_path / "changed", "preprocessor_config.json", image_processor_type="X")
        self.refused(spec, "is not usable: Unrecognized image processor", load)

    def test_without_pillow(self, vision_config_folder, monkeypatch):
        monkeypatch.setattr(pixels.importlib.util, "find_spec", lambda name: None)
        spec = ModelSpec(id=str(vision_config_folder))
        self.refused(spec, r"needs Pillow: pip install 'autoq\[images\]'", load)

    def test_weights_of_another_model(self, vision_config_folder, tmp_path):
        spec = changed(vision_config_folder, tmp_path / "changed", "config.json")
        file = tmp_path / "changed" / "model.safetensors"
        tensors = load_file(file)
        tensors.pop("vit.embeddings.patch_embeddings.projection.weight")
        save_file(tensors, file, metadata={"format": "pt"})
        self.refused(spec, "lacks 1 of its weights", load)


@pytest.fixture(scope="module")
def vision_config_folder(tiny_vision, tmp_path_factory) -> Path:
    return tiny_vision.save("vit", tmp_path_factory.mktemp("refused"), steps=0)
