"""KhanhLLM: train your own hybrid dense / mixture-of-experts language model, from text to a model that writes."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from khanhllm.data.tokenizer import Tokenizer
    from khanhllm.model import Transformer

__version__ = "0.1.0"


def load(run: str | Path) -> "tuple[Transformer, Tokenizer]":
    """The model in fp32, with the weights of the run's newest intact checkpoint, and its tokenizer.

    Raises khanhllm.config.UserError if there is none. torch is imported only now.
    """
    from khanhllm.runs.run import open_run
    from khanhllm.schema import MachineConfig

    saved = open_run(Path(run), MachineConfig(precision="fp32"))
    return saved.model, saved.tokenizer
