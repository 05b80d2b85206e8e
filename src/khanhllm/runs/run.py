"""A finished (or stopped) run, opened again: its config, model and tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.files import foreign
from khanhllm.machine.devices import Machine, open_machine
from khanhllm.machine.fit import fit
from khanhllm.machine.precision import keep_in_bf16
from khanhllm.model import Transformer
from khanhllm.model.counts import on_paper
from khanhllm.schema import Config, MachineConfig
from khanhllm.settings import read_config
from khanhllm.training import checkpoint


@dataclass(frozen=True)
class Saved:
    config: Config
    machine: Machine
    model: Transformer
    tokenizer: Tokenizer
    state: dict[str, Any]
    """what else its checkpoint holds"""

    @property
    def step(self) -> int:
        """Optimizer steps behind the weights."""
        return int(self.state["step"])

    @property
    def data(self) -> Path:
        """The folder of shards that it was trained on."""
        return Path(self.state["folder"])


def open_run(run: Path, machine_config: MachineConfig | None = None) -> Saved:
    """Open the newest intact checkpoint of a run folder, on the machine at hand. UserError if there is none."""
    config = read_config(run)
    if fault := foreign(run):
        raise UserError(f"{fault}; a run folder must hold its own files")
    path = checkpoint.newest(run, paper=on_paper(config.model))
    if path is None:
        raise UserError(f"{run} has no checkpoint yet; train it further with --resume")
    wanted = machine_config or MachineConfig()
    machine = open_machine(wanted)
    with torch.device(machine.device):
        model = Transformer(config.model, config.loss.chunk)
    if machine.precision == "bf16" and "bf16" in (config.machine.weights, wanted.weights):
        keep_in_bf16(model)
    checkpoint.load_model(path, model)
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(f"{run / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, more than this model knows")
    return Saved(config, machine, fit(model, machine, "none"), tokenizer, checkpoint.read_state(path))
