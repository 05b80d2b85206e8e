"""The code that travels with an exported model computes what ours does."""

import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import build, plain_machine, tiny
from safetensors.torch import save_file

from khanhllm.export.remote import FILES, config_json
from khanhllm.inference.generate import continuation
from khanhllm.schema import ModelConfig, Sampling

transformers = pytest.importorskip("transformers")

EVERYTHING = {
    "pattern": "MDMDM",
    "kv_heads": 2,
    "feedforward": "relu2",
    "value_embedding": True,
    "embedding_skip": True,
    "pair_embedding": 97,
    "router_bias": True,
}
SHAPES = {
    "classic": {"style": "classic", "pattern": "DMDM"},
    "classic, one expert each": {"style": "classic", "experts_per_token": 1, "kv_heads": 1},
    "all dense": {"pattern": "DD"},
    "one expert each": {"experts_per_token": 1},
    "rope and eps": {"rope_theta": 123.0, "norm_eps": 0.01},
    **{key: {key: value} for key, value in EVERYTHING.items()},
    "everything": EVERYTHING,
}


class Tokens:
    end_of_text = 0


def ours(shape, seed=0):
    """Our model with every parameter at random, so that each one matters, and logits of about 1."""
    model = build(tiny(context=96, **shape), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name.endswith(("bias_E", "bias", "_L")) or "norm" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
            elif "pair" in name or "tables" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
        ids = torch.randint(300, (4, 64), generator=generator)
        model.head.weight.div_(model.logits(ids).std())
    return model.eval()


def export(model, folder):
    folder.mkdir()
    for path in FILES:
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config_json(model.config, Tokens)))
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder, **options):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it(shape, tmp_path):
    model = ours(shape)
    theirs = load(export(model, tmp_path / "x"))
    ids = torch.randint(1, 300, (3, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = model.logits(ids), theirs(ids).logits
    print(a.std(), (a - b).abs().max())
    assert (a - b).abs().max() < 1e-4
