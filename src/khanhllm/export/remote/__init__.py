"""A model that no class of transformers can hold leaves with the two files of this folder as its code. They are copied
next to its weights, so they import nothing of KhanhLLM."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from khanhllm.data.tokenizer import Tokenizer
from khanhllm.export import hf
from khanhllm.export.check import DTYPES, Exported
from khanhllm.export.shape import REMOTE
from khanhllm.schema import ModelConfig
from khanhllm.settings import checked

FILES = tuple(Path(__file__).with_name(f"{name}_khanhllm.py") for name in ("configuration", "modeling"))
UNKNOWN = {"zero_out", "induction_head", "token_norm", "stream_scale"}
"""keys of [model] that the copied code does not know: how training began, and what export does once for all"""


def remote_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of a folder with FILES, and with the weights under our own names; `hf.write_notes` adds the rest."""
    return {
        "architectures": ["KhanhLLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_khanhllm.KhanhLLMConfig",
            "AutoModelForCausalLM": "modeling_khanhllm.KhanhLLMForCausalLM",
        },
        "model_type": REMOTE,
        **model.model_dump(exclude=UNKNOWN),
    }


def write(folder: Path, model: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, dtype: str) -> None:
    """Fill `folder`, which exists, with a model of any shape and its code."""
    hf.write_notes(folder, remote_config(model), model.context, tokenizer, dtype)
    for file in FILES:
        shutil.copyfile(file, folder / file.name)
    hf.write_tensors(folder, [hf.Part(name, name, None) for name in weights], weights, DTYPES[dtype])


def read(folder: Path) -> Exported:
    """What `write` wrote; transformers and the copied code are not asked."""
    settings = hf.read_json(folder / "config.json")
    shape = {key: settings[key] for key in ModelConfig.model_fields if key in settings}
    with hf.open_tensors(folder) as tensors:
        weights = {name: file.get_tensor(name).float() for name, file in tensors.items()}
    model = checked(ModelConfig, shape, str(folder / "config.json"))
    return Exported(model, weights, hf.read_tokenizer(folder).vocab_size, settings["eos_token_id"])
