"""What a model of images reads: the shape of its pixel values, and the image processor that makes them.

Nothing is assumed of an architecture but that its first input is named `pixel_values`, as transformers has it, and that
its config says how large an image is. Processors run on Pillow, whatever else is installed: torchvision's resampling
gives other pixels, and what is measured must not depend on that.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from autoq.errors import ModelRefused
from autoq.models.sources import PREPROCESSOR, check_config
from autoq.spec import ModelSpec

INPUT = "pixel_values"


def shape(spec: ModelSpec, model: nn.Module, folder: Path, config: Any) -> tuple[int, int, int] | None:
    """Channels, height and width of a model's images; None for one that reads token ids.

    Raises `ModelRefused` where the config does not say them, or nothing says how images are to be prepared.
    """
    if getattr(model, "main_input_name", None) != INPUT:
        return None
    own = getattr(config, "vision_config", config)  # of a model that could read text as well (CLIP, SigLIP)
    size, channels = getattr(own, "image_size", None), getattr(own, "num_channels", None)
    sides: Any = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    height, width = sides
    if not all(isinstance(each, int) and each > 0 for each in sides):
        raise ModelRefused(
            f"model {spec.id!r}: config.json must say image_size, the pixels of a side (got {size!r:.80})"
        )
    if channels not in (1, 3):
        raise ModelRefused(f"model {spec.id!r}: it reads num_channels {channels!r:.80}; images have 1 or 3")
    if not (folder / PREPROCESSOR).is_file():
        raise ModelRefused(f"model {spec.id!r} has no {PREPROCESSOR}, which says how images become its inputs")
    check_config(spec.id, folder / PREPROCESSOR)
    return channels, height, width


def read_processor(spec: ModelSpec, folder: Path) -> Any:
    """The image processor in a checked folder. Raises `ModelRefused`."""
    if importlib.util.find_spec("PIL") is None:
        raise ModelRefused(f"model {spec.id!r} reads images, which needs Pillow: pip install 'autoq[images]'")
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False, local_files_only=True
        )
    except Exception as problem:
        # transformers raises whatever it meets in the file.
        line = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise ModelRefused(f"model {spec.id!r}: {PREPROCESSOR} is not usable: {line}") from problem
