"""Serving a trained model to other programs."""

import argparse
from pathlib import Path

from khanhllm.cli.arguments import given, knobs, name, whole
from khanhllm.errors import UserError
from khanhllm.settings import read_config, resolve


def serve(options: argparse.Namespace) -> None:
    """Serve a trained model over HTTP, as clients of OpenAI's API expect it.

    Only programs on this machine can reach it, unless --host names another address; those others need a key, from
    --key-file or the environment variable KHANHLLM_KEY. Without either, the server makes one and prints it.
    """
    for key, most in (("port", 65535), ("rows", 1024), ("waiting", 100_000)):
        least = key == "rows"
        if not least <= getattr(options, key) <= most:
            raise UserError(f"--{key} must be from {int(least)} to {most:,}, got {getattr(options, key)}")
    for origin in options.cors:
        if origin == "*" or not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise UserError(f"--cors needs one origin such as https://my.example, got {origin!r}")
    machine = resolve(given(options), where="serve").machine
    run = Path(options.run)
    read_config(run)
    from khanhllm.serve import listen
    from khanhllm.serve.server import Server

    key = listen.read_key(Path(options.key_file) if options.key_file else None)
    from khanhllm.runs.run import open_run

    opened = open_run(run, machine)
    opened.machine.take_process()
    server = Server(opened, run.resolve().name, options.rows, options.waiting)
    listen.serve(server, options.host, options.port, key, options.allow_host, options.cors)


def serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=name, help="a run folder")
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
    knobs(parser, ["machine"])
