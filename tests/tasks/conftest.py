"""Tiny models that have learned a small task on the spot, and its examples as files."""

import json
import random

import pytest
import torch
import transformers

DATA = {"calibration_tokens": 128, "search_tokens": 128, "report_tokens": 128, "window_tokens": 16}
SCHEMES = ["rtn-int2-channel", "rtn-int3-channel", "rtn-int4-channel", "rtn-int8-channel"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session", name="write_rows")
def _write_rows():
    return write_rows


@pytest.fixture
def study_tree(tmp_path, monkeypatch):
    """Folder, file and fields -> a study's spec as plain data, on the text that lies beside the model."""
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))

    def build(folder, task, objectives, **more):
        tree = {
            "model": {"id": str(folder), "dtype": "float32"},
            "data": {**DATA, "source": str(folder / "text.txt")},
            "tasks": {"mine": {"source": str(folder / "examples.jsonl"), **task}},
            "target": {"name": "generic"},
            "space": {"schemes": SCHEMES},
            "objectives": list(objectives),
            "budget": {"trials": 16},
            "workers": {"cpus": 1},
        }
        return tree | more

    return build


@pytest.fixture(scope="session")
def classifier(tiny_models, tmp_path_factory):
    """A BERT that says which of a, b and c is the most frequent letter of a text."""
    folder, rng, tokenizer = tmp_path_factory.mktemp("classifier"), random.Random(0), tiny_models.tokenizer()

    def example():
        text = "".join(rng.choice("abcxyz") for _ in range(rng.choice((10, 12, 14))))
        counts = [text.count(letter) for letter in "abc"]
        return (text, counts.index(max(counts))) if counts.count(max(counts)) == 1 else example()

    def batch():
        length, rows = rng.choice((10, 12, 14)), []
        while len(rows) < 32:
            row = example()
            rows += [row] * (len(row[0]) == length)
        ids = tokenizer([text for text, _ in rows])["input_ids"]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor([label for _, label in rows])}

    torch.manual_seed(0)
    settings = {**tiny_models.FAMILIES["bert-classifier"][2], "id2label": dict(enumerate("abc")), "num_labels": 3}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**settings))
    tiny_models.train(model, (batch() for _ in range(80)), 3e-3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [example() for _ in range(600)]
    write_rows(folder / "examples.jsonl", [{"sentence": text, "label": "abc"[label]} for text, label in rows])
    (folder / "text.txt").write_text("\n".join(text for text, _ in rows))
    return folder


@pytest.fixture(scope="session")
def chooser(tiny_models, tmp_path_factory):
    """A Llama that knows a table: which letter belongs to two others."""
    folder, rng, tokenizer = tmp_path_factory.mktemp("chooser"), random.Random(0), tiny_models.tokenizer()
    letters = "abcdefghijkl"
    table = [(f"{x}{y}:", rng.choice(letters)) for x in letters for y in letters]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_models.FAMILIES["llama"][2]))
    ids = torch.tensor(tokenizer([prompt + letter for prompt, letter in table])["input_ids"])
    labels = torch.cat([torch.full_like(ids[:, :3], -100), ids[:, 3:]], 1)
    tiny_models.train(model, [{"input_ids": ids, "labels": labels}] * 80).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = []
    for prompt, letter in table:
        choices = [letter, *rng.sample([other for other in letters if other != letter], 3)]
        rng.shuffle(choices)
        rows.append({"prompt": prompt, "choices": choices, "answer": choices.index(letter)})
    write_rows(folder / "examples.jsonl", rows)
    (folder / "text.txt").write_text("\n".join(prompt + letter for prompt, letter in table * 3))
    return folder
