"""A model that no class of transformers can hold leaves with the two files of this folder as its code. They are copied
next to its weights, so they import nothing of KhanhLLM."""

from pathlib import Path
from typing import Any

from khanhllm.data.tokenizer import Tokenizer
from khanhllm.schema import ModelConfig

FILES = tuple(Path(__file__).with_name(f"{name}_khanhllm.py") for name in ("configuration", "modeling"))


def config_json(model: ModelConfig, tokenizer: Tokenizer, dtype: str = "float32") -> dict[str, Any]:
    """config.json of a folder with FILES, and with the weights under our own names. dtype: theirs, in torch's words."""
    return {
        "architectures": ["KhanhLLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_khanhllm.KhanhLLMConfig",
            "AutoModelForCausalLM": "modeling_khanhllm.KhanhLLMForCausalLM",
        },
        "model_type": "khanhllm",
        "dtype": dtype,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
        **model.model_dump(exclude={"zero_out"}),  # which only says how training began
    }
