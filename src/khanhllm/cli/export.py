"""Verbs that carry a model out of a run, and into one."""

import argparse
from pathlib import Path

from khanhllm.cli.arguments import name, some, which
from khanhllm.settings import read_config


def export(options: argparse.Namespace) -> None:
    """Write a trained model for other tools: a folder for transformers and vLLM, or a GGUF file for llama.cpp.

    What was written is read back and compared with the run's own model before it is published.
    """
    from khanhllm.export.exporting import export
    from khanhllm.runs.run import find_checkpoint

    run = Path(options.run)
    export(
        find_checkpoint(run, read_config(run), options.step),
        options.to,
        Path(options.out),
        dtype=options.dtype,
        compatible=options.compatible,
        remote_code=options.remote_code,
        compared=not options.no_check,
    )


def export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=name, help="a run folder")
    parser.add_argument(
        "--to",
        choices=("hf", "gguf"),
        required=True,
        help="hf: a folder for transformers, vLLM and others; gguf: a file for llama.cpp, Ollama and LM Studio",
    )
    parser.add_argument("--out", metavar="PATH", type=name, required=True, help="the folder or file to write")
    parser.add_argument(
        "--dtype", metavar="KIND", default="", help="f32, f16, bf16 or (gguf) q8_0 (f32 for hf, f16 for gguf)"
    )
    parser.add_argument("--step", metavar="N|best", type=which, help="the checkpoint to take (the newest)")
    parser.add_argument(
        "--compatible",
        action="store_true",
        help="every layer as a mixture, for tools that know Qwen3-MoE in no other form, as older llama.cpp",
    )
    parser.add_argument(
        "--remote-code",
        action="store_true",
        help="hf: with model code (trust_remote_code), for shapes that transformers has no class for",
    )
    parser.add_argument("--no-check", action="store_true", help="do not read it back and compare")


def import_(options: argparse.Namespace) -> None:
    """Turn a Qwen3 or Qwen3-MoE folder of transformers into a run at step 0, to look into or to train further."""
    from khanhllm.export.importing import import_model

    import_model(Path(options.folder), Path(options.out), options.context)


def import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=name, help="config.json, tokenizer.json and safetensors files")
    parser.add_argument("--out", metavar="RUN", type=name, required=True, help="the run folder to write")
    parser.add_argument("--context", metavar="N", type=some, help="tokens that it sees at once (all that it can)")
