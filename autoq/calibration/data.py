"""The data of a study as its model reads them: windows of text, or images."""

from __future__ import annotations

from torch import Tensor

from autoq.calibration import images, text
from autoq.calibration.text import Parts
from autoq.layer import ModelInfo
from autoq.models.loaded import LoadedModel
from autoq.spec import DataSpec


def check(spec: DataSpec, info: ModelInfo) -> None:
    """Read the source as far as that takes no tokenizer. Raises `DataRefused` with one line."""
    if info.images is None:
        text.load_text(spec)
    else:
        images.check(spec, info.images)


def parts(spec: DataSpec, model: LoadedModel) -> Parts:
    """The parts of the spec's data for a model. Raises `DataRefused` with one line."""
    if model.info.images is None:
        return text.windows(spec, model.tokenizer, model.info.max_positions)
    return images.parts(spec, model.tokenizer, model.info.images)


def recovery_windows(spec: DataSpec, model: LoadedModel) -> Tensor:
    """What is in no part: windows (n, window), or images (n, channels, height, width). May be none. Raises likewise."""
    if model.info.images is None:
        return text.recovery_windows(spec, model.tokenizer, model.info.max_positions)
    return images.recovery_images(spec, model.tokenizer, model.info.images)
