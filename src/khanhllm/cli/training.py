"""Verbs that train a model."""

import argparse
import sys
from pathlib import Path

from khanhllm.cli.arguments import given, knobs, name, short
from khanhllm.errors import UserError
from khanhllm.schema import Config
from khanhllm.settings import (
    beside,
    folder_for,
    nothing_to_resume,
    other_shape,
    preset,
    preset_names,
    read_config,
    read_toml,
    resolve,
    with_length,
)


def train(options: argparse.Namespace) -> int:
    """Train a model from a preset, a TOML file and single options; later ones win.

    The run folder keeps the resolved config.toml, which alone reproduces a run that began with random weights
    (--config), training_log.csv, samples.txt, the tokenizer and the newest checkpoints. With --machine.processes N, N
    processes of this machine train together, and torchrun starts them on several machines. Ctrl-C, TERM, HUP, USR1 and
    USR2 finish the step, save and end it, with the exit code of shells: 130 for Ctrl-C, 143 for TERM, 128 + its number
    for any signal. --resume continues. A signal that was ignored at the start, as under nohup, stays ignored. --from
    RUN begins with the weights and the tokenizer of another run, in a folder of its own: for more text, or other text.
    """
    if options.base and (options.resume or options.resume_or_new or options.twin):
        raise UserError("--from begins a run of its own; --resume continues one, and --twin begins without weights")
    _check_tokenizer(options)
    folder = _folder(options)
    layers = _with_twin(options, _layers(options, folder))
    config = with_length(*layers, steps=options.steps, time=options.time, tokens=options.tokens, where="train")
    from khanhllm.machine.signals import exit_code
    from khanhllm.training import run
    from khanhllm.training.parts import nothing_left

    if options.resume_or_new and (done := nothing_left(config, folder)):
        print(done)
        return 0
    if options.base:
        from khanhllm.runs.tune import go_on

        config = go_on(Path(options.base), folder, config)
    resume = options.resume or options.resume_or_new or bool(options.base)
    return exit_code(run.train(config, folder, resume=resume))


def _folder(options: argparse.Namespace) -> Path:
    if options.run:
        return Path(options.run)
    begun_from = options.preset or options.config
    if options.base and not begun_from:
        return beside(options.base, "-more")
    if not begun_from:
        raise UserError(f"name a preset ({', '.join(preset_names())}), a --config FILE, or a --run to --resume")
    folder = folder_for(begun_from)
    return folder.parent / f"{folder.resolve().name}-twin" if options.twin else folder


def _check_tokenizer(options: argparse.Namespace) -> None:
    """The weights of another run know only its tokenizer."""
    named = given(options).get("data", {}).get("tokenizer")
    if options.base and named and Path(str(named)).absolute() != (Path(options.base) / "tokenizer.json").absolute():
        raise UserError(f"the tokenizer is that of {options.base}; leave out --data.tokenizer")


def _layers(options: argparse.Namespace, folder: Path) -> list[dict[str, dict[str, object]]]:
    """What the config is made of, the strongest last."""
    kept = folder / "config.toml"
    options.resume |= options.resume_or_new and kept.exists()
    if options.resume and not kept.exists():
        raise nothing_to_resume(folder, "leave --resume out to begin one")
    if options.resume:
        if options.preset and (other := other_shape(options.preset, folder)):
            print(UserError(other), file=sys.stderr)
        layers = [read_toml(kept)]
    elif options.preset:
        layers = [preset(options.preset)]
    elif options.base and options.config is None:
        own = {"base": "", "replay": Config().data.replay}  # what that run itself went on from is another text
        layers = [read_config(Path(options.base)).model_dump(), {"data": own}]
    elif options.config is not None:
        layers = []
    else:
        raise UserError(f"name a preset ({', '.join(preset_names())}) or a --config FILE to begin a run in {folder}")
    layers += [] if options.config is None else [read_toml(Path(options.config))]
    if options.base:  # experts that have learned apart stay apart
        layers += [{"model": read_config(Path(options.base)).model.model_dump(), "schedule": {"tied_experts": 0}}]
    return [*layers, short("data", "source", options.data), given(options)]


def _with_twin(
    options: argparse.Namespace, layers: list[dict[str, dict[str, object]]]
) -> list[dict[str, dict[str, object]]]:
    """The same, but a model that they describe becomes its twin, if that is wanted: only this one has to fit into what
    else they say."""
    if not options.twin:
        return layers
    from khanhllm.model.twin import dense_twin

    if options.resume or options.resume_or_new:
        raise UserError("--twin begins a run of its own; to continue one, leave it out")
    mixture = resolve(*({"model": layer["model"]} for layer in layers if "model" in layer), where="train").model
    return [*layers, {"model": dense_twin(mixture, options.twin).model_dump()}]


def train_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "khanhllm train [PRESET] [--config FILE] [--data SRC] [--run DIR] [--steps N | --for TIME | --tokens N]\n"
        "                      [--from RUN] [--resume | --resume-or-new] [--section.key VALUE ...]"
    )
    parser.add_argument("preset", nargs="?", metavar="PRESET", help=f"one of: {', '.join(preset_names())}")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=name,
        help="a whole TOML, or a few keys of one; the config.toml of a run means that run's folder",
    )
    parser.add_argument("--data", metavar="SRC", help="where the text comes from; the same as --data.source")
    parser.add_argument(
        "--from", dest="base", metavar="RUN", type=name, help="begin with the weights and the tokenizer of this run"
    )
    parser.add_argument(
        "--run",
        metavar="DIR",
        type=name,
        help="the run folder (default runs/PRESET, or runs/NAME for --config NAME.toml)",
    )
    parser.add_argument("--steps", metavar="N", help="optimizer steps; the same as --train.steps")
    parser.add_argument("--for", dest="time", metavar="TIME", help="time to train for, as 480s, 90m, 8h or 1d12h")
    parser.add_argument("--tokens", metavar="N", help="tokens to train on, as 300M or 5B")
    parser.add_argument(
        "--twin", choices=["active", "total"], help="train the dense model of equal arithmetic or equal parameters"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest intact checkpoint in the run folder"
    )
    parser.add_argument(
        "--resume-or-new",
        action="store_true",
        help="the same, but begin a run where there is none, and leave one that is finished, as clusters restart",
    )
    knobs(parser)


def demo(options: argparse.Namespace) -> int:
    """Show the whole way in a few minutes, offline: text, tokenizer, shards, a model that learns and then writes.

    With --chat the model then learns to answer, from conversations made by rule, and you can talk with it.
    """
    from khanhllm import demo
    from khanhllm.machine.signals import exit_code

    tell = demo.talk if options.chat else demo.tell
    return exit_code(tell(Path(options.run), given(options)))


def demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="DIR", type=name, default="runs/demo", help="the run folder (runs/demo)")
    parser.add_argument(
        "--chat", action="store_true", help="teach it to talk; takes the run in the folder, if there is one"
    )
    knobs(parser)
