"""What a run is made of, opened anew or brought back from a checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from khanhllm.data.batches import Batch, batches
from khanhllm.data.belt import Belt
from khanhllm.data.belt_notes import RECIPE
from khanhllm.data.ensure import check_rows_fit, ensure
from khanhllm.data.shards import MANIFEST, Shards
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.files import there
from khanhllm.log.run_log import lacks_validation
from khanhllm.machine.devices import Machine
from khanhllm.machine.signals import Stop
from khanhllm.schema import Config
from khanhllm.settings import read_toml, resolve
from khanhllm.training import checkpoint
from khanhllm.training.guard import Guard
from khanhllm.training.step import Learner, State

A_SECOND = 20_000
"""tokens trained on in one, before it is known: decides how long a text the tokenizer learns from"""


@dataclass(frozen=True)
class Parts:
    """What a run is made of, once everything is open."""

    run: Path
    learner: Learner
    tokenizer: Tokenizer
    train: Shards | Belt
    validation: Shards

    @property
    def config(self) -> Config:
        return self.learner.config


def rows_of(parts: Parts, state: State, stop: Stop) -> Iterator[Batch]:
    train = parts.config.train
    return batches(parts.train, train.rows, train.seed, state.cursor, parts.learner.machine.device, lambda: stop.asked)


def assemble(config: Config, folder: Path, saved: dict[str, Any], machine: Machine) -> Parts:
    """Open everything that the run needs. A resumed run takes the shards it has, wherever it is called from."""
    data = Path(saved.get("folder", ""))
    own = {"source": str(data), "tokenizer": ""} if saved and there(data / MANIFEST) else {}
    check_rows_fit(own.get("source", config.data.source), config.data.shard_tokens, config.model.context)
    needed = config.train.seconds * A_SECOND or config.train.steps * config.tokens_per_step
    data = ensure(config.data.model_copy(update=own), config.model.vocab_size, round(needed))
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    train: Shards | Belt = (
        Belt(data, config.model.context, config.data.ahead, config.data.disk, config.data.patience)
        if (data / RECIPE).exists()
        else Shards.open(data, "train", config.model.context)
    )
    validation = Shards.open(data, "validation", config.model.context)
    return Parts(folder, Learner.new(config, machine), tokenizer, train, validation)


def check_same(config: Config, folder: Path) -> None:
    """What a resumed run cannot change, refused before its checkpoints are read."""
    kept = resolve(read_toml(folder / "config.toml"), where=str(folder / "config.toml"))
    fixed = [("model", config.model, kept.model), ("data", config.data, kept.data)]
    changed = [f"{name}.{key}" for name, new, old in fixed for key, value in new if value != getattr(old, key)]
    changed = [key for key in changed if key not in ("data.workers", "data.cache", "data.tokens")]
    changed += ["train.seed"] if config.train.seed != kept.train.seed else []
    if changed:
        raise UserError(f"{folder} was trained with another {changed[0]}; change it in a new run (--run)")


def check_longer(config: Config, folder: Path, saved: dict[str, Any]) -> None:
    """A resumed run must have something left to do."""
    train, step = config.train, saved["step"]
    done = train.steps <= step and not (train.steps == step and lacks_validation(folder, config, step))
    if not train.seconds and done:
        raise UserError(f"{folder} has {step:,} steps already; to continue, give a larger --steps (or --tokens)")
    if 0 < train.seconds <= saved["seconds"]:
        raise UserError(f"{folder} has used {saved['seconds']:.0f} s already; to continue, give a longer --for")


def restore(parts: Parts, path: Path) -> State:
    """Bring weights, moments and state back from a checkpoint."""
    saved, learner = checkpoint.read_state(path), parts.learner
    if saved["data"] != parts.train.sha256:
        raise UserError(f"{path} was trained on other shards than those in {parts.train.folder}; see data.* keys")
    checkpoint.load_model(path, learner.model)
    checkpoint.load_optimizer(path, learner.model, learner.optimizer, saved["optimizer"])
    start = learner.start()
    load_LE = torch.tensor([share for layer in saved["load"] for share in layer], device=learner.machine.device)
    if len(load_LE) != start.load_LE.numel():
        raise UserError(f"{path / 'state.json'} has the load of other experts than this model's")
    budget_s = learner.config.train.seconds
    share = saved["seconds"] / budget_s if budget_s else None
    return State(saved["step"], saved["cursor"], load_LE.view_as(start.load_LE), Guard(**saved["guard"]), share)
