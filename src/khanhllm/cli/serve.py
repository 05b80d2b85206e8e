"""Serving a trained model to other programs."""

import argparse
import re
from pathlib import Path

from khanhllm.cli.arguments import forward_knobs, given, name, whole
from khanhllm.errors import UserError
from khanhllm.settings import read_config, resolve

HOST = re.compile(r"[\w.-]+|\[[\da-f:.]+\]", re.ASCII | re.IGNORECASE)
"""what the guard compares with Host, whose port it leaves out: a name, or an address of IPv6 in brackets"""
ORIGIN = re.compile(r"https?://[^/*]+", re.IGNORECASE)


def serve(options: argparse.Namespace) -> None:
    """Serve a run: a page to write, to open and close experts and to follow a training, and OpenAI's API for programs.

    A run that trains and has no checkpoint yet shows its training; its model is served as soon as there is one. The
    page shows the logs of further runs beside the first one's.

    Only programs on this machine can reach it, unless --host names another address; those others need a key, from
    --key-file or the environment variable KHANHLLM_KEY. Without either, the server makes one and prints it.
    """
    for key, most in (("port", 65535), ("rows", 1024), ("waiting", 100_000)):
        least = key == "rows"
        if not least <= getattr(options, key) <= most:
            raise UserError(f"--{key} must be from {int(least)} to {most:,}, got {getattr(options, key)}")
    for origin in options.cors:
        if not ORIGIN.fullmatch(origin):
            raise UserError(f"--cors needs one origin such as https://my.example, got {origin!r}")
    for host in options.allow_host:
        if not HOST.fullmatch(host):
            raise UserError(f"--allow-host needs a name alone, such as my.example or [fd00::1], got {host!r}")
    machine = resolve(given(options), where="serve").machine
    runs = [Path(run) for run in (options.run, *options.others)]
    for run in runs:
        read_config(run)
    if options.no_page and (options.open or options.others):
        raise UserError("--no-page leaves nothing to --open, and shows no further runs")
    from khanhllm.serve import listen
    from khanhllm.serve.house import House
    from khanhllm.serve.server import Server

    key = listen.read_key(Path(options.key_file) if options.key_file else None)
    from khanhllm.machine.devices import one_thread
    from khanhllm.runs.run import open_run
    from khanhllm.training import checkpoint

    def load() -> Server:
        with one_thread():
            return Server(open_run(runs[0], machine), runs[0].resolve().name, options.rows, options.waiting)

    def enter() -> House:
        with one_thread():
            return House(runs, load, load() if checkpoint.steps(runs[0]) else None, page=not options.no_page)

    listen.serve(enter, options.host, options.port, key, options.allow_host, options.cors, options.open)


def serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=name, help="a run folder")
    parser.add_argument("others", metavar="OTHER", type=name, nargs="*", help="runs to compare it with on the page")
    parser.add_argument(
        "--host", metavar="HOST", type=name, default="127.0.0.1", help="address to listen on (127.0.0.1)"
    )
    parser.add_argument("--port", metavar="N", type=whole, default=8000, help="0: any that is free (8000)")
    parser.add_argument(
        "--rows", metavar="N", type=whole, default=8, help="texts that are written at the same time (8)"
    )
    parser.add_argument("--waiting", metavar="N", type=whole, default=64, help="texts that may wait for a row (64)")
    parser.add_argument("--key-file", metavar="FILE", type=name, help="a file with the key that clients must send")
    parser.add_argument(
        "--allow-host", metavar="NAME", type=name, action="append", default=[], help="a name that Host may say, too"
    )
    parser.add_argument(
        "--cors", metavar="ORIGIN", type=name, action="append", default=[], help="pages of this origin may ask, too"
    )
    parser.add_argument("--no-page", action="store_true", help="serve programs only")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    forward_knobs(parser)
