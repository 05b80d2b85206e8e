"""What a run is made of, opened anew or brought back from a checkpoint."""

from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from khanhllm.data.batches import Batch, batches
from khanhllm.data.belt import Belt
from khanhllm.data.belt_notes import RECIPE
from khanhllm.data.cache import place_of
from khanhllm.data.counting import Reading, counted
from khanhllm.data.ensure import check_rows_fit, ensure
from khanhllm.data.replay import Replay
from khanhllm.data.shards import MANIFEST, Shards
from khanhllm.data.source_syntax import with_home
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.files import there
from khanhllm.log.run_log import lacks_validation, last_step, seconds_of
from khanhllm.machine.devices import Machine
from khanhllm.machine.probe import LinkSpeed
from khanhllm.machine.signals import Stop
from khanhllm.model import Transformer
from khanhllm.optim.schedule import warmup_of
from khanhllm.schema import Config, DataConfig
from khanhllm.settings import read_config
from khanhllm.training import checkpoint
from khanhllm.training.guard import Guard
from khanhllm.training.step import Learner, State, rate_factor

FREE = tuple(f"data.{key}" for key in ("source", "workers", "cache", "base", "patience", "disk", "ahead"))
"""what a resumed run may change; of a source, and of a base that is replayed, the shards are compared"""
FIXED = ("seed", "targets", "document_mask")
"""what it may not change of `train`"""
A_SECOND = 20_000
"""tokens trained on in one, before it is known: decides how long a text the tokenizer learns from"""
RISE = 0.01
"""share by which the last validation must exceed the best one, or a resumed run's rate its old one, to be spoken of"""


@dataclass(frozen=True)
class Parts:
    """What a run is made of, once everything is open."""

    run: Path
    learner: Learner
    tokenizer: Tokenizer
    train: Shards | Belt | Replay
    validation: Shards
    base: Shards | None = None
    """what the run that this one goes on from held out"""
    link: LinkSpeed | None = None
    """between the processes, if there are several"""

    @property
    def config(self) -> Config:
        return self.learner.config

    @property
    def reading(self) -> Reading | None:
        return Reading.of(self.config.train, self.tokenizer)


def rows_of(parts: Parts, state: State, stop: Stop, every: bool = False) -> Generator[Batch]:
    """What this process reads from here on; to be closed. every: also the rows of the others of its group."""
    train, machine = parts.config.train, parts.learner.machine
    turns = [True] if every else machine.group.turns(train.accumulation)
    place = (parts.train, train.rows, train.seed, state.cursor, machine.device)
    return batches(*place, lambda: stop.asked or machine.group.is_called_off(), parts.reading, turns)


def assemble(config: Config, folder: Path, saved: dict[str, Any], machine: Machine) -> Parts:
    """Open everything that the run needs. Its config then names the text by absolute paths, for a resume elsewhere."""
    context, share = config.model.context, config.data.replay
    if share and not config.data.base:
        raise UserError(f"data.replay = {share:g} needs data.base: the shards of the run whose text is to be replayed")
    data = Path(machine.group.told(lambda: str(_prepared(config, folder, saved))))
    config = config.model_copy(update={"data": _anchored(config.data)})
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    Reading.of(config.train, tokenizer)  # refuses one without what conversations need, before the model is made
    rank = machine.group.rank
    own, validation = _rows_in(data, config, rank), Shards.open(data, "validation", context)
    base = _of_base(config, tokenizer, resumed=bool(saved))
    train = Replay(own, _rows_in(base.folder, config, rank), share) if base and share else own
    return Parts(folder, Learner.new(config, machine), tokenizer, train, validation, base)


def laid_for(config: Config) -> int:
    """How long the rows are into which conversations are packed; 0 if the source holds none."""
    return config.model.context if config.train.targets == "answers" else 0


def _rows_in(folder: Path, config: Config, rank: int) -> Shards | Belt:
    data, context = config.data, config.model.context
    if (folder / RECIPE).exists():
        return Belt(folder, context, data.ahead, data.disk, data.patience, rank)
    return Shards.open(folder, "train", context)


def _of_base(config: Config, tokenizer: Tokenizer, resumed: bool) -> Shards | None:
    """What the run that this one goes on from held out. None if there is no such run, or if its shards are gone and the
    run is a resumed one that replays none of them."""
    folder, share = Path(config.data.base), config.data.replay
    if not config.data.base:
        return None
    if not there(folder / MANIFEST):
        if resumed and not share:
            return None
        why = "which this run replays" if share else "which this run measures"
        raise UserError(f"the shards in {folder}, {why}, are gone; name the place where they lie now (--data.base)")
    base = Shards.open(folder, "validation", config.model.context)
    if base.manifest.tokenizer != tokenizer.sha256:
        raise UserError(f"the shards in {folder} (data.base) were made with another tokenizer than this run's")
    return base


def _prepared(config: Config, folder: Path, saved: dict[str, Any]) -> Path:
    """The folder of the run's shards."""
    source = _source(config, folder, saved)
    check_rows_fit(source.source, source.shard_tokens, config.model.context)
    needed = config.train.seconds * A_SECOND or config.train.steps * config.tokens_per_step
    return ensure(source, config.model.vocab_size, round(needed), laid_for(config))


def _source(config: Config, folder: Path, saved: dict[str, Any]) -> DataConfig:
    """What gives the run its shards. A resumed run takes those it has, wherever it is called from. Text that lies
    elsewhere by now is read with the run's own tokenizer; `restore` compares what becomes of it."""
    data, had = config.data, saved.get("folder")
    moved = bool(saved) and _anchored(data).source != _anchored(read_config(folder).data).source
    if had and not moved and there((place := place_of(had, data.cache)) / MANIFEST):
        return data.model_copy(update={"source": str(place), "tokenizer": ""})
    if saved and (moved or data.tokenizer or not saved["data"]):
        return data.model_copy(update={"tokenizer": str(folder / "tokenizer.json")})
    return data


def _anchored(data: DataConfig) -> DataConfig:
    from khanhllm.data.sources import anchored

    named = (("tokenizer", data.tokenizer), ("base", data.base))
    files = {key: path and str(with_home(path).absolute()) for key, path in named}
    return data.model_copy(update={"source": anchored(data.source), **files})


def _has_read_nothing(folder: Path) -> bool:
    """Whether the run only has weights to begin with, which came from elsewhere: it may read any text."""
    newest = checkpoint.steps(folder)[0]
    with suppress(UserError, OSError):
        return checkpoint.step_of(newest) == 0 and not checkpoint.read_state(newest)["data"]
    return False


def check_same(config: Config, folder: Path) -> None:
    """What a resumed run cannot change, refused before its checkpoints are read."""
    kept = read_config(folder)
    fixed = [("model", config.model, kept.model), ("data", _anchored(config.data), _anchored(kept.data))]
    changed = [f"{name}.{key}" for name, new, old in fixed for key, value in new if value != getattr(old, key)]
    changed = [key for key in changed if key not in FREE]
    if bool(config.data.base) != bool(kept.data.base):
        changed.insert(0, "data.base")  # it may lie elsewhere, but its loss is a column of the log
    if _has_read_nothing(folder):
        changed = [key for key in changed if key == "data.tokenizer" or not key.startswith("data.")]
    changed += [f"train.{key}" for key in FIXED if getattr(config.train, key) != getattr(kept.train, key)]
    if changed:
        raise UserError(f"{folder} was trained with another {changed[0]}; change it in a new run (--run)")


def check_longer(config: Config, folder: Path, saved: dict[str, Any]) -> None:
    """A resumed run must have something left to do."""
    train, step = config.train, saved["step"]
    done = train.steps <= step and not (train.steps == step and lacks_validation(folder, config, step))
    if not train.seconds and done:
        raise UserError(f"{folder} has {step:,} steps already; to continue, give a larger --steps (or --tokens)")
    if 0 < train.seconds <= (used := max(time_used(config, folder, saved), saved["ended"])):
        raise UserError(f"{folder} has used {used:.0f} s already; to continue, give a longer --for")


def last_checkpoint(config: Config, folder: Path, paper: Transformer) -> str:
    """The checkpoint from which the run can go on; empty if there is none yet."""
    if checkpoint.steps(folder):
        check_same(config, folder)
    if last := checkpoint.newest(folder, paper=paper):
        check_longer(config, folder, checkpoint.read_state(last))
    elif config.data.base or last_step(folder, config):
        checkpoint.to_stderr(f"{folder} has no checkpoint, so it begins anew, with random weights")
    return str(last or "")


def time_used(config: Config, folder: Path, saved: dict[str, Any]) -> float:
    """Seconds that a run has used up. Only one that is given its time saves them; of others the log has them, so that
    equal runs have equal checkpoints."""
    return saved["seconds"] or seconds_of(folder, config, saved["step"])


def about_schedule(parts: Parts, state: State) -> Iterator[str]:
    """What a user may not expect of the learning rate, and of tied experts."""
    train, schedule = parts.config.train, parts.config.schedule
    if state.share is None and not state.step and (warm := warmup_of(train.steps, schedule)) < schedule.warmup:
        yield f"the learning rate warms up for {warm} of {train.steps} steps, not schedule.warmup = {schedule.warmup}"
    before = read_config(parts.run) if state.step else parts.config
    tied, known = schedule.tied_experts, before.schedule.tied_experts if state.step else 0
    if tied not in (0, known) and not state.tied:
        yield f"schedule.tied_experts = {tied:g} changes nothing: experts that have learned apart are not tied again"
    given = before.train.seconds
    share = min(1.0, seconds_of(parts.run, parts.config, state.step) / given) if given else None
    old, new = rate_factor(replace(state, share=share), before), rate_factor(state, parts.config)
    if new > old + RISE:
        ends = f"at step {train.steps:,} instead of {before.train.steps:,}"
        ends = f"after {train.seconds:,.0f} s" if train.seconds else ends
        yield f"the learning rate rises from {old:.0%} to {new:.0%} of its peak, as its schedule now ends {ends}"


def nothing_left(config: Config, folder: Path) -> str:
    """What there is to say of a run that is finished; empty if it is not."""
    for last in checkpoint.steps(folder)[:1]:
        try:
            check_longer(config, folder, checkpoint.read_state(last))
        except UserError as error:
            return "" if checkpoint.verify(last) else str(error)
    return ""


def check_validation(parts: Parts) -> None:
    """Where only answers count, the validation must find some."""
    reading, train = parts.reading, parts.config.train
    if reading is None or reading.marks is None:
        return
    windows = islice(parts.validation.windows(), -(-train.eval_tokens // parts.config.model.context))
    if not any(counted(window[None], reading.marks).any() for window in windows):
        raise UserError(
            f"{parts.validation.folder}: no answer among the first {train.eval_tokens:,} tokens that are held out, so "
            "there is nothing to validate; hold out more (data.validation) or read more of it (train.eval_tokens)"
        )


def restore(parts: Parts, path: Path, used: float = 0.0) -> State:
    """Bring weights, moments and state back from a checkpoint. used: see `time_used`."""
    saved, learner = checkpoint.read_state(path), parts.learner
    begun = saved["data"] or saved["step"]
    if begun and saved["data"] != parts.train.sha256:
        base = f" and {parts.config.data.base}" if isinstance(parts.train, Replay) else ""
        other = f"{path} was trained on other shards than those in {parts.train.folder}{base}"
        if isinstance(parts.train, Belt):
            other += " (those made during a training depend on their files' place too)"
        raise UserError(f"{other}; to train on other text, begin a new run (--run)")
    model, optimizer, owners, part = learner.model, learner.optimizer, learner.owners, learner.part
    checkpoint.load_model(path, model, part)
    named = owners.named(model)
    checkpoint.load_optimizer(path, model, optimizer, saved["optimizer"], owners.mine, part, named)
    start = learner.start()
    load_LE = torch.tensor([share for layer in saved["load"] for share in layer], device=learner.machine.device)
    if len(load_LE) != start.load_LE.numel():
        raise UserError(f"{path / 'state.json'} has the load of other experts than this model's")
    budget_s = learner.config.train.seconds
    share = max(used, saved["seconds"]) / budget_s if budget_s else None
    guard, tied = Guard(**saved["guard"]), saved["tied"]
    return State(saved["step"], saved["cursor"], load_LE.view_as(start.load_LE), guard, share, tied)
