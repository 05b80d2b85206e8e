"""A run goes on with other text, as a run of its own: conversations (`khanhllm tune`) or more of anything else
(`khanhllm train --from`).

Like upcycling, this writes a run at step 0 that holds the weights, with fresh moments and a config of its own; the one
training loop does the rest.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from khanhllm.data.counting import Marks
from khanhllm.data.ensure import ensure
from khanhllm.data.shards import MANIFEST, Shards
from khanhllm.data.source_syntax import with_home
from khanhllm.errors import UserError
from khanhllm.files import check_writable, quoted, there
from khanhllm.machine.devices import open_machine
from khanhllm.machine.group import environment
from khanhllm.model import Transformer
from khanhllm.planning.budget import shared_out
from khanhllm.runs.run import Run, open_run
from khanhllm.schema import Config, MachineConfig
from khanhllm.settings import holds_run, refuse_to_overwrite, resolve
from khanhllm.training.parts import laid_for
from khanhllm.training.start import write_start

PEAKS = ("lr", "muon_lr", "embedding_lr", "head_lr", "router_lr", "expert_out_lr")
STEPS = 400
"""steps that a tuning should have at least: with little text its steps become small"""
LEAST = 512
"""tokens of a step of a tuning, at least"""
LEAST_REPLAY = 0.1
"""below it, a step with one replayed row would be long"""
MOST_EPOCHS = 1_000_000
PARTS = 4
"""how often a tuning is validated, saved, and asked held-out questions"""
VALIDATION = 0.05
"""share of the conversations that are held out"""


def tune(
    run: Path,
    out: Path,
    source: str,
    *,
    epochs: float = 3.0,
    replay: float = 0.3,
    rate: float = 0.2,
    settings: Mapping[str, Any] = {},
) -> Config:
    """Write `out`, a run at step 0 that is to learn the answers of the conversations in `source`; its config.

    epochs: how often it reads them. replay: share of the rows that come from the text of `run`. rate: peaks of the
    learning rates, as a share of those of `run`. settings: single keys of the config, which win; but a step gets as
    many rows, and micro-batches of a size, as the conversations and the replay allow.

    Raises UserError before anything is written.
    """
    _check_out(out)
    if holds_run(out):
        way = f"continue it (khanhllm train --resume --run {quoted(out)}), or name another folder (--out)"
        raise UserError(f"{out} already holds a run; {way}")
    if not (0 < epochs <= MOST_EPOCHS and 0 < rate < math.inf):
        most = f"--epochs and --rate must be above 0, --epochs at most {MOST_EPOCHS:,}"
        raise UserError(f"{most}, got {epochs:g} and {rate:g}")
    _check_replay(replay)
    base = open_run(run, MachineConfig(device="cpu"))  # only its weights are taken
    Marks.of(base.tokenizer)
    peaks = {key: getattr(base.config.optim, key) * rate for key in PEAKS}
    data = {"source": source, "tokenizer": str((run / "tokenizer.json").absolute()), "clean": "", "tokens": 0}
    own = {
        "data": data | {"validation": VALIDATION, "base": _base(base, replay), "replay": replay},
        "train": {"targets": "answers", "document_mask": True, "seconds": 0},
        "optim": peaks,
        "schedule": {"kind": "wsd", "warmup": 10, "decay": 1.0, "floor": 0.0, "tied_experts": 0},
    }
    config = resolve(base.config.model_dump(), own, settings, where="tune")
    _check_replay(config.data.replay)
    if config.data.tokenizer != data["tokenizer"]:
        raise UserError(f"the tokenizer is that of {run}; leave out --data.tokenizer")
    open_machine(config.machine)  # refuses a device that is not there before anything is written
    folder = _shards(config)
    shards = Shards.open(folder, "train", config.model.context)
    asked = config.train.rows_per_step if "accumulation" in settings.get("train", {}) else 0
    steps, size = _length(config, shards, epochs, asked)
    config = resolve(config.model_dump(), {"train": {"steps": steps}}, settings, size, where="tune")
    often = dict.fromkeys(("eval_every", "save_every", "sample_every"), math.ceil(config.train.steps / PARTS))
    config = resolve(config.model_dump(), {"train": often}, settings, size, where="tune")
    shared_out(config, *_hands(config))  # refuses a step of too few rows for all processes
    write_start(out, config, _copy(base, config), base.tokenizer, data="", folder=str(folder.absolute()))
    return config


def _check_replay(share: float) -> None:
    if share and not LEAST_REPLAY <= share <= 1 - LEAST_REPLAY:
        raise UserError(f"--replay must be 0, or from {LEAST_REPLAY} to {1 - LEAST_REPLAY}, got {share:g}")


def go_on(run: Path, out: Path, config: Config) -> Config:
    """Write `out`, a run at step 0 with the weights and the tokenizer of `run`, and return its config: this one, which
    also knows the text of `run`, so that the log shows what is forgotten.

    Raises UserError before anything is written.
    """
    _check_out(out)
    refuse_to_overwrite(out, resume=False)
    base = open_run(run, MachineConfig(device="cpu"))  # only its weights are taken
    model = _copy(base, config)
    open_machine(config.machine)
    earlier = config.data.base or _base(base, config.data.replay, "--data.replay")
    own = {"tokenizer": str((run / "tokenizer.json").absolute()), "base": earlier}
    config = resolve(config.model_dump(), {"data": own}, where="train")
    shared_out(config, *_hands(config))
    write_start(out, config, model, base.tokenizer, data="", folder=str(_shards(config).absolute()))
    return config


def _check_out(out: Path) -> None:
    """Raise UserError if `out` cannot be written, or if torchrun has started several processes: each would write its
    first checkpoint."""
    check_writable(out / "config.toml")
    if (size := environment("WORLD_SIZE", 1, default=1)) > 1:
        raise UserError(
            f"each of the {size} processes would write the first checkpoint of {out}; begin it in one process, or with "
            f"--machine.processes, and then torchrun ... khanhllm train --resume --run {quoted(out)}"
        )


def _base(base: Run, replay: float, option: str = "--replay") -> str:
    """The shards of a run, whose rows are replayed, and whose held-out text shows what is forgotten; "" if gone."""
    run, folder = base.checkpoint.parents[1], base.data.absolute()
    if base.state["folder"] and there(folder / MANIFEST):
        return str(folder)
    if replay and not base.state["folder"]:
        raise UserError(f"{run} has read no text yet, so none can be replayed; go on without ({option} 0)")
    if replay:
        raise UserError(
            f"the shards of {run}, {folder}, are gone, so none of its text can be replayed; "
            f"go on without ({option} 0), or train it on with --resume, which makes them again"
        )
    return ""


def _shards(config: Config) -> Path:
    if config.data.base:  # what is wrong with it is said before anything is written
        Shards.open(with_home(config.data.base), "validation", config.model.context)
    needed = config.train.steps * config.tokens_per_step
    return ensure(config.data, config.model.vocab_size, needed, laid_for(config))


def _length(config: Config, shards: Shards, epochs: float, asked: int) -> tuple[int, dict[str, dict[str, Any]]]:
    """How many steps read the conversations so often, and the keys of their size: `asked` rows, if that is not 0.

    Each step has the same number of replayed rows, at least one: text costs many times the nats of an answer, so in
    steps of one kind each, those of text would look to the guard like spikes.
    """
    context, replay, usual = config.model.context, config.data.replay, config.train.rows
    hands, evenly = _hands(config)
    least = max(-(-LEAST // context), round(1 / replay) if replay else 1, 2 if replay else 1, hands)
    a_step = max(least, min(config.train.rows_per_step, math.ceil(epochs * shards.rows) // STEPS))
    a_step -= a_step % usual if a_step - a_step % usual >= least else 0
    a_step += -a_step % hands if evenly else 0
    a_step = max(asked, 2 if replay else 1) if asked else a_step
    replayed = min(max(round(a_step * replay), 1), a_step - 1) if replay else 0
    steps = math.ceil(epochs * shards.rows / (a_step - replayed))
    auto = config.train.micro_batch == "auto"
    rows = 1 if auto else max(part for part in range(1, usual + 1) if a_step % part == 0)
    train = {"micro_batch": "auto" if auto else rows, "accumulation": a_step // rows}
    return steps, {"train": train, "data": {"replay": replayed / a_step}}


def _hands(config: Config) -> tuple[int, bool]:
    """Micro-batches that a step must have at least, as each process needs one, and whether all need equally many."""
    machine = config.machine
    if machine.processes < 2:
        return 1, False
    hands = sum(map(int, machine.shares.split(","))) if machine.shares else machine.processes
    return hands, machine.split == "all" or machine.expert_processes > 1


def _copy(base: Run, config: Config) -> Transformer:
    if config.model != base.config.model:
        raise UserError(f"the model is that of {base.checkpoint.parents[1]}; leave out --model options")
    model = Transformer(config.model)
    model.load_state_dict(base.model.state_dict())
    return model
