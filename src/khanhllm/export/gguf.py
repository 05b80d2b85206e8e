"""One file that llama.cpp, and what is built on it, can load: weights, settings and tokenizer in the GGUF format.

Of llama.cpp's architectures only `hy_v3` lets each layer be dense or a mixture as it likes, with a softmax router of
renormalised weights and a bias of choice. It adds a shared expert to each mixture; ours is one of zeros. A model of
dense layers alone is a `qwen3`. `qwen3moe`, for older versions, has a mixture in every layer (`encode.as_mixtures`).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from khanhllm.data.render import TEMPLATE
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.export.check import Exported, rounded
from khanhllm.export.names import weights as names_of
from khanhllm.export.shape import check_stock
from khanhllm.schema import ModelConfig
from khanhllm.settings import checked

DTYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
"""types of the matrices, and llama.cpp's numbers for a file of each"""
ARCHITECTURES = ("hy_v3", "qwen3", "qwen3moe")
SHARED = 32
"""width of the shared expert of zeros: one block of numbers in the quantised types"""
SOFTMAX = 1
NORMAL, CONTROL, UNUSED = 1, 3, 5
"""kinds of tokens"""


def write(
    path: Path,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: str,
    architecture: str,
    name: str,
    talks: bool = False,
) -> None:
    """Write a new file; one tensor at a time is in memory, besides the weights given. Norms, routers and biases stay in
    fp32 whatever the `dtype`, and under q8_0 matrices whose rows are no multiple of 32 become f16.

    name: how llama.cpp will show the model. talks: it was taught to answer, so how a conversation is written belongs to
    the file. Raises UserError for what the architecture does not have, and OSError; both leave nothing behind.
    """
    import gguf

    _check(model, architecture)
    plan = [(key, weight, _kind(key, weight, dtype)) for key, weight in _tensors(model, weights, architecture)]
    notes = {"general.type": "model", "general.name": name, "general.file_type": DTYPES[dtype]}
    notes |= {"general.quantization_version": gguf.GGML_QUANT_VERSION}
    notes |= _settings(model, architecture) | _vocabulary(tokenizer, model.vocab_size)
    notes |= _talk(tokenizer) if talks else {}
    with path.open("xb"):  # new, so that nothing is written through a link
        pass
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in notes.items():
            _note(writer, key, value)
        for key, weight, kind in plan:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(key, weight.shape, np.dtype(np.float32), weight.numel() // block * size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, weight, kind in plan:
            writer.write_tensor_data(_numbers(key, weight, kind))
        writer.close()
    except BaseException:
        with suppress(OSError):  # Windows removes no file that is open
            writer.close()
        path.unlink()
        raise


def read(path: Path) -> Exported:
    """The model in a file that `write` could have written; weights in fp32, mapped from the file where they are fp32
    there. UserError for any other file: a setting or tensor that our model does not have would be lost in silence.

    It is for files of one's own: a stranger's file may take long to be refused.
    """
    from gguf import GGUFReader, GGUFValueType
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(path, "c")
        # strings and single numbers, not the lists of the vocabulary
        notes = {key: field.contents() for key, field in reader.fields.items() if field.types[0] != GGUFValueType.ARRAY}
        kinds = reader.fields["tokenizer.ggml.token_type"].contents()
        found = {tensor.name: tensor for tensor in reader.tensors}
        model = _model(notes, set(found), str(path))
        _check_notes(notes, model, str(path))
        weights = {}
        for ours, key, stacked in _names(model):
            tensor = found.pop(key)
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
            weights[ours] = weight.mT if stacked else weight
        if lost := [key for key, tensor in found.items() if not key.endswith("_shexp.weight") or tensor.data.any()]:
            raise UserError(f"{path}: a model here has no tensor like {lost[0][:60]}")
        return Exported(model, weights, len(kinds) - kinds.count(UNUSED), notes["tokenizer.ggml.eos_token_id"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a GGUF file as `khanhllm export` writes it: {str(error)[:200]}") from None


def _check(model: ModelConfig, architecture: str) -> None:
    remedy = "without --compatible GGUF has it" if model.router_bias else "--to hf --remote-code writes it"
    check_stock(model, f"llama.cpp's {architecture}", remedy, router_bias=architecture == "hy_v3")
    if architecture == "qwen3moe" and model.experts_per_token == 1:
        what = "model.experts_per_token is 1, and llama.cpp's qwen3moe leaves the router's probability out then"
        raise UserError(f"{what}; export without --compatible")
    mixtures = {"qwen3": 0, "qwen3moe": len(model.pattern)}.get(architecture, len(model.moe_layers) or -1)
    if len(model.moe_layers) != mixtures or model.feedforward != "swiglu":
        raise ValueError(f"{architecture} cannot hold {model.pattern} of {model.feedforward}")


def _settings(model: ModelConfig, architecture: str) -> dict[str, Any]:
    """What llama.cpp reads to build the model, by its keys."""
    settings = {
        "vocab_size": model.vocab_size,
        "block_count": len(model.pattern),
        "context_length": model.context,
        "embedding_length": model.dim,
        "feed_forward_length": model.hidden,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.key_value_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": model.norm_eps,
        "rope.dimension_count": model.head_dim,
        "rope.freq_base": model.rope_theta,
    }
    if model.moe_layers:
        settings |= {
            "expert_count": model.experts,
            "expert_used_count": model.experts_per_token,
            "expert_feed_forward_length": model.expert_width,
        }
    if architecture == "hy_v3":
        settings |= {
            "expert_shared_feed_forward_length": SHARED,
            "expert_gating_func": SOFTMAX,
            "expert_weights_norm": model.experts_per_token > 1,  # see Router
            "expert_weights_scale": 1.0,
        }
    return {f"{architecture}.{key}": value for key, value in settings.items()}


def _model(notes: dict[str, Any], tensors: set[str], where: str) -> ModelConfig:
    """`_settings` read backwards."""
    architecture = notes["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{where}: architecture {architecture[:40]!r} is unknown here; known: {', '.join(ARCHITECTURES)}"
        )

    def note(key: str) -> Any:
        return notes[f"{architecture}.{key}"]

    layers = range(note("block_count"))
    heads, shared = note("attention.head_count"), note("attention.head_count_kv")
    shape = {
        "pattern": "".join("M" if f"blk.{layer}.ffn_gate_inp.weight" in tensors else "D" for layer in layers),
        "dim": note("embedding_length"),
        "heads": heads,
        "kv_heads": 0 if shared == heads else shared,
        "hidden": note("feed_forward_length"),
        "context": note("context_length"),
        "vocab_size": note("vocab_size"),
        "rope_theta": _decimal(note("rope.freq_base")),
        "norm_eps": _decimal(note("attention.layer_norm_rms_epsilon")),
        "router_bias": any(key.endswith("exp_probs_b") for key in tensors),
    }
    if "M" in shape["pattern"]:
        width = note("expert_feed_forward_length")
        shape |= {"experts": note("expert_count"), "experts_per_token": note("expert_used_count")}
        shape |= {"expert_hidden": 0 if width == shape["hidden"] else width}
    return checked(ModelConfig, shape, where)


def _check_notes(notes: dict[str, Any], model: ModelConfig, where: str) -> None:
    """UserError for a setting that the model cannot have, or a beginning of text that is not our end of one."""
    wanted = _settings(model, notes["general.architecture"])
    wanted |= {
        "tokenizer.ggml.bos_token_id": notes["tokenizer.ggml.eos_token_id"],
        "tokenizer.ggml.add_bos_token": True,
    }
    for key, ours in wanted.items():
        theirs = notes.get(key)
        if theirs != ours and (not isinstance(ours, float) or np.float32(theirs) != np.float32(ours)):
            raise UserError(f"{where}: {key} is {theirs!r}, and a model here can only have {ours!r}")


def _decimal(number: float) -> float:
    """The shortest number that fp32 stores as this one: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _names(model: ModelConfig) -> Iterator[tuple[str, str, bool]]:
    """Our name and llama.cpp's for each tensor of the model, and whether theirs is transposed."""
    for weight in names_of(model.pattern):
        yield weight.ours, weight.gguf, weight.stacked
    for layer in model.moe_layers if model.router_bias else ():
        yield f"blocks.{layer}.feedforward.router.bias_E", f"blk.{layer}.exp_probs_b", False


def _tensors(model: ModelConfig, weights: Mapping[str, Tensor], architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the file with its name; views, not copies."""
    names = list(_names(model))
    if unused := weights.keys() - {ours for ours, *_ in names}:
        raise ValueError(f"{min(unused)} has no place in a GGUF file")
    for ours, key, stacked in names:
        yield key, weights[ours].mT if stacked else weights[ours]
    for layer in model.moe_layers if architecture == "hy_v3" else ():
        for part in ("gate", "up", "down"):
            shape = (model.dim, SHARED) if part == "down" else (SHARED, model.dim)
            yield f"blk.{layer}.ffn_{part}_shexp.weight", torch.zeros(()).expand(shape)


def _kind(key: str, weight: Tensor, dtype: str) -> Any:
    """The type in which a tensor is written."""
    from gguf import GGMLQuantizationType as Kind

    if weight.ndim == 1 or "ffn_gate_inp" in key:
        return Kind.F32
    if dtype == "q8_0" and weight.shape[-1] % 32:
        return Kind.F16
    return Kind[dtype.upper()]


def _numbers(key: str, weight: Tensor, kind: Any) -> np.ndarray:
    """The tensor's content in the file."""
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import quantize

    if kind == Kind.BF16:
        return weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if kind == Kind.F16:
        return rounded(key, weight, torch.float16).numpy()
    whole = weight.float().contiguous().numpy()
    return whole if kind == Kind.F32 else quantize(whole, kind)


def _vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The tokenizer by llama.cpp's keys; rows of the embedding beyond it get tokens that no text has."""
    layout = json.loads(tokenizer.canonical)
    specials = {token["id"]: token["content"] for token in layout["added_tokens"]}
    tokens = specials | {rank: piece for piece, rank in layout["model"]["vocab"].items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in layout["model"]["merges"]]
    if not merges:
        raise UserError("llama.cpp cannot read a tokenizer without merges; train one on more text")
    kinds = [CONTROL if rank in specials else NORMAL if rank in tokens else UNUSED for rank in range(rows)]
    end = tokenizer.end_of_text
    vocabulary = {
        "model": "gpt2",
        "pre": tokenizer.pattern,  # the pattern has the name that llama.cpp gives it
        "tokens": [tokens.get(rank, f"[PAD{rank}]") for rank in range(rows)],
        "token_type": kinds,
        "merges": merges,
        # an end of text before every text, as our model has always seen it; that text cannot spell it is the caller's
        # choice there (parse_special)
        "bos_token_id": end,
        "eos_token_id": end,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}


def _talk(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.eot_token_id": tokenizer.specials["<|end|>"]}


def _note(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
