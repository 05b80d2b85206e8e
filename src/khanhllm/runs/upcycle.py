"""A dense run becomes a mixture: each expert begins as a copy of the dense layer in whose place it stands (sparse
upcycling, Komatsuzaki et al. 2023, arXiv 2212.05055).

A token's weights sum to 1 and all experts answer alike, so at first the mixture computes what the dense model did, to
the last rounding; then the experts see different tokens and part. With one expert per token, the weight is the router's
probability, which differs from token to token: no scale of the experts makes up for it, so that is refused.
"""

from pathlib import Path

import torch
from torch import Tensor

from khanhllm.errors import UserError
from khanhllm.files import check_new
from khanhllm.model import Transformer
from khanhllm.runs.run import open_run
from khanhllm.schema import Config, MachineConfig, ModelConfig
from khanhllm.settings import resolve
from khanhllm.training.start import write_start


def upcycle(run: Path, out: Path, pattern: str, experts: int, experts_per_token: int) -> Config:
    """Write `out`, a run at step 0 that holds the mixture, and return its config; `khanhllm train --resume` goes on.

    pattern: which layers become mixtures, "" for every other one. The rows that the dense run trained on are not read
    again. Raises UserError if the run is no dense one, or the mixture could not begin as the dense model.
    """
    check_new(out)
    dense = open_run(run, MachineConfig(device="cpu"))  # only its weights are taken
    if dense.config.model.moe_layers:
        raise UserError(f"{run} has mixture layers already; upcycling begins with a dense run (--twin trains one)")
    layers = len(dense.config.model.pattern)
    pattern = pattern or ("DM" * layers)[:layers]
    if len(pattern) != layers or set(pattern) - {"D", "M"} or "M" not in pattern:
        raise UserError(f"--pattern {pattern[:60]!r} must say D or M for each of the {layers} layers, with an M")
    if experts_per_token == 1 < experts:
        raise UserError(
            "--experts-per-token 1: the router's probability would weigh the only answer, so the mixture would not "
            "begin as the dense model; use 2 or more"
        )
    shape = {"pattern": pattern, "experts": experts, "experts_per_token": experts_per_token, "expert_hidden": 0}
    apart = {"tied_experts": 0}  # copies of one layer, which part from the first step on
    config = resolve(dense.config.model_dump(), {"model": shape, "schedule": apart}, where="upcycle")
    model = Transformer(config.model)
    model.initialise(torch.Generator().manual_seed(config.train.seed))  # what is left of it: the routers
    model.load_state_dict(_weights(dense.model.state_dict(), config.model), strict=False)
    read = {key: dense.state[key] for key in ("cursor", "data", "folder")}
    write_start(out, config, model, dense.tokenizer, **read)
    return config


def _weights(dense: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The mixture's weights but for its routers: a dense layer's matrix (out, in) stands as E copies of (in, out)."""
    found = {}
    for name, tensor in dense.items():
        head, inside, part = name.partition(".feedforward.")
        if inside and int(head.removeprefix("blocks.")) in config.moe_layers:
            matrix, kind = part.split(".")
            one = tensor.T if kind == "weight" else tensor
            name = f"{head}.feedforward.experts.{matrix}{'' if kind == 'weight' else '_bias'}"
            tensor = one.expand(config.experts, *one.shape).contiguous()
        found[name] = tensor
    return found
