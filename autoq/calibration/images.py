"""Images, one sequence each, and their disjoint parts: calibration, search, report, and what is left for recovery.

An image counts as the tokens that the model makes of it (its patches, and what stands beside them), so
`data.search_tokens` are worth so many whole images. A permutation drawn from `data.seed` shuffles the rows of the
source; the first images are for calibration, the next for the search, the next for the report, and all others, up to
`RECOVERY_IMAGES`, are free to train on. Images that are equal byte by byte count once, so none is in two parts, and a
part never depends on how many a later one asks for.

A source is a dataset with a column of images: a folder of image files, of Parquet or other data files, a saved
dataset, or one on the hub. `datasets` never decodes them: a cell gives bytes, or names a file, which must lie in the
source's own folder. Bytes are decoded here, by Pillow's decoders of `FORMATS` alone (none runs another program), after
the image's own header has said that it has at most `MAX_PIXELS`: a file of kilobytes may hold gigabytes of one colour.

Whatever has colours becomes RGB for a model of three channels, as torchvision's and datasets' loaders do it: grey is
repeated, transparency is dropped. It is turned as its camera says. For a model of one channel an image must be grey.
Then the checkpoint's own image processor resizes and normalizes it, one image at a time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from autoq.calibration.text import PYTHON_DOCS, Parts, open_dataset
from autoq.errors import DataRefused
from autoq.layer import Images
from autoq.models.quiet import quiet
from autoq.spec import DataSpec, TaskSpec
from autoq.user_path import user_path

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 1 << 26
MAX_PIXEL_BYTES = 1 << 32  # of float32, all images of a study together
RECOVERY_IMAGES = 1024
INSTEAD = "give a folder of images or of data files"

_GREY = ("1", "L")
_COLOURS = (*_GREY, "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class Encoded:
    """One image as it is stored, where it stands in its source, and the row's other columns."""

    place: str
    content: bytes
    others: Mapping[str, Any]


class Rows:
    """The rows of a source in an order drawn from `seed`, images that are equal once; `others` are further columns.

    `field` is the spec's place in the study, for what `DataRefused` says.
    """

    def __init__(self, spec: DataSpec | TaskSpec, field: str, column: str, seed: int, others: Sequence[str] = ()):
        self.spec, self.field, self.column, self.others = spec, field, column, others
        path = user_path(spec.source)
        if spec.source == PYTHON_DOCS or path.is_file():
            raise DataRefused(f"{field}.source: {spec.source!r} is no dataset, and the model reads images; {INSTEAD}")
        self._root = path.resolve() if path.is_dir() else None
        rows = open_dataset(spec, path, field, INSTEAD, others, [column])
        for name in (column, *others):
            if name not in rows.column_names:
                columns = ", ".join(sorted(rows.column_names)) or "(none)"
                raise DataRefused(f"{field}: {spec.source!r} has no column {name!r}; choose from {columns}")
        self.rows = rows.select_columns([column, *others])
        self._order = np.random.default_rng(seed).permutation(len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Encoded]:
        """Raises `DataRefused` for a row without an image."""
        seen: set[bytes] = set()
        for number in self._order.tolist():
            row = self.rows[number]
            place, content = f"row {number}", b""
            try:
                content, name = self._content(row[self.column])
            except ValueError as problem:
                raise DataRefused(f"{self.field}: {self.spec.source!r}, {place}: {problem}") from None
            key = hashlib.sha256(content).digest()
            if key not in seen:
                seen.add(key)
                yield Encoded(f"{place} ({name})" if name else place, content, {n: row[n] for n in self.others})

    def _content(self, cell: Any) -> tuple[bytes, str]:
        """The bytes of a cell, and the name of the file that it names or came from."""
        stored, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
        name = Path(path).name[:80] if isinstance(path, str) else ""
        if stored is None and isinstance(path, str):
            return self._file(path), name
        if not isinstance(stored, bytes):
            raise ValueError(f"column {self.column!r} holds no image (got {type(cell).__name__})")
        if len(stored) > MAX_FILE_BYTES:
            raise ValueError(f"the image takes {len(stored)} bytes; at most {MAX_FILE_BYTES} are read")
        return stored, name

    def _file(self, path: str) -> bytes:
        try:
            file = Path(path.replace("\0", "")).resolve()
            if self._root is None or "\0" in path or not file.is_relative_to(self._root):
                raise ValueError(f"the image is a file outside of the dataset ({path[:200]!r}), which is never read")
            with file.open("rb") as opened:
                content = opened.read(MAX_FILE_BYTES + 1)
        except (OSError, RuntimeError) as problem:
            raise ValueError(f"the image {path[:200]!r} cannot be read: {problem}") from None
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"the image {path[:200]!r} takes more than {MAX_FILE_BYTES} bytes")
        return content


def decoded(content: bytes, channels: int) -> Image:
    """The image in the mode that a model of so many `channels` reads. Raises `ValueError` with one clause."""
    if importlib.util.find_spec("PIL") is None:
        raise ValueError("decoding it needs Pillow: pip install 'autoq[images]'")
    import PIL.Image
    import PIL.ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that is damaged
        try:
            image = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
        except PIL.Image.DecompressionBombError:
            raise ValueError(f"it has far too many pixels; at most {MAX_PIXELS} are decoded") from None
        except Exception:  # decoders raise what they like
            raise ValueError(f"it is damaged, or no image of a known format ({', '.join(FORMATS)})") from None
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"it has {width}×{height} pixels; at most {MAX_PIXELS} are decoded")
        if image.mode not in (_GREY if channels == 1 else _COLOURS):
            raise ValueError(f"its pixels are {image.mode}, and the model reads {'grey' if channels == 1 else 'RGB'}")
        try:
            image.load()
            turned = PIL.ImageOps.exif_transpose(image)
            if turned.mode in ("P", "PA"):
                turned = turned.convert("RGBA")  # palettes may hold transparency
            return turned.convert("L" if channels == 1 else "RGB")
        except Exception as problem:
            raise ValueError(f"it cannot be decoded: {_line(problem)}") from None


def pixels(processor: Any, content: bytes, wanted: Images) -> Tensor:
    """Pixel values (channels, height, width) float32 of an encoded image. Raises `ValueError` with one clause."""
    image = decoded(content, wanted.channels)
    try:
        with quiet():
            found: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
    except Exception as problem:
        raise ValueError(f"the model's image processor cannot read it: {_line(problem)}") from None
    shape = (wanted.channels, wanted.height, wanted.width)
    if found.shape != (1, *shape):
        raise ValueError(
            f"the model's image processor makes {_shape(found.shape[1:])} of it, and the model reads {_shape(shape)}"
        )
    return found[0].float()


def fits(count: int, wanted: Images, field: str) -> None:
    """Raise `DataRefused` where so many images are more than memory should hold."""
    size = 4 * wanted.channels * wanted.height * wanted.width
    if count * size > MAX_PIXEL_BYTES:
        raise DataRefused(
            f"{field}: {count} images of {_shape((wanted.channels, wanted.height, wanted.width))} are more than "
            f"{MAX_PIXEL_BYTES >> 30} GiB of pixels; ask for at most {MAX_PIXEL_BYTES // size}"
        )


def stacked(processor: Any, encoded: Sequence[Encoded], wanted: Images, where: str) -> Tensor:
    """Pixel values (n, channels, height, width) of images, which may be none. Raises `DataRefused` with one line."""
    found = torch.empty(len(encoded), wanted.channels, wanted.height, wanted.width)
    for index, each in enumerate(encoded):
        try:
            found[index] = pixels(processor, each.content, wanted)
        except ValueError as problem:
            raise DataRefused(f"{where}, {each.place}: {problem}") from None
    return found


def check(spec: DataSpec, wanted: Images) -> None:
    """Read and decode the images of all parts, which takes no processor. Raises `DataRefused` with one line."""
    for drawn in _drawn(spec, wanted)[0].values():
        for each in drawn:
            try:
                decoded(each.content, wanted.channels)
            except ValueError as problem:
                raise DataRefused(f"data: {spec.source!r}, {each.place}: {problem}") from None


def parts(spec: DataSpec, processor: Any, wanted: Images) -> Parts:
    """The three parts, each float32 (images, channels, height, width). Raises `DataRefused` with one line."""
    drawn, _ = _drawn(spec, wanted)
    where = f"data: {spec.source!r}"
    return Parts(**{name: stacked(processor, own, wanted, where) for name, own in drawn.items()})


def recovery_images(spec: DataSpec, processor: Any, wanted: Images) -> Tensor:
    """Images (n, channels, height, width) that are in no part, at most `RECOVERY_IMAGES`; may be none. Raises so."""
    _, left = _drawn(spec, wanted)
    rest = [each for _, each in zip(range(RECOVERY_IMAGES), left, strict=False)]
    return stacked(processor, rest, wanted, f"data: {spec.source!r}")


def _drawn(spec: DataSpec, wanted: Images) -> tuple[dict[str, list[Encoded]], Iterator[Encoded]]:
    """The images of each part, and what is left."""
    counts = {}
    for name in ("calibration", "search", "report"):
        count = getattr(spec, f"{name}_tokens")
        counts[name] = count // wanted.tokens
        if counts[name] < 1:
            raise DataRefused(
                f"data.{name}_tokens is {count}, and an image is {wanted.tokens} tokens; the least is that"
            )
    fits(sum(counts.values()), wanted, "data")
    rows = Rows(spec, "data", spec.column, spec.seed)
    left = iter(rows)
    found = {name: [each for _, each in zip(range(count), left, strict=False)] for name, count in counts.items()}
    if (available := sum(map(len, found.values()))) < sum(counts.values()):
        needed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataRefused(
            f"data source {spec.source!r} has {available} images that differ, and {sum(counts.values())} are needed "
            f"({needed}; an image is {wanted.tokens} tokens): ask for fewer tokens, or give more images"
        )
    return found, left


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _line(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
