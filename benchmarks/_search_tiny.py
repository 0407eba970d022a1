"""The part of `search.py` with thousands of trials: a language model so small that they take minutes.

A Llama of 12 blocks and 84 linears, with a byte-level BPE of 512 tokens, learns three quarters of the reference
prose that every CPython ships; the rest is calibrated, searched and reported on, in parts that share no token. The
model is kept in the cache. Sizes, choices and costs are those of `search.py`, with groups of 32 and windows of 256
tokens: predicted losses come from 8 windows (`frontier`'s from 4, by its own proxy), a trial takes one.

NSGA-II and TPE run as published, from random assignments, and seeded with exact solutions of the predicted losses.
What thousands of trials on one window find may suit that window alone, so one more arm of seeded NSGA-II measures
each trial on four windows, at four times the cost.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import _search_arms as arms
import tokenizers
import torch
import transformers
from _report import Timing, machine, measure, print_table
from _search_arms import Arm
from _search_yardstick import Meter, Yardstick
from search import BITS, Row, keep, kept, mean, spread

from autoq.cache import build_once
from autoq.spec import StudySpec, build_spec

SCHEMES = [f"rtn-int{bits}-g32" for bits in (2, 3, 4, 5, 6, 8)]
WINDOW = 256  # tokens
FEW, MIDDLE = 96, 480
SEEDS = 3  # of short arms; long ones run once
OWN = f"frontier-{FEW}"
WIDE = 4  # windows of a trial of the arm that is to suit more than one
POPULATION = 50  # Optuna's default
KEPT_TEXT = "kept.txt"
EVERY, FIRST = 5, 2  # every fifth topic from the third on is kept from training: a quarter of the text


@dataclass(frozen=True)
class Recipe:
    """All that the model depends on beside the text and the libraries. `batch` is in windows."""

    vocabulary: int = 512
    hidden: int = 64
    intermediate: int = 192
    blocks: int = 12
    heads: int = 4
    window: int = 128
    batch: int = 8
    steps: int = 1500
    warm_up: int = 50
    rate: float = 3e-3
    spread: float = 0.06  # of the first weights: at the usual 0.02 layers this narrow are slow to begin
    decay: float = 0.1
    seed: int = 0


def model_folder(recipe: Recipe) -> Path:
    """The trained model, its tokenizer and the text that it has not seen, from the cache or made now."""
    learnt, left = _texts()
    told = json.dumps([asdict(recipe), WINDOW, hashlib.sha256((learnt + "\0" + left).encode()).hexdigest()])

    def build(folder: Path) -> None:
        tokenizer = _tokenizer(learnt, recipe.vocabulary)
        seen, unseen = (torch.tensor(tokenizer(text)["input_ids"]) for text in (learnt, left))
        model = _trained(recipe, seen, unseen)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / KEPT_TEXT).write_text(left)

    return build_once(f"benchmarks/tiny-{hashlib.sha256(told.encode()).hexdigest()[:32]}", build)


def _texts() -> tuple[str, str]:
    """What the model learns and what is kept from it: topics of Python's reference, in turns."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    parts = ([n for i, n in enumerate(names) if (i % EVERY == FIRST) == left_out] for left_out in (False, True))
    learnt, left = ("\n\n".join(topics[name] for name in part) for part in parts)
    return learnt, left


def _tokenizer(text: str, size: int) -> Any:
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    core.train_from_iterator([text], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def _trained(recipe: Recipe, tokens: torch.Tensor, unseen: torch.Tensor) -> Any:
    """A model that has learnt `tokens`; tells its loss on `unseen` ones, in nats per token."""
    torch.manual_seed(recipe.seed)
    config = transformers.LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=WINDOW,
        initializer_range=recipe.spread,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=recipe.decay, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_rate(recipe, step))
    start = time.perf_counter()
    for step, batch in enumerate(_batches(recipe, tokens)):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.2f}, {time.perf_counter() - start:.0f} s", flush=True)
    with torch.inference_mode():
        windows = unseen[: len(unseen) // recipe.window * recipe.window].view(-1, recipe.window)[:32]
        print(f"trained; loss on text kept from it {model(input_ids=windows, labels=windows).loss:.2f}", flush=True)
    return model


def _share_of_rate(recipe: Recipe, step: int) -> float:
    """A short rise, then half a cosine down to a twentieth."""
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def _batches(recipe: Recipe, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Windows from anywhere in the text."""
    offsets = torch.arange(recipe.window)
    for _ in range(recipe.steps):
        starts = torch.randint(len(tokens) - recipe.window, (recipe.batch, 1))
        yield tokens[starts + offsets]


def spec_of(folder: Path) -> StudySpec:
    return build_spec(
        {
            "model": {"id": str(folder), "dtype": "float32"},
            "data": {
                "source": str(folder / KEPT_TEXT),
                "calibration_tokens": 8 * WINDOW,
                "search_tokens": 16 * WINDOW,
                "report_tokens": 32 * WINDOW,
                "window_tokens": WINDOW,
            },
            "target": {"name": "generic"},
            "space": {"schemes": SCHEMES},
            "objectives": ["kl_nats_per_token", "size_bytes"],
            # Layers this small are slower on two threads than on one.
            "workers": {"cpus": 1},
        }
    )


def all_arms(options: argparse.Namespace) -> list[Arm]:
    """Short arms with every seed, then the long ones, the slowest last: a cut run has what is quick."""
    calibration, many = 8 * WINDOW, options.many
    long: dict[str, Any] = {"cost": many, "calibration": calibration, "seconds": 60 * options.minutes}
    nsga2 = Arm(f"nsga2-{many}-seeded", "nsga2", arms.measured, options={"population_size": POPULATION}, **long)
    tpe = Arm(f"tpe-{many}-seeded", "tpe", arms.measured, **long)
    scratch: dict[str, Any] = {"calibration": 0, "seeded": False}
    # As in the table of the large model: four windows of predicted losses, then slopes on one window at a time.
    own = Arm(OWN, "frontier", arms.modelled, FEW, calibration // 2, own=True, seeded=False)
    found = [
        Arm("uniform", "uniform", arms.uniform, calibration=0),
        Arm("gradient_ilp", "gradient_ilp", arms.predicted, calibration=calibration),
        replace(own, name="frontier-0", run=arms.predicted),
        own,
        *(Arm(f"{name}-{MIDDLE}", name, arms.measured, MIDDLE, calibration) for name in ("evolution", "predictor")),
        replace(nsga2, name=f"nsga2-{many}", **scratch),
        nsga2,
        replace(tpe, name=f"tpe-{many}", **scratch),
        tpe,
        replace(nsga2, name=f"nsga2-{many}-seeded-wide", windows=WIDE, cost=WIDE * many),
    ]
    return [arm for arm in found if any(fnmatch.fnmatch(arm.name, pattern) for pattern in options.arms.split(","))]


def is_long(arm: Arm) -> bool:
    return math.isfinite(arm.seconds)


def setting(recipe: Recipe, arm: Arm) -> str:
    """What a row depends on beside code and seed: a row of another setting is none of this run's."""
    what = [asdict(recipe), SCHEMES, WINDOW, arm.name, f"{arm.cost:g}", arm.calibration, arm.windows]
    return json.dumps([*what, arm.slopes, dict(arm.options)], sort_keys=True)


def run(arm: Arm, yard: Yardstick, seed: int, told: str) -> Row:
    """One arm: KL at each size, None where it found nothing that small, as it may from random assignments.

    `seconds` are CPU time, which on one thread is the time on a quiet machine.
    `seen` is the KL of the same assignments on the first window that it searched on.
    """
    start = time.process_time()
    meter = Meter(yard, seed)
    budgets = [yard.budget(bits) for bits in BITS]
    answers = arm.run(arm, meter, budgets)
    seconds, cost = time.process_time() - start, meter.cost
    fits = [yard.total(choices) <= budget for choices, budget in zip(answers, budgets, strict=True)]
    own = list(zip(answers, fits, strict=True))
    return {
        "arm": arm.name,
        "sampler": arm.sampler,
        "seed": seed,
        "setting": told,
        "cost": cost,
        "kl": [yard.held_out(choices) if fit else None for choices, fit in own],
        "seen": [meter.kl(choices, 1) if fit else None for choices, fit in own],
        "bits": [8 * yard.total(choices) / yard.weights for choices in answers],
        "choices": ["".join(map(str, choices)) for choices in answers],
        "seconds": round(seconds, 1),
        "stopped": seconds >= arm.seconds,
        "machine": machine(),
    }


def usable(row: Row, arm: Arm, told: str) -> bool:
    """Whether a row is this arm's; one that was stopped is not where there is more time now."""
    return bool(row.get("setting") == told and (not row["stopped"] or row["seconds"] >= arm.seconds))


def compare(options: argparse.Namespace) -> None:
    """Train or find the model, run every arm that has no row yet, and print the table."""
    recipe, seeds = Recipe(), options.seeds if options.seeds > 1 else SEEDS
    wanted = [(arm, setting(recipe, arm)) for arm in all_arms(options)]
    before = kept(options.out)
    rows, missing = [], []
    for arm, told in wanted:
        for seed in range(1 if is_long(arm) else seeds):
            own = [row for row in before if row.get("seed") == seed and usable(row, arm, told)]
            rows += own[-1:]
            missing += [] if own else [(arm, told, seed)]
    if missing:
        yard = Yardstick(spec_of(model_folder(recipe)))
        print(f"{len(yard.parameters)} variables, {yard.weights:,} weights, {machine()}")
        print(f"a trial of one window: {_trial(yard)}", flush=True)
    for arm, told, seed in missing:
        row = run(arm, yard, seed, told)
        keep(options.out, row)
        rows.append(row)
        kls = " ".join(_cells(row["kl"]))
        print(f"{arm.name}, seed {seed}: cost {row['cost']:g}, {row['seconds']} s of CPU, KL {kls}", flush=True)
    if rows:
        order = [arm.name for arm, _ in wanted]
        report(sorted(rows, key=lambda row: (order.index(row["arm"]), row["seed"])), options)


def _trial(yard: Yardstick) -> Timing:
    level = yard.levels()[2]
    return measure(lambda: yard.kl(level, "search", [0]), repeats=20, warm_up=3)


def _cells(values: Sequence[float | None]) -> list[str]:
    return ["-" if value is None else f"{value:.3g}" for value in values]


def _medians(rows: Sequence[Row], key: str) -> list[float | None]:
    """Over seeds, at each size; None where a seed found nothing."""
    columns = zip(*(row[key] for row in rows), strict=True)
    return [None if None in column else statistics.median(column) for column in columns]


def ratio(own: Sequence[float | None], other: Sequence[float | None]) -> float:
    """Geometric mean over those sizes at which both have an answer; NaN if there are none."""
    found = [a / b for a, b in zip(own, other, strict=True) if a is not None and b is not None]
    return mean(found) if found else math.nan


def report(rows: Sequence[Row], options: argparse.Namespace) -> None:
    by_arm: dict[str, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    frontier = by_arm.get(OWN, [])
    cells, verdicts = [], []
    for name, own in by_arm.items():
        ratios = [ratio(a["kl"], b["kl"]) for a in frontier for b in own]
        seen = [ratio(a["seen"], b["seen"]) for a in frontier for b in own if a["seed"] == b["seed"]]
        cost = f"{statistics.median(row['cost'] for row in own):.0f}"
        seconds = f"{statistics.median(row['seconds'] for row in own):.0f}"
        kls = _medians(own, "kl")
        figures = ["1" if name == OWN else spread(ratios), "1" if name == OWN else spread(seen)]
        cells.append([name, cost, seconds, len(own), *_cells(kls), *figures])
        if frontier and name != OWN:
            verdicts.append(_verdict(name, ratios, _medians(frontier, "kl"), kls))
    header = ["arm", "cost", "CPU seconds", "seeds", *(f"{bits:g} bits" for bits in BITS)]
    title = f"Held-out KL at six sizes, a Llama of 84 linears trained here, a pass is {WINDOW} tokens"
    print_table(title, [*header, f"{OWN} ÷ arm", "÷ on the window searched"], cells)
    print(f"\n{_about_arms(options)}")
    for row in rows:
        if row["stopped"]:
            minutes = row["seconds"] / 60
            print(f"- {row['arm']} was stopped after {minutes:.0f} minutes of CPU, at {row['cost']:,.0f} passes")
    print("\n".join(verdicts))


def _about_arms(options: argparse.Namespace) -> str:
    return (
        "KL in nats per token on held-out tokens, medians over seeds; -: nothing that small was found. Ratios:\n"
        "geometric mean over the sizes at which both have an answer, median over pairs of seeds (least to most).\n"
        "The last column is the same on the one window on which all long arms but -wide chose: what is less there\n"
        f"and not on held-out tokens was fitted to it. -wide: {options.many} trials of {WIDE} windows each; -seeded:\n"
        "with exact solutions of the predicted losses, else from random assignments. frontier-0: exact solutions of\n"
        "AutoQ's own predicted losses, nothing measured; gradient_ilp: of the usual ones."
    )


def _verdict(name: str, ratios: Sequence[float], own: Sequence[float | None], other: Sequence[float | None]) -> str:
    """Whether `frontier` is no worse than an arm, and the sizes at which it is."""
    pairs = [(bits, a / b) for bits, a, b in zip(BITS, own, other, strict=True) if a is not None and b is not None]
    worse = ", ".join(f"{bits:g} ({over:.3f})" for bits, over in pairs if over > 1.0)
    verdict = "reached" if statistics.median(ratios) <= 1.0 else "missed"
    where = f"; has more KL at {worse} bits" if worse else "; has less KL at every size that both have" if pairs else ""
    return f"- {OWN} ÷ {name}: {spread(ratios)}; wanted at most 1: {verdict}{where}"
