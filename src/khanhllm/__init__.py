"""KhanhLLM: train your own hybrid dense / mixture-of-experts language model, from text to a model that writes.

    run = khanhllm.train("nano", data="my-texts/", run="runs/mine", steps=500)
    run.generate("Once upon a time")

Nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from khanhllm.api import config, history, load, plan, presets, train
    from khanhllm.data.tokenizer import Tokenizer
    from khanhllm.errors import UserError
    from khanhllm.model import Transformer
    from khanhllm.runs.run import Run
    from khanhllm.schema import Config, Sampling

    __version__: str

__all__ = [
    "Config",
    "Run",
    "Sampling",
    "Tokenizer",
    "Transformer",
    "UserError",
    "config",
    "history",
    "load",
    "plan",
    "presets",
    "train",
]
HOMES = {
    **dict.fromkeys(("config", "history", "load", "plan", "presets", "train"), "api"),
    **dict.fromkeys(("Config", "Sampling"), "schema"),
    "Run": "runs.run",
    "Tokenizer": "data.tokenizer",
    "Transformer": "model",
    "UserError": "errors",
}
"""the module that has each public name"""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("khanhllm")
    if name not in HOMES:
        raise AttributeError(f"module 'khanhllm' has no attribute {name!r}")
    return getattr(import_module(f"khanhllm.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
