"""A folder that transformers, vLLM and whatever reads their format can load: Qwen3 or Qwen3-MoE, written and read
without transformers.

Each expert has tensors of its own: transformers 5 stacks them as it loads, all others expect them so.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from khanhllm.data.render import TEMPLATE
from khanhllm.data.tokenizer import END_OF_TEXT, Tokenizer
from khanhllm.errors import UserError
from khanhllm.export.check import DTYPES, Exported, rounded
from khanhllm.export.encode import Weights
from khanhllm.export.names import weights as names_of
from khanhllm.export.shape import from_qwen3, qwen3
from khanhllm.files import read as read_file
from khanhllm.model.counts import on_paper
from khanhllm.schema import ModelConfig

SHARD = 2**30
"""most bytes in one file of weights, and in memory while it is written"""
INDEX = "model.safetensors.index.json"


class Part(NamedTuple):
    """One tensor of theirs: our parameter, or one expert of it."""

    name: str
    ours: str
    expert: int | None

    def of(self, weight: Tensor) -> Tensor:
        return weight if self.expert is None else weight[self.expert].T


def parts(model: ModelConfig) -> Iterator[Part]:
    for weight in names_of(model.pattern):
        if weight.stacked:
            yield from (Part(weight.hf.format(expert), weight.ours, expert) for expert in range(model.experts))
        else:
            yield Part(weight.hf, weight.ours, None)


def write(folder: Path, model: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, dtype: str) -> None:
    """Fill `folder`, which exists, with a stock model: its shape must have passed `check_stock` and be swiglu."""
    write_notes(folder, stock_config(model), model.context, tokenizer, dtype)
    write_tensors(folder, list(parts(model)), weights, DTYPES[dtype])


def stock_config(model: ModelConfig) -> dict[str, Any]:
    kind = "qwen3_moe" if model.moe_layers else "qwen3"
    name = "Qwen3MoeForCausalLM" if model.moe_layers else "Qwen3ForCausalLM"
    # theta twice: transformers 5 reads the first, 4 and vLLM's older readers the second
    return {"architectures": [name], "model_type": kind, **qwen3(model), "rope_theta": model.rope_theta}


def write_notes(folder: Path, config: dict[str, Any], context: int, tokenizer: Tokenizer, dtype: str) -> None:
    """All but the weights. No pad_token_id in the config: an embedding would give that token no gradient, and here it
    is the end-of-text."""
    end = tokenizer.end_of_text
    kind = str(DTYPES[dtype]).removeprefix("torch.")
    ends = {"bos_token_id": end, "eos_token_id": end}
    words = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    notes = {
        "config.json": config | ends | {"dtype": kind, "torch_dtype": kind},
        "generation_config.json": ends | {"pad_token_id": end, "do_sample": True},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add token_type_ids
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            **words,
        },
        "tokenizer.json": with_beginning(tokenizer),
    }
    for name, content in notes.items():
        text = json.dumps(content, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
        (folder / name).write_text(text, encoding="utf-8")


def add_template(folder: Path, tokenizer: Tokenizer) -> None:
    """The notes of a model that talks: how a conversation is written, and which token ends an answer."""
    words, ends = folder / "tokenizer_config.json", folder / "generation_config.json"
    end = [tokenizer.specials["<|end|>"], tokenizer.end_of_text]
    for path, more in ((words, {"chat_template": TEMPLATE}), (ends, {"eos_token_id": end})):
        path.write_text(json.dumps(read_json(path) | more, ensure_ascii=False, indent=2), encoding="utf-8")


def with_beginning(tokenizer: Tokenizer) -> dict[str, Any]:
    """The layout of tokenizer.json, but with an end-of-text put before every text, as our model has always seen it."""
    layout: dict[str, Any] = json.loads(tokenizer.canonical)
    special = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    layout["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, *({"Sequence": {"id": name, "type_id": 0}} for name in "AB")],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [tokenizer.end_of_text], "tokens": [END_OF_TEXT]}},
    }
    return layout


def write_tensors(folder: Path, wanted: list[Part], weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """model.safetensors, or numbered files of at most SHARD bytes and their index."""
    files: list[list[Part]] = [[]]
    sizes = [0]
    for part in wanted:
        size = part.of(weights[part.ours]).numel() * dtype.itemsize
        if files[-1] and sizes[-1] + size > SHARD:
            files.append([])
            sizes.append(0)
        files[-1].append(part)
        sizes[-1] += size
    named = [f"model-{nth:05}-of-{len(files):05}.safetensors" for nth in range(1, len(files) + 1)]
    if len(files) == 1:
        named = ["model.safetensors"]
    else:
        places = {part.name: file for file, inside in zip(named, files, strict=True) for part in inside}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    usual = (folder / "config.json").stat().st_mode
    for file, inside in zip(named, files, strict=True):
        tensors = {part.name: rounded(part.name, part.of(weights[part.ours]), dtype) for part in inside}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(usual)  # the library makes files that only their owner may read


def read(folder: Path) -> Exported:
    """A Qwen3 or Qwen3-MoE folder as a model of ours, in fp32.

    Raises UserError, naming the file and the key, for what is missing, unknown, or more than our model can be.
    """
    settings = read_json(folder / "config.json")
    model = from_qwen3(settings, str(folder / "config.json"))
    tied = bool(settings.get("tie_word_embeddings"))
    with open_tensors(folder) as tensors:
        weights = _assembled(folder, model, tensors, tied)
    return Exported(model, weights, read_tokenizer(folder).vocab_size, settings.get("eos_token_id"))


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, without what transformers puts before a text."""
    layout = read_json(folder / "tokenizer.json") | {"post_processor": None}
    return Tokenizer(json.dumps(layout, ensure_ascii=False), str(folder / "tokenizer.json"))


def _assembled(folder: Path, model: ModelConfig, theirs: dict[str, Any], tied: bool) -> Weights:
    wanted = list(parts(model))
    shared = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}  # which may be stored as well
    wanted = [part._replace(name=shared.get(part.name, part.name)) for part in wanted]
    for kind, names in (
        ("lacks", {part.name for part in wanted} - theirs.keys()),
        ("holds, unknown to this architecture,", theirs.keys() - {part.name for part in wanted} - shared.keys()),
    ):
        if names:
            raise UserError(f"{folder} {kind} the tensor {min(names)[:100]}")
    stacks: dict[str, list[Tensor]] = {}
    paper = dict(on_paper(model).named_parameters())
    for part in wanted:
        there, shape = theirs[part.name].get_slice(part.name), list(part.of(paper[part.ours]).shape)
        if there.get_shape() != shape or there.get_dtype() not in ("F32", "F16", "BF16"):
            has = f"{there.get_dtype()} {there.get_shape()}"
            raise UserError(f"{folder}: {part.name} is {has}; config.json asks for {shape}, in F32, F16 or BF16")
        tensor = theirs[part.name].get_tensor(part.name)
        stacks.setdefault(part.ours, []).append(tensor.float() if part.expert is None else tensor.float().T)
    if tied:
        stacks["head.weight"][0] = stacks["head.weight"][0].clone()  # ours is learned by itself from here on
    experts = {part.ours for part in wanted if part.expert is not None}
    return {name: torch.stack(found) if name in experts else found[0] for name, found in stacks.items()}


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """The open file of each tensor, by its name. UserError if one cannot be read."""
    single = folder / "model.safetensors"
    files = [single]
    if not single.exists():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise UserError(f"{folder / INDEX} has no weight_map from tensors to files")
        files = sorted({folder / Path(str(file)).name for file in places.values()})
    try:
        with ExitStack() as stack:
            if other := [file for file in files if not file.is_file()]:  # a pipe would never end
                raise UserError(f"{other[0]} is missing, or no file")
            opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
            yield {name: file for file in opened for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read the weights in {folder}: {str(error)[:200]}") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_file(path, 2**28))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {str(error)[:100]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found
