"""Write a trained model as other tools load it, read it back, compare, and only then publish it with one rename."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from khanhllm.data.cache import place_of
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.export import check, encode, gguf, hf, remote
from khanhllm.export.card import card
from khanhllm.export.encode import Weights
from khanhllm.export.shape import check_stock
from khanhllm.files import there
from khanhllm.model.counts import on_paper, total_parameters
from khanhllm.schema import ModelConfig
from khanhllm.settings import read_config
from khanhllm.training import checkpoint, tensor_files

UNCHECKED = "not compared with the model that was trained (--no-check)"
USUAL = {"hf": "f32", "gguf": "f16"}
DTYPES = {"hf": tuple(check.DTYPES), "gguf": tuple(gguf.DTYPES)}


def export(
    path: Path,
    to: str,
    out: Path,
    *,
    dtype: str = "",
    compatible: bool = False,
    remote_code: bool = False,
    compared: bool = True,
) -> Path:
    """Write a checkpoint of a run as a folder for transformers ("hf") or as a GGUF file ("gguf").

    path: the folder of the checkpoint.
    dtype: f32, f16, bf16, and for gguf q8_0; by default f32 for hf, f16 for gguf. compatible: every layer a mixture,
    for tools that know Qwen3-MoE in no other form. remote_code: with our own model code, for shapes that transformers
    has no architecture for. Raises UserError; `out` is then as it was.
    """
    dtype = dtype or USUAL.get(to, "")
    _check_request(to, out, dtype, compatible, remote_code)
    run = path.parents[1]
    config, state = read_config(run), checkpoint.read_state(path)
    tokenizer = Tokenizer.of_model(run / "tokenizer.json", config.model.vocab_size, state["tokenizer"])
    weights, talks = tensor_files.load(path, "model"), config.train.targets == "answers"
    shape, encoded = _encoded(to, config.model, weights, compatible, remote_code)
    aside = out.with_name(f".export.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if to == "gguf":
            architecture, title = _architecture(shape, compatible), run.resolve().name
            gguf.write(aside, shape, encoded, tokenizer, dtype, architecture, title, talks)
        else:
            aside.mkdir()
            (remote if remote_code else hf).write(aside, shape, encoded, tokenizer, dtype)
            if talks:
                hf.add_template(aside, tokenizer)
        report = UNCHECKED
        if compared:
            reader = gguf if to == "gguf" else remote if remote_code else hf
            text = check.windows(place_of(state["folder"], config.data.cache), tokenizer, config.model.context)
            report = check.check((config.model, weights), reader.read(aside), encoded, tokenizer, text, dtype)
        if to == "hf":
            step, tokens = checkpoint.step_of(path), state["cursor"] * config.model.context
            written = card(run, config, shape, step, tokens, dtype, report, out.name, remote_code)
            (aside / "README.md").write_text(written, encoding="utf-8")
        _check_free(out)  # once more: another export may have been faster
        aside.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', '') or error}") from None
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with suppress(OSError):
                aside.unlink()
    before, after = total_parameters(on_paper(config.model)), total_parameters(on_paper(shape))
    grown = f" (the run has {before:,}: this form needs more)" if after > before else ""
    print(f"{out}: {after:,} parameters{grown} in {dtype}")
    print(f"checked: {report}" if compared else report)
    return out


def _check_request(to: str, out: Path, dtype: str, compatible: bool, remote_code: bool) -> None:
    if to not in DTYPES:
        raise UserError(f"--to {to!r} is unknown; known: {', '.join(DTYPES)}")
    if dtype not in DTYPES[to]:
        raise UserError(f"--dtype {dtype!r} cannot be written for {to}; known: {', '.join(DTYPES[to])}")
    if remote_code and (to == "gguf" or compatible):
        raise UserError("--remote-code is for --to hf alone: it ships model code that transformers runs")
    _check_free(out)


def _check_free(out: Path) -> None:
    if there(out) or out.is_symlink():
        raise UserError(f"{out} exists already; choose another --out, or remove it")


def _encoded(
    to: str, model: ModelConfig, weights: Weights, compatible: bool, remote_code: bool
) -> tuple[ModelConfig, Weights]:
    """The model in terms that the other side has."""
    model, weights = encode.as_unscaled(*encode.as_divided(model, weights))
    if remote_code:
        return model, weights
    check_stock(model, "transformers" if to == "hf" else "llama.cpp", encode.REMEDY, router_bias=to == "gguf")
    if to == "gguf" and compatible:
        check_stock(model, "llama.cpp's qwen3moe", "without --compatible GGUF has it", router_bias=False)
    model, weights = encode.as_swiglu(*encode.as_deeper(*encode.as_wider(model, weights)))
    return encode.as_mixtures(model, weights) if compatible and model.moe_layers else (model, weights)


def _architecture(shape: ModelConfig, compatible: bool) -> str:
    """llama.cpp's name: the only one that knows our alternation of dense and mixture layers is hy_v3."""
    return "qwen3" if not shape.moe_layers else "qwen3moe" if compatible else "hy_v3"
