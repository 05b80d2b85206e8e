"""A tiny run, and tiny sets in the formats that the suite reads."""

import json

import torch

from conftest import build, save, tiny
from khanhllm.data.tokenizer import train_tokenizer
from khanhllm.runs.run import open_run
from khanhllm.schema import MachineConfig
from khanhllm.settings import write_config

TEXT = "The cat sat on the mat. Question: what has the man?\nAnswer: a red lamp.\nWhich dog saw the old key in a box?\n"


def a_run(folder, **model):
    """A run that nobody trained, whose likelihoods are far from equal."""
    tokenizer = train_tokenizer([TEXT * 5], 290)
    config = tiny(**{"context": 256, "pattern": "DMD", "vocab_size": tokenizer.vocab_size, **model})
    ours = build(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    folder.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer.json")
    write_config(config, folder)
    save(folder, 3, ours, torch.optim.SGD(ours.parameters()), {"cursor": 0, "folder": str(folder / "no"), "data": ""})
    return open_run(folder, MachineConfig(device="cpu", threads=1))


def write_sets(folder):
    """Every kind of file: twelve questions each."""
    nouns = ["cat", "dog", "man", "key", "lamp", "mat"]
    two = [(one, other) for one in nouns for other in nouns if one < other][:12]
    pairs = {"field": "syntax", "UID": "causative"}
    sets = {
        "blimp/causative": [
            {"sentence_good": f"The {a} saw the {b}.", "sentence_bad": f"The {a} saw {b} the.", **pairs} for a, b in two
        ],
        "blimp/passive_1": [
            {"sentence_good": f"The {b} sat.", "sentence_bad": f"Sat the {a}.", "field": "syntax/semantics"}
            for a, b in two
        ],
        "core/lambada_openai": [{"context": f"The {a} has a {b}. A ", "continuation": b} for a, b in two],
        "core/copa": [
            {"query": f"The {a} sat, ", "choices": [f"a {b} saw.", "on the red mat."], "gold": 1} for a, b in two
        ],
        "core/piqa": [
            {"query": f"Question: what has the {a}?", "choices": [b, f"the old {b}"], "gold": 0} for a, b in two
        ],
        "core/arc_easy": [
            {"query": f"Question: which {a}?", "choices": [b, "red lamp", "the box", "an old key"], "gold": n % 4}
            for n, (a, b) in enumerate(two)
        ],
        "core/winogrande": [
            {"context_options": [f"The {a} saw the {b} so the {a}", f"The {a} saw the {b} so the {b}"], "gold": n % 2}
            | {"continuation": "sat on the mat."}
            for n, (a, b) in enumerate(two)
        ],
    }
    for name, rows in sets.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
