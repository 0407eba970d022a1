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


@pytest.fixture(scope="session")
def speller(tiny_models, tmp_path_factory):
    """A T5 that writes numbers of two digits as words."""
    folder, rng, tokenizer = tmp_path_factory.mktemp("speller"), random.Random(0), tiny_models.tokenizer()
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

    def batch():
        numbers = ["".join(rng.choice("0123456789") for _ in range(2)) for _ in range(32)]
        targets = [[*tokenizer(_spelled(words, number))["input_ids"], 2] for number in numbers]
        longest = max(map(len, targets))
        labels = [target + [-100] * (longest - len(target)) for target in targets]
        return {"input_ids": torch.tensor(tokenizer(numbers)["input_ids"]), "labels": torch.tensor(labels)}

    torch.manual_seed(0)
    settings = {**tiny_models.FAMILIES["t5-tied"][2], "eos_token_id": 2, "pad_token_id": 0, "dropout_rate": 0.0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**settings))
    tiny_models.train(model, (batch() for _ in range(120))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    numbers = [f"{number:02}" for number in range(100)]
    rng.shuffle(numbers)
    rows = [{"source": number, "target": _spelled(words, number)} for number in numbers]
    write_rows(folder / "examples.jsonl", rows)
    (folder / "text.txt").write_text("\n".join(_spelled(words, number) for number in numbers))
    return folder


def _spelled(words, number):
    # Four words: shorter texts have no BLEU.
    return " ".join(["it", "is", *(words[int(digit)] for digit in number)])


class _Pairs(torch.nn.Module):
    """An encoder whose loss is how hard it is to tell a text's partner from those of others (InfoNCE)."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, queries, documents):
        pooled = [self.encoder(input_ids=ids).last_hidden_state.mean(1) for ids in (queries, documents)]
        one, two = (torch.nn.functional.normalize(vectors, dim=-1) for vectors in pooled)
        loss = torch.nn.functional.cross_entropy(one @ two.t() / 0.1, torch.arange(len(one)))
        return transformers.modeling_outputs.ModelOutput(loss=loss)


@pytest.fixture(scope="session")
def searcher(tiny_models, tmp_path_factory):
    """A BERT that finds the word of which a query holds three letters, in capitals."""
    folder, rng, tokenizer = tmp_path_factory.mktemp("searcher"), random.Random(0), tiny_models.tokenizer()
    letters = "abcdefghijkl"

    def pair():
        word = "".join(rng.sample(letters, 5))
        return "".join(rng.sample(word.upper(), 3)), word

    def batch():
        pairs = [pair() for _ in range(32)]
        ids = [torch.tensor(tokenizer(list(texts))["input_ids"]) for texts in zip(*pairs, strict=True)]
        return {"queries": ids[0], "documents": ids[1]}

    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**tiny_models.FAMILIES["bert"][2]))
    tiny_models.train(_Pairs(model), (batch() for _ in range(80)), 3e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = []
    for _ in range(150):
        query, word = pair()
        others = [pair()[1] for _ in range(11)]
        place = rng.randrange(12)
        documents = [*others[:place], word, *others[place:]]
        # Letters in common are worth something too: the order of many documents counts.
        grades = [len({*query.lower()} & {*document}) for document in documents]
        rows.append({"query": query, "documents": documents, "relevance": grades})
    write_rows(folder / "examples.jsonl", rows)
    (folder / "text.txt").write_text("\n".join(pair()[1] for _ in range(300)))
    return folder
