"""The verb that plans a run."""

import argparse
import json

from khanhllm.cli.arguments import given, knobs, name
from khanhllm.errors import UserError
from khanhllm.settings import preset, preset_names, resolve


def plan(options: argparse.Namespace) -> None:
    """Plan a run before it is trained: the memory it takes, the micro-batch that fits, its speed and its end.

    The step is simulated on tensors without memory, so a plan can be made for a card that is not here.
    """
    config = resolve(preset(options.preset), given(options), where="plan")
    if options.card and options.measure:
        raise UserError("--measure runs on this machine, so it cannot go with --card")
    from rich.console import Console

    from khanhllm.planning import plan
    from khanhllm.planning.budget import fit_micro_batch

    console = Console(highlight=False, stderr=options.json)
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


def plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", metavar="PRESET", help=f"one of: {', '.join(preset_names())}")
    parser.add_argument(
        "--memory", metavar="SIZE", type=name, help="memory to fill, as 8GB (default: what this machine has)"
    )
    parser.add_argument("--card", metavar="NAME", type=name, help='a graphics card, as "RTX 4090"; it need not be here')
    parser.add_argument("--measure", action="store_true", help="run three real steps and show them beside the plan")
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")
    knobs(parser)
