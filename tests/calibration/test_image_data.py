"""Images: from a dataset to pixel values, their disjoint parts, and what cannot be one."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.calibration import images
from autoq.calibration.images import decoded, parts, pixels, recovery_images
from autoq.errors import DataRefused
from autoq.layer import Images
from autoq.spec import DataSpec

datasets = pytest.importorskip("datasets")

COLOUR, GREY = Images(3, 16, 16, 17), Images(1, 16, 16, 17)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def processor(tiny_vision) -> Any:
    return tiny_vision.processor()


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (16, 16), seed: int = 0) -> PIL.Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return PIL.Image.fromarray(values, "RGBA" if mode == "RGBA" else None).convert("RGB" if mode != "RGBA" else mode)


def spec_of(source: object, calibration: int = 3, search: int = 4, report: int = 5, **fields: Any) -> DataSpec:
    counts = {"calibration_tokens": calibration, "search_tokens": search, "report_tokens": report}
    tokens = {name: count * 17 for name, count in counts.items()}
    return DataSpec(**{"source": str(source), "column": "image", **tokens, **fields})


def refused(spec: DataSpec, wanted: Images = COLOUR) -> str:
    with pytest.raises(DataRefused) as caught:
        images.check(spec, wanted)
    told = str(caught.value)
    assert "\n" not in told
    return told


@pytest.fixture(scope="module")
def sources(tiny_vision, tmp_path_factory) -> dict[str, Path]:
    """The same 20 pictures as a folder of files, as Parquet, and as a saved dataset."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_vision.folder_of_images(folder / "files", 20, seed=0)
    content = [encoded(image) for image, _ in tiny_vision.pictures(20, seed=0)]
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": each, "path": None} for each in content]},
        features=datasets.Features({"image": datasets.Image(decode=False)}),
    ).cast_column("image", datasets.Image())
    (folder / "parquet").mkdir()
    rows.to_parquet(folder / "parquet" / "train.parquet")
    rows.save_to_disk(folder / "saved")
    (folder / "plain").mkdir()  # bytes that no feature calls an image, as other libraries write them
    datasets.Dataset.from_dict({"image": content}).to_parquet(folder / "plain" / "train.parquet")
    return {kind: folder / kind for kind in ("files", "parquet", "saved", "plain")}


# -- parts ----------------------------------------------------------------------------------------


def test_parts_have_as_many_images_as_their_tokens_allow(sources, processor):
    for source in sources.values():
        found = parts(spec_of(source, report_tokens=5 * 17 + 16), processor, COLOUR)
        assert [len(each) for each in vars(found).values()] == [3, 4, 5]
        assert found.search.shape == (4, 3, 16, 16)
        assert found.search.dtype == torch.float32


def test_all_kinds_of_sources_hold_the_same_images(sources, processor, tiny_vision):
    own = processor(images=[image for image, _ in tiny_vision.pictures(20, seed=0)], return_tensors="pt")
    own = {tuple(each.flatten().tolist()) for each in own["pixel_values"]}
    for source in sources.values():
        found = parts(spec_of(source, 4, 6, 10), processor, COLOUR)
        assert {tuple(each.flatten().tolist()) for part in vars(found).values() for each in part} == own


def test_no_image_is_in_two_parts_though_the_source_has_it_twice(tmp_path, processor):
    for index in range(20):
        picture(seed=index % 10).save(tmp_path / f"{index}.png")
    spec = spec_of(tmp_path, 2, 3, 4)
    found = [*vars(parts(spec, processor, COLOUR)).values(), recovery_images(spec, processor, COLOUR)]
    assert [len(each) for each in found] == [2, 3, 4, 1]
    assert len({tuple(each.flatten().tolist()) for part in found for each in part}) == 10
    assert (
        "has 10 images that differ, and 11 are needed (calibration 3, search 4, report 4; an image is 17 tokens)"
        in (refused(spec_of(tmp_path, 3, 4, 4)))
    )


def test_a_part_does_not_depend_on_what_later_ones_ask_for(sources, processor):
    few, many = (parts(spec_of(sources["saved"], report=n), processor, COLOUR) for n in (1, 9))
    assert torch.equal(few.calibration, many.calibration)
    assert torch.equal(few.search, many.search)
    assert torch.equal(few.report, many.report[:1])


def test_the_seed_draws_them(sources, processor):
    one, same, other = (parts(spec_of(sources["saved"], seed=seed), processor, COLOUR) for seed in (0, 0, 1))
    assert torch.equal(one.search, same.search)
    assert not torch.equal(one.search, other.search)


def test_what_is_left_is_bounded(sources, processor, monkeypatch):
    spec = spec_of(sources["saved"])
    assert len(recovery_images(spec, processor, COLOUR)) == 8
    monkeypatch.setattr(images, "RECOVERY_IMAGES", 3)
    assert len(recovery_images(spec, processor, COLOUR)) == 3
    assert recovery_images(spec_of(sources["saved"], report=13), processor, COLOUR).shape == (0, 3, 16, 16)


# -- pixels ---------------------------------------------------------------------------------------


def rgb(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(decoded(content, 3))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PNG", "WEBP"])
def test_lossless_formats_give_the_pixels_back(kind):
    image = picture().quantize(8).convert("RGB") if kind == "GIF" else picture()
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(rgb(encoded(image, kind, **options)), np.asarray(image))


def test_grey_is_repeated_and_transparency_dropped():
    grey, clear = picture().convert("L"), picture("RGBA")
    assert np.array_equal(rgb(encoded(grey)), np.repeat(np.asarray(grey)[:, :, None], 3, 2))
    assert np.array_equal(rgb(encoded(clear)), np.asarray(clear)[:, :, :3])
    assert rgb(encoded(grey.convert("1"))).shape == rgb(encoded(picture().convert("CMYK"), "JPEG")).shape == (16, 16, 3)


def test_a_palette_with_transparency_has_its_colours():
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    content = encoded(image, transparency=bytes([0, 255]))
    assert rgb(content).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_an_image_is_turned_as_its_camera_says():
    image, told = picture(size=(16, 8)), PIL.Image.Exif()
    told[0x0112] = 6  # turn by a quarter to the right
    assert np.array_equal(rgb(encoded(image, exif=told)), np.rot90(np.asarray(image), -1))


def test_a_model_of_one_channel_reads_grey_alone(tiny_vision):
    grey = picture().convert("L")
    found = pixels(tiny_vision.processor(channels=1), encoded(grey), GREY)
    torch.testing.assert_close(found[0], torch.from_numpy(np.asarray(grey) / 127.5 - 1).float())
    for mode in ("RGB", "RGBA", "P", "LA"):
        with pytest.raises(ValueError, match=f"its pixels are {mode}, and the model reads grey"):
            decoded(encoded(picture("RGBA").convert(mode)), 1)


def test_other_sizes_are_resized(processor):
    for size in ((1, 1), (16, 16), (300, 40)):
        assert pixels(processor, encoded(picture(size=size)), COLOUR).shape == (3, 16, 16)


def test_what_the_processor_makes_must_be_what_the_model_reads(tiny_vision):
    with pytest.raises(ValueError, match="makes 3×32×32 of it, and the model reads 3×16×16"):
        pixels(tiny_vision.processor(side=32), encoded(picture()), COLOUR)
    with pytest.raises(ValueError, match="the model's image processor cannot read it"):
        pixels(tiny_vision.processor(channels=2), encoded(picture()), COLOUR)


# -- what is refused ------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of one colour that says it has so many pixels, and has the first of its rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * min(width, 1 << 16)) * 4)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8000, 8000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (50_000_001, 1)])
def test_an_image_that_says_it_is_huge_is_not_decoded(size):
    with pytest.raises(ValueError, match=r"pixels; at most 50000000 are decoded|damaged"):
        decoded(bomb(*size), 3)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pixels_that_would_have_to_be_rounded(mode):
    content = encoded(PIL.Image.new("I;16" if mode == "I" else mode, (4, 4)), "TIFF" if mode == "F" else "PNG")
    said = "of a known format" if mode == "F" else "its pixels are I;16, and the model reads RGB"
    with pytest.raises(ValueError, match=said):
        decoded(content, 3)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"GIF89a", b"%!PS-Adobe-3.0 EPSF\n%%BoundingBox: 0 0 9 9\n", b"x"]
)
def test_what_is_no_image(content):
    with pytest.raises(ValueError, match="damaged, or no image of a known format"):
        decoded(content, 3)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP"]),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
    st.integers(0, 2000),
)
def test_a_damaged_image_is_decoded_or_refused_in_one_line(kind, changes, kept):
    content = bytearray(encoded(picture(seed=3), kind))[: max(1, kept)]
    for place, value in changes:
        content[place % len(content)] = value
    told = ""
    try:
        found = decoded(bytes(content), 3)
        told, size = found.mode, found.width * found.height
    except ValueError as problem:
        told, size = str(problem), 0
    assert "\n" not in told
    assert size == 0 or (told == "RGB" and size <= images.MAX_PIXELS)


def test_an_image_that_is_cut_off_is_refused_by_its_name(tmp_path):
    for index in range(12):
        picture(seed=index).save(tmp_path / f"image {index}.png")
    whole = (tmp_path / "image 7.png").read_bytes()
    (tmp_path / "image 7.png").write_bytes(whole[: len(whole) // 2])
    assert "(image 7.png): it cannot be decoded: " in refused(spec_of(tmp_path))
    (tmp_path / "image 7.png").write_bytes(b"")
    assert "(image 7.png): it is damaged, or no image of a known format" in refused(spec_of(tmp_path))
    (tmp_path / "image 7.png").write_bytes(bomb(30_000, 3_000))
    assert "(image 7.png): it has 30000×3000 pixels; at most 50000000 are decoded" in refused(spec_of(tmp_path))


def test_sources_that_are_none(tmp_path, sources, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("words")
    for source, said in (
        ("python-docs", "is no dataset, and the model reads images; give a folder of images or of data files"),
        (tmp_path / "text.txt", "is no dataset"),
        (tmp_path / "empty", "cannot be loaded as a dataset"),
        (tmp_path / "away", "is no dataset's name"),
        ("imagefolder", "is no dataset's name"),
    ):
        assert said in refused(spec_of(source)), source
    assert "has no column 'picture'; choose from image, label" in refused(spec_of(sources["files"], column="picture"))
    assert "split 'test' is not in" in refused(spec_of(sources["files"], split="test"))
    assert "column 'label' holds no image (got int)" in refused(spec_of(sources["files"], column="label"))


def test_fewer_tokens_than_an_image_has(sources):
    told = refused(spec_of(sources["files"], search_tokens=16))
    assert told == "data.search_tokens is 16, and an image is 17 tokens; the least is that"


def test_more_pixels_than_memory_should_hold(sources):
    wide = Images(3, 1024, 1024, 17)
    assert "are more than 4 GiB of pixels; ask for at most 341" in refused(spec_of(sources["files"], report=400), wide)


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    for index in range(12):
        picture(seed=index).save(tmp_path / f"{index}.png")
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 700)
    assert "takes more than 700 bytes" in refused(spec_of(tmp_path))


def test_rows_without_an_image(tmp_path):
    content = [None if index == 5 else encoded(picture(seed=index)) for index in range(12)]
    datasets.Dataset.from_dict({"image": content}).to_parquet(tmp_path / "train.parquet")
    assert "row 5: column 'image' holds no image (got NoneType)" in refused(spec_of(tmp_path))


def test_without_pillow(monkeypatch):
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs Pillow: pip install 'autoq\[images\]'"):
        decoded(encoded(picture()), 3)


def test_luck_is_the_callers(tiny_vision):
    """The control of all the above: two seeds draw other pictures, one the same."""
    one, same, other = (tiny_vision.picture(3, random.Random(seed)).tobytes() for seed in (0, 0, 1))
    assert one == same != other
