"""A finished (or stopped) run, opened again: what it was trained with, and what its model says about a text."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from khanhllm.data.cache import place_of
from khanhllm.data.chat import question
from khanhllm.data.counting import Reading
from khanhllm.data.render import fitting, render
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.files import check_new, foreign, quoted
from khanhllm.inference.generate import answer, most_read, write
from khanhllm.inference.likelihood import ROWS_OF_TOKENS
from khanhllm.inference.routes import watched
from khanhllm.inference.sample import reseeded
from khanhllm.inference.score import Score, score
from khanhllm.log.run_log import best_of, validations_of
from khanhllm.machine.adapt import adapt
from khanhllm.machine.devices import Machine, open_machine
from khanhllm.model import Transformer
from khanhllm.model.counts import on_paper, total_parameters
from khanhllm.schema import Config, MachineConfig, Sampling
from khanhllm.settings import checked, read_config, write_config
from khanhllm.training import checkpoint, tensor_files
from khanhllm.units import short

FINDINGS = "experts.json"
"""the file in a run folder with what `khanhllm experts` finds"""
PYTHON = "import os\nimport sys\n\n\ndef main("
"""where to begin with a model of Python"""
TRIES = 5
"""to open the newest checkpoint, if a training removes each before it is read"""
Stop = str | Sequence[str] | None
"""texts that end what is written; None is none, as at OpenAI"""
Step = int | str | None
"""which checkpoint: the newest (None), one of a step, or "best" """


class ExpertChoices(NamedTuple):
    """Which experts each token of a text was sent to, in each of the L mixture layers."""

    tokens: list[str]
    """T of them, the end-of-text before the text first"""
    layers: list[int]
    expert_LTK: Tensor
    """best first (int64)"""
    weight_LTK: Tensor
    """how much each one's answer counts (fp32); sums to 1 for each token if K is 2 or more"""


class Forgotten(UserWarning):
    """A prompt is longer than the model sees at once."""


@dataclass(frozen=True, repr=False)
class Run:
    """Made by `khanhllm.load`. Texts are read as training reads them: as a document, after an end-of-text."""

    checkpoint: Path
    config: Config
    machine: Machine
    model: Transformer
    tokenizer: Tokenizer
    state: dict[str, Any]
    """what else the checkpoint holds"""
    identity: str
    """a hash by which others may name the weights, asked when they were opened: a training removes old checkpoints"""

    def __repr__(self) -> str:
        """One line, as a notebook shows it; that of all fields would have thousands of characters."""
        folder, parameters = str(self.checkpoint.parents[1]), short(total_parameters(self.model))
        return f"<Run {folder!r}: step {self.step:,}, {parameters} parameters>"

    @property
    def step(self) -> int:
        """Optimizer steps behind the weights."""
        return int(self.state["step"])

    @property
    def data(self) -> Path:
        """The folder of shards that it was trained on."""
        return place_of(self.state["folder"], self.config.data.cache)

    def stream(self, prompt: str = "", stop: Stop = (), **sampling: Any) -> Iterator[str]:
        """The continuation of a prompt, piece by piece. sampling: tokens, temperature, top_k, top_p, min_p, seed.

        stop: texts that end it before `tokens` is reached; they are not part of it. Warns with `Forgotten` if the
        prompt is too long for the model. Raises UserError for a setting that makes no sense.
        """
        _check_text(prompt)
        stops = _stops(stop)
        if lost := self.forgotten(prompt):
            warnings.warn(lost, Forgotten, stacklevel=2)
        settings = checked(Sampling, sampling, "generate")
        return write(self.model, self.tokenizer, self.machine, prompt, settings, stops)

    def generate(self, prompt: str = "", n: int = 1, stop: Stop = (), **sampling: Any) -> list[str]:
        """`n` continuations of a prompt, without the prompt; the first has the `seed` given (0), the next seed + 1."""
        _whole("n", n)
        first = checked(Sampling, sampling, "generate")
        return ["".join(self.stream(prompt, stop, **reseeded(first, nth).model_dump())) for nth in range(n)]

    @property
    def talks(self) -> bool:
        """Whether it was taught to answer (`khanhllm tune`)."""
        return self.config.train.targets == "answers"

    def check_talks(self) -> None:
        """Raise UserError if it was not taught to."""
        if not self.talks:
            run = self.checkpoint.parents[1]
            raise UserError(f"{run} was not taught to talk; teach it: khanhllm tune {quoted(run)} --data chats.jsonl")

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], stop: Stop = (), **sampling: Any) -> Iterator[str]:
        """The answer to a conversation, piece by piece. messages: {"role", "content"} each, a question the last.

        Where the model's context is full the oldest turns go, for the answer to have room. sampling and stop: as for
        `stream`. Raises UserError for a run that was not taught to talk, for turns that do not alternate,
        and for a question that is too long.
        """
        self.check_talks()
        turns = question(messages, "messages")
        settings = checked(Sampling, sampling, "chat")
        most = most_read(self.config.model.context)
        room = most - min(settings.tokens, most // 2)
        last = [*turns[: turns[0].role == "system"], turns[-1]]
        kept = fitting(turns, self.tokenizer, room) or fitting(last, self.tokenizer, most)
        if not kept:
            what = "the question, with the system message," if len(last) > 1 else "the question"
            raise UserError(f"{what} is longer than the model sees at once, {self.config.model.context:,} tokens")
        ids = render(kept, self.tokenizer, answer=True)
        return answer(self.model, self.tokenizer, self.machine, ids, settings, _stops(stop))

    def chat(self, messages: Sequence[Mapping[str, Any]], stop: Stop = (), **sampling: Any) -> str:
        """The answer to a conversation; see `stream_chat`."""
        return "".join(self.stream_chat(messages, stop, **sampling))

    def forgotten(self, prompt: str) -> str:
        """One line about the beginning of a prompt that the model cannot see; empty if it sees all of it."""
        tokens, most = len(self._ids(prompt)), most_read(self.config.model.context)
        return f"the prompt has {tokens:,} tokens; the model sees only the last {most:,}" if tokens > most else ""

    @torch.inference_mode()
    def logits(self, text: str) -> Tensor:
        """(T + 1, V) in fp32: row t scores what follows the first t tokens of the text. UserError if it is longer than
        the model sees at once."""
        ids = self._ids(text)
        if len(ids) > self.config.model.context:
            raise UserError(f"the text has {len(ids):,} tokens, the model sees {self.config.model.context:,} at once")
        return self._logits(ids)

    @torch.inference_mode()
    def next(self, text: str, k: int = 10) -> list[tuple[str, float]]:
        """The `k` likeliest tokens to follow a text, with their probabilities; of a long text, its end is read."""
        _whole("k", k)
        logits_V = self._logits(self._ids(text)[-self.config.model.context :])[-1, : self.tokenizer.vocab_size]
        found = logits_V.softmax(dim=-1).topk(min(k, len(logits_V)))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [(self.tokenizer.decode([token]), probability) for token, probability in pairs]

    def score(self, text: str) -> Score:
        """How well the model predicts a text: nats per token, bits per byte. Each part of a text longer than the model
        sees at once is read without what lies before it. UserError if the text is empty."""
        ids, context = np.array(self._ids(text)), self.config.model.context
        return self.score_windows(ids[start : start + context + 1] for start in range(0, len(ids) - 1, context))

    def score_windows(self, windows: Iterator[np.ndarray]) -> Score:
        """Score windows of up to context + 1 ids; every token but the first of each counts, or what else the run says
        (train.targets)."""
        rows = max(1, ROWS_OF_TOKENS // self.config.model.context)
        reading = Reading.of(self.config.train, self.tokenizer)
        return score(self.model, windows, self.tokenizer.token_bytes, self.machine, rows, reading)

    @torch.inference_mode()
    def experts(self, text: str) -> ExpertChoices:
        """The experts that each token is sent to. UserError if the model has none, or the text is too long."""
        layers, ids = self.config.model.moe_layers, self._ids(text)
        if not layers:
            raise UserError("this model has no mixture layers, and so no experts")
        with watched(self.model) as chosen:
            self.logits(text)
        expert_LTK, weight_LTK = (torch.stack(parts).cpu() for parts in zip(*chosen, strict=True))
        return ExpertChoices([self.tokenizer.decode([token]) for token in ids], layers, expert_LTK, weight_LTK)

    def save(self, folder: str | Path) -> Path:
        """Write the model as it is now, with its optimizer's state, as a run folder; training can be resumed there.

        Raises UserError if the folder holds something already, or cannot be written.
        """
        out = Path(folder)
        if not str(folder).strip():
            raise UserError("save needs the name of a folder, got an empty one")
        check_new(out)
        try:
            moments = tensor_files.load(self.checkpoint, "optimizer")
        except OSError as error:
            gone = f"cannot read {self.checkpoint}: {error.strerror or error}"
            raise UserError(f"{gone}; if a training has removed it, open a newer one") from None
        weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        try:
            out.mkdir(parents=True, exist_ok=True)
            checkpoint.write(out, checkpoint.Snapshot(self.step, weights, moments, self.state))
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}") from None
        self.tokenizer.save(out / "tokenizer.json")
        write_config(self.config, out)
        return out

    def export(
        self, folder: str | Path, to: str = "hf", dtype: str = "", compatible: bool = False, remote_code: bool = False
    ) -> Path:
        """Write the checkpoint that was opened, not what became of its weights since, for other tools; see
        `khanhllm.export.exporting.export`."""
        from khanhllm.export.exporting import export

        return export(self.checkpoint, to, Path(folder), dtype=dtype, compatible=compatible, remote_code=remote_code)

    def _ids(self, text: str) -> list[int]:
        _check_text(text)
        return [self.tokenizer.end_of_text, *self.tokenizer.encode(text)]

    def _logits(self, ids: list[int]) -> Tensor:
        with self.machine.autocast():
            return self.model.logits(torch.tensor([ids], device=self.machine.device))[0]


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise UserError(f"a text must be a str, got {type(text).__name__}")


def _stops(stop: Stop) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(() if stop is None else stop)
    if not all(isinstance(text, str) and text for text in stops) or stop == "":
        raise UserError("stop must be one or more texts, none of them empty")
    return stops


def _whole(name: str, number: object) -> None:
    if not isinstance(number, int) or number < 1:
        raise UserError(f"{name} must be a whole number of at least 1, got {number!r}")


def find_checkpoint(run: Path, config: Config, step: Step = None) -> Path:
    """The newest intact checkpoint of a run, that of `step`, or of those kept the "best", which had the lowest
    validation loss. UserError if there is none."""
    if fault := foreign(run, "checkpoints"):
        raise UserError(f"{fault}; a run folder must hold its own files")
    paper = on_paper(config.model)
    if step is None:
        path = checkpoint.newest(run, paper=paper)
        if path is None:
            raise UserError(f"{run} has no checkpoint yet; train it further with --resume")
        return path
    kept = {checkpoint.step_of(path): path for path in checkpoint.steps(run)}
    if step == "best":
        step = best_of(kept, validations_of(run, config))
        if step is None:
            raise UserError(f"{run} has no validation in its log, so no best checkpoint; name a step")
    if isinstance(step, str) or step not in kept:
        has = ", ".join(map(str, sorted(kept))) or "none"
        raise UserError(f"{run} has no checkpoint of step {step}; it has {has}, and best")
    if damage := checkpoint.verify(kept[step], paper):
        raise UserError(f"{kept[step]} is not intact: {damage}") if kept[step].exists() else _removed(kept[step])
    return kept[step]


def _removed(path: Path) -> UserError:
    return UserError(f"{path} was removed while it was opened, as a training keeps only the newest; open a newer one")


def open_run(run: Path, machine_config: MachineConfig | None = None, step: Step = None) -> Run:
    """Open a checkpoint of a run folder, as `find_checkpoint` finds it, on the machine at hand. UserError if there is
    none. If a training removes it meanwhile, the one that is the newest (or best) by then is opened."""
    config = read_config(run)
    path = find_checkpoint(run, config, step)
    wanted = machine_config or MachineConfig()
    machine = open_machine(wanted)
    with torch.device(machine.device):
        model = Transformer(config.model, config.loss.chunk)
    halves = machine.precision == "bf16" and "bf16" in (config.machine.weights, wanted.weights)
    adapt(model, machine, weights="bf16" if halves else "fp32")
    for left in reversed(range(TRIES)):
        try:
            checkpoint.load_model(path, model)
            state, identity = checkpoint.read_state(path), tensor_files.identity(path)
            break
        except FileNotFoundError:
            if isinstance(step, int) or not left:
                raise _removed(path) from None
            path = find_checkpoint(run, config, step)
    tokenizer = Tokenizer.of_model(run / "tokenizer.json", config.model.vocab_size, state["tokenizer"])
    return Run(path, config, machine, model, tokenizer, state, identity)
