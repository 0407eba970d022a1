"""Small vision transformers that have learned something, and pictures for them, drawn on the spot.

Digits of Pillow's own font, in a random place and pair of colours, with noise: a picture is of one of ten classes.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
import transformers

SIDE, PATCH, TOKENS = 16, 4, 17
CLASSES = tuple(f"digit {number}" for number in range(10))
STEPS, BATCH, RATE = 150, 32, 3e-3

_CONFIG = {
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.05,
    # Not in the order of a folder's names: whoever takes a folder's number for the model's is wrong.
    "id2label": dict(enumerate(reversed(CLASSES))),
    "label2id": {name: number for number, name in enumerate(reversed(CLASSES))},
}
# family -> config class, model class, tokens of an image
FAMILIES = {
    "vit": ("ViTConfig", "ViTForImageClassification", TOKENS),
    "deit": ("DeiTConfig", "DeiTForImageClassification", TOKENS + 1),
}


@functools.cache
def _font() -> Any:
    return PIL.ImageFont.load_default(SIDE)


def picture(digit: int, luck: random.Random) -> PIL.Image.Image:
    """A picture of a digit."""
    ground, ink = (tuple(luck.randrange(*span) for _ in range(3)) for span in ((0, 90), (150, 256)))
    image = PIL.Image.new("RGB", (SIDE, SIDE), ground)
    place = luck.randrange(2, 6), luck.randrange(-3, -1)
    PIL.ImageDraw.Draw(image).text(place, str(digit), ink, _font())
    noise = np.random.default_rng(luck.randrange(2**32)).normal(0, 12, (SIDE, SIDE, 3))
    return PIL.Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def pictures(count: int, seed: int) -> Iterator[tuple[PIL.Image.Image, str]]:
    """Pictures and their classes, all classes equally often."""
    luck = random.Random(seed)
    for index in range(count):
        yield picture(index % 10, luck), CLASSES[index % 10]


def folder_of_images(folder: Path, count: int, seed: int) -> Path:
    """Pictures as files in a folder of their class's name, as `datasets` reads them."""
    for index, (image, name) in enumerate(pictures(count, seed)):
        (folder / "train" / name).mkdir(parents=True, exist_ok=True)
        image.save(folder / "train" / name / f"{index:04}.png")
    return folder


def processor(channels: int = 3, side: int = SIDE) -> Any:
    """An image processor for such models."""
    middle = [0.5] * channels
    return transformers.ViTImageProcessorPil(
        size={"height": side, "width": side}, image_mean=middle, image_std=middle, do_convert_rgb=False
    )


def save(family: str, folder: Path, steps: int = STEPS, **changes: Any) -> Path:
    """Train a model of `family` in float32 and write it as a bfloat16 checkpoint to `folder`; gives it back."""
    config_class, model_class, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**_CONFIG, **changes})
    model = getattr(transformers, model_class)(config).train()
    prepare = processor(config.num_channels, config.image_size)
    if steps:
        drawn = list(pictures(640, seed=1))
        pixels = prepare(images=[image for image, _ in drawn], return_tensors="pt")["pixel_values"]
        labels = torch.tensor([config.label2id[name] for _, name in drawn])
        order = torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(steps):
            chosen = torch.randint(len(drawn), (BATCH,), generator=order)
            loss = model(pixel_values=pixels[chosen], labels=labels[chosen]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        torch.set_num_threads(threads)
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    prepare.save_pretrained(folder)
    return folder
