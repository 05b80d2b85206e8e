"""A finished (or stopped) run, opened again: its config, model and tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import torch

from khanhllm import checkpoint
from khanhllm.config import Config, MachineConfig, UserError
from khanhllm.files import foreign
from khanhllm.machine.fit import fit
from khanhllm.machine.runtime import Machine, open_machine
from khanhllm.machine.weights import keep_in_bf16
from khanhllm.model import Transformer
from khanhllm.model.counts import on_paper
from khanhllm.settings import read_toml, resolve
from khanhllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Saved:
    config: Config
    machine: Machine
    model: Transformer
    tokenizer: Tokenizer
    step: int
    """optimizer steps behind the weights"""
    data: Path
    """the folder of shards that it was trained on"""


def open_run(run: Path, machine_config: MachineConfig | None = None) -> Saved:
    """Open the newest intact checkpoint of a run folder, on the machine at hand. UserError if there is none."""
    if not (run / "config.toml").exists():
        raise UserError(f"{run} is not a run folder (it has no config.toml); train one with: khanhllm train nano")
    config = resolve(read_toml(run / "config.toml"), where=str(run / "config.toml"))
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
    state = checkpoint.read_state(path)
    return Saved(
        config, machine, fit(model, machine, "none"), tokenizer, step=state["step"], data=Path(state["folder"])
    )
