"""The verb that plans a run."""

import argparse
import json
from typing import TYPE_CHECKING

from khanhllm.cli.arguments import given, knobs, name, several
from khanhllm.errors import UserError
from khanhllm.schema import Config
from khanhllm.settings import preset_names, resolve, settings_of

if TYPE_CHECKING:
    from rich.console import Console


def plan(options: argparse.Namespace) -> None:
    """Plan a run before it is trained: the memory it takes, the micro-batch that fits, its speed and its end.

    The step is simulated on tensors without memory, so a plan can be made for a card that is not here. With --gpus N it
    is for N of them together: what each holds, what a step moves between them, and whether they pay.
    """
    config = resolve(settings_of(options.preset), given(options), where="plan")
    if options.card and options.measure:
        raise UserError("--measure runs on this machine, so it cannot go with --card")
    if config.machine.processes > 1 and not options.gpus:
        raise UserError(f"machine.processes: to plan for several together, --gpus {config.machine.processes}")
    if options.link and not options.gpus:
        raise UserError("--link joins several cards; say how many: --gpus 2")
    from rich.console import Console

    from khanhllm.planning import plan
    from khanhllm.planning.budget import fit_micro_batch

    console = Console(highlight=False, stderr=options.json)
    if options.gpus:
        return _many(options, config, console)
    with console.status("simulating the step"):
        hardware = plan.hardware_for(config, options.memory, options.card)
        config = fit_micro_batch(config, hardware)
        report = plan.plan(config, hardware)
    if options.measure:
        from khanhllm.lab.measure import measure

        with console.status("three real steps"):
            report = plan.with_measurement(config, report, dict(measure(config)))
    plan.show(report, console)
    if options.json:
        print(json.dumps(report))


def _many(options: argparse.Namespace, config: Config, console: "Console") -> None:
    from khanhllm.planning import assumed, many, plan

    link, rate = assumed.link(options.link or "PCIe 4 x8"), None
    if options.measure:
        from khanhllm.lab.measure import measure
        from khanhllm.planning.budget import fit_micro_batch

        with console.status("three real steps"):
            rate = measure(fit_micro_batch(config, plan.hardware_for(config, options.memory)))["tokens_per_s"]
    with console.status("simulating the step"):
        hardware = plan.hardware_for(config, options.memory, options.card)
        report = many.plan(config, hardware, options.gpus, link, rate)
    many.show(report, console)
    if options.json:
        print(json.dumps(report))


def plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "preset", metavar="PRESET", type=name, help=f"one of: {', '.join(preset_names())}; or a run folder or TOML file"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", type=name, help="memory to fill, as 8GB (default: what this machine has)"
    )
    parser.add_argument("--card", metavar="NAME", type=name, help='a graphics card, as "RTX 4090"; it need not be here')
    parser.add_argument("--gpus", metavar="N", type=several, help="plan for so many cards that train together")
    parser.add_argument(
        "--link",
        metavar="NAME",
        type=name,
        help='what joins them: "PCIe 4 x8" (the default), NVLink, "10 GbE", "6 GB/s", ...',
    )
    parser.add_argument("--measure", action="store_true", help="run three real steps and show them beside the plan")
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")
    knobs(parser)
