"""Measure speed: a whole step, next to our dense twin and to Hugging Face, and single parts of the program.

Candidates take turns in one run, and each ratio is of one turn, so whatever else the machine does affects both sides.
The printed number is the median, with the smallest and the largest in brackets.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from rich.console import Console

from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.files import check_writable
from khanhllm.lab.candidates import HUGGING_FACE, OURS, TWIN, Candidate, as_qwen3_moe
from khanhllm.lab.doctor import version_of
from khanhllm.lab.facts import spread
from khanhllm.limits import cores
from khanhllm.machine.adapt import adapt
from khanhllm.machine.devices import Machine, matmul_rate, open_machine
from khanhllm.model import Transformer
from khanhllm.schema import Config, MachineConfig, Sampling
from khanhllm.settings import preset, resolve

Report = dict[str, Any]
SMALL = {
    "model": {"pattern": "DMDMDMDM", "dim": 256, "heads": 8, "hidden": 688, "context": 256, "vocab_size": 8192},
    "train": {"micro_batch": 16},
}
"""a shape that two CPU cores can train"""
LARGE = {"train": {"micro_batch": 8, "accumulation": 1}, "optim": {"name": "adamw"}}
"""changes to the 692M presets, so that both sides of the comparison do the same"""
HEADLINES = ("ratio_huggingface", "ratio_dense_twin", "share_of_matmul_rate")
WITHOUT = "left out: transformers is not installed (pip install 'khanhllm[dev]')"
WRITTEN = 64
"""tokens of a prompt, and of what is written after it"""
TEXT = 4_000_000
"""text that the tokenizers encode (bytes)"""
PREPARED = 10**8
"""text that is turned into shards (characters)"""


def run(parts: list[str], machine: MachineConfig, steps: int, out: Path | None, as_json: bool) -> None:
    """Measure the parts (all if none is named), print the results, and write all of them as JSON to `out`."""
    for part in parts:
        if part not in PARTS:
            raise UserError(f"bench knows no part {part!r}; parts: {', '.join(PARTS)}")
    console = Console(highlight=False, stderr=as_json)
    opened = open_machine(machine)
    opened.take_process()
    path = out or Path("bench") / f"{time.strftime('%Y%m%d-%H%M%S')}-{opened.device.type}.json"
    check_writable(path)
    measured: Report = {}
    try:
        for part in parts or PARTS:
            console.rule(f"[bold]{part}")
            measured |= PARTS[part](opened, machine, steps, console)
    finally:
        if measured:  # also when a later part has failed
            _report({"machine": _describe(opened), "versions": _versions()} | measured, path, console, as_json)


def _report(report: Report, path: Path, console: Console, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report), flush=True)  # first, so that a disk that has become full costs no figures
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file with --out") from None
    console.print(f"\nfull report: {path}", markup=False)


def _describe(machine: Machine) -> Report:
    cuda = machine.device.type == "cuda"
    name = torch.cuda.get_device_name(machine.device) if cuda else platform.processor() or platform.machine()
    return {"device": str(machine.device), "name": name, "threads": torch.get_num_threads()}


def _versions() -> dict[str, str]:
    names = ("khanhllm", "torch", "transformers", "tokenizers", "tiktoken", "bitsandbytes")
    return {"python": platform.python_version()} | {name: version_of(name) for name in names}


def _step(machine: Machine, wanted: MachineConfig, steps: int, console: Console) -> Report:
    """Measure a whole optimizer step: on CUDA of both reference presets in bf16, elsewhere of what a CPU can train."""
    settings = {"machine": wanted.model_dump()}
    if machine.device.type == "cuda":
        large = {"machine": {**settings["machine"], "checkpointing": "none"}}
        shapes = {name: resolve(preset(name), LARGE, large) for name in ("modern-692m", "khanh-692m")}
    else:
        shapes = {"d256": resolve(SMALL, settings)}
    reports = {name: _compare(name, config, machine, steps, console) for name, config in shapes.items()}
    first, *_ = reports.values()
    return {"step": reports} | {key: first[key] for key in HEADLINES}


def _compare(name: str, config: Config, machine: Machine, steps: int, console: Console) -> Report:
    model = config.model
    console.print(f"{name}: {model.pattern}, width {model.dim}, {config.tokens_per_step:,} tokens a step", markup=False)
    mode, modes = _fastest(OURS, config, console)
    if mode is None:
        raise UserError(f"bench: our own step cannot run here: {modes[OURS[0]]}")
    theirs, more = _fastest(HUGGING_FACE, config, console) if model.style == "modern" else (None, {})
    names = [mode, mode.replace("ours", TWIN), *([theirs] if theirs else [])]
    candidates = [Candidate.enter(candidate, config) for candidate in names]
    if failed := [candidate for candidate in candidates if candidate.fault]:
        raise UserError(f"bench: {failed[0].name} cannot run here: {failed[0].fault}")
    product = (8192, torch.bfloat16) if machine.precision == "bf16" else (2048, torch.float32)
    rates: list[float] = []
    turns: list[list[float]] = []
    for turn in range(steps + 2):
        seconds = [candidate.step() for candidate in candidates]
        rate = matmul_rate(machine.device, *product)
        if turn >= 2:  # the first two warm up
            turns.append(seconds)
            rates.append(rate)
    report: Report = {"shape": model.model_dump(), "tokens": config.tokens_per_step, "matmul_rate": spread(rates)}
    for candidate, its in zip(candidates, zip(*turns, strict=True), strict=True):
        report[candidate.name] = _result(candidate, list(its), rates, config.tokens_per_step, machine)
        _print_result(console, candidate.name, report[candidate.name])
    ours, twin, *hugging_face = zip(*turns, strict=True)
    report |= {
        "ratio_dense_twin": spread([b / a for a, b in zip(ours, twin, strict=True)]),
        "ratio_huggingface": spread([b / a for a, b in zip(ours, hugging_face[0], strict=True)]) if theirs else None,
        "share_of_matmul_rate": report[mode]["share_of_matmul_rate"],
        "our_mode": mode,
        "huggingface_mode": theirs,
        "modes": modes | more,
    }
    for key in HEADLINES:
        console.print(f"{key:24} {_shown(report[key], '.3f')}")
    return report


def _fastest(names: list[str], config: Config, console: Console) -> tuple[str | None, dict[str, float | str]]:
    """The mode with the fastest of three steps after the first; tokens per second of each, or why it does not work."""
    modes: dict[str, float | str] = {}
    rates: dict[str, float] = {}
    for name in names:
        candidate = Candidate.enter(name, config)
        if candidate.fault:
            modes[name] = candidate.fault
            console.print(f"{name}: {candidate.fault}", markup=False)
            continue
        modes[name] = rates[name] = config.tokens_per_step / min(candidate.step() for _ in range(3))
        candidate.leave()
        console.print(f"{name}: {rates[name]:,.0f} tokens/s", markup=False)
    return max(rates, key=lambda name: rates[name], default=None), modes


def _result(candidate: Candidate, seconds: list[float], rates: list[float], tokens: int, machine: Machine) -> Report:
    flops = candidate.flops * tokens
    return {
        "parameters": candidate.parameters,
        "flops_per_token": candidate.flops,
        "step_ms": spread([1000 * one for one in seconds]),
        "tokens_per_s": spread([tokens / one for one in seconds]),
        "share_of_matmul_rate": spread([flops / one / rate for one, rate in zip(seconds, rates, strict=True)]),
        "mfu": flops / median(seconds) / machine.peak_flops if machine.peak_flops else None,
        "first_step_s": candidate.first_step,
        "memory_mb": candidate.leave(),
    }


def _print_result(console: Console, name: str, result: Report) -> None:
    console.print(
        f"{name:24} {_shown(result['tokens_per_s'], ',.0f')} tokens/s   first step {result['first_step_s']:.1f} s   "
        f"{result['memory_mb']:,.0f} MB   {result['parameters'] / 1e6:.1f} M parameters",
        markup=False,
    )


def _moe(machine: Machine, wanted: MachineConfig, steps: int, console: Console) -> Report:
    """Measure one mixture layer, forward and backward, next to transformers' block of the same shape."""
    try:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError:
        console.print(WITHOUT, markup=False)
        return {}
    model = _untrained(machine)
    shape, ours = model.config, cast(Any, model.blocks[1]).feedforward
    x_BTD = torch.randn(16, shape.context, shape.dim, device=machine.device, requires_grad=True)
    with torch.device(machine.device):
        theirs = Qwen3MoeSparseMoeBlock(as_qwen3_moe(shape, "grouped_mm"))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)

    def both_ways(block: Callable[..., Any]) -> Callable[[], None]:
        def work() -> None:
            with machine.autocast():
                out = block(x_BTD)
            (out[0] if isinstance(out, tuple) else out).square().mean().backward()

        return work

    mine, other = _turns([both_ways(ours), both_ways(theirs)], steps, machine)
    ratio = spread([b / a for a, b in zip(mine, other, strict=True)])
    ms = spread([1000 * one for one in mine])
    console.print(f"mixture layer: ours {_shown(ms, '.1f')} ms, x {_shown(ratio, '.2f')}")
    return {"moe": {"ms": ms, "ratio_huggingface": ratio}}


def _untrained(machine: Machine, small: dict[str, Any] = SMALL) -> Transformer:
    """The model whose parts are measured alone, of a size that suits the device."""
    config = resolve(small if machine.device.type != "cuda" else preset("modern-692m"))
    with torch.device(machine.device):
        model = Transformer(config.model)
    model.initialise()
    return adapt(model, machine, "none")


def _decode(machine: Machine, wanted: MachineConfig, steps: int, console: Console) -> Report:
    """Measure the generation of tokens, one by one, from the cache: of one text and of eight together, and of one next
    to transformers' generate with a model of the same shape."""
    model, turns = _untrained(machine, preset("micro")), min(steps, 9)
    one, eight = _turns([partial(_write, model, machine, 1), partial(_write, model, machine, 8)], turns, machine)
    rate = spread([WRITTEN / seconds for seconds in one])
    together = spread([8 * alone / seconds for alone, seconds in zip(one, eight, strict=True)])
    console.print(f"decode: {_shown(rate, ',.0f')} tokens/s, eight texts together x {_shown(together, '.2f')}")
    report = {"tokens_per_s": rate, "ratio_eight": together}
    try:
        from transformers import Qwen3MoeForCausalLM  # type: ignore[attr-defined]
    except ImportError:
        console.print(WITHOUT, markup=False)
        return {"decode": report}
    model = _untrained(machine)
    with torch.device(machine.device):
        theirs: Any = Qwen3MoeForCausalLM(as_qwen3_moe(model.config, "grouped_mm")).eval()
    prompt_BT = torch.arange(WRITTEN, device=machine.device)[None]
    limits = {"min_new_tokens": WRITTEN, "max_new_tokens": WRITTEN, "do_sample": False}

    def generate() -> None:
        with machine.autocast():
            theirs.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), **limits)

    mine, other = _turns([partial(_write, model, machine, 1), generate], turns, machine)
    ratio = spread([b / a for a, b in zip(mine, other, strict=True)])
    console.print(f"decode next to transformers' generate: x {_shown(ratio, '.2f')}")
    return {"decode": report | {"ratio_huggingface": ratio}}


def _write(model: Transformer, machine: Machine, rows: int) -> None:
    """Write so many texts together, each after a prompt of its own."""
    from khanhllm.inference.engine import Engine, Job

    engine = Engine(model, machine, model.config.vocab_size, rows, waiting=rows)
    for row in range(rows):
        ids, sampling = list(range(row, row + WRITTEN)), Sampling(tokens=WRITTEN, temperature=0)
        engine.submit(Job(ids, sampling, lambda _score: False, lambda _reason, _error: None))
    while engine.turn():
        pass


def _tokenizer(machine: Machine, wanted: MachineConfig, steps: int, console: Console) -> Report:
    """Measure text to ids: tiktoken, as we use it, next to tokenizers; same text, same vocabulary, same ids."""
    from tokenizers import Tokenizer as Reference

    from khanhllm.data.prepare import train_on

    ours = train_on("stdlib", 8192, 5 * TEXT)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(Path(folder, "tokenizer.json"))
        theirs = Reference.from_file(str(Path(folder, "tokenizer.json")))
    texts = list(_texts("stdlib", TEXT))
    size = sum(len(text.encode()) for text in texts)
    threads = torch.get_num_threads()
    if [ids.tolist() for ids in ours.encode_batch(texts, threads)] != [one.ids for one in theirs.encode_batch(texts)]:
        raise UserError("bench: the two encoders disagree; please report it")
    others = [partial(theirs.encode_batch, texts), partial(theirs.encode_batch_fast, texts)]
    mine, plain, fast = _turns([partial(ours.encode_batch, texts, threads), *others], min(steps, 7), machine)
    rate = spread([size / 1e6 / one for one in mine])
    ratios = [spread([b / a for a, b in zip(mine, other, strict=True)]) for other in (plain, fast)]
    console.print(f"encode: {_shown(rate, '.1f')} MB/s, x {_shown(ratios[0], '.2f')} of tokenizers'")
    console.print(f"x {_shown(ratios[1], '.2f')} of theirs without offsets")
    return {"tokenizer": {"mb_per_s": rate, "ratio_tokenizers": ratios[0], "ratio_tokenizers_fast": ratios[1]}}


def _texts(source: str, most: int) -> Iterator[str]:
    from khanhllm.data.readers import Reader
    from khanhllm.data.sources import locate

    for text in Reader(locate(source), []).all_texts():
        yield text
        most -= len(text)
        if most < 0:
            return


def _data(machine: Machine, wanted: MachineConfig, steps: int, console: Console) -> Report:
    """Measure rows of 2049 tokens from shards to batches on the device; and text to shards, next to bare tiktoken."""
    from khanhllm.data.batches import batches
    from khanhllm.data.prepare import prepare, train_on
    from khanhllm.data.shards import Shards

    tokens, rows, count = 2048, 8, 256
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_on("stdlib", 2048, TEXT)
        prepare("stdlib", tokenizer, Path(folder, "shards"), validation=0.01)
        stream = batches(Shards.open(Path(folder, "shards"), "train", tokens), rows, 0, 0, machine.device)
        next(stream)
        (seconds,) = _turns([lambda: list(islice(stream, count))], min(steps, 7), machine)
        stream.close()
    rate = spread([count * rows * tokens / one for one in seconds])
    console.print(f"data: {_shown(rate, ',.0f')} tokens/s from shards to the device")
    return {"data": {"tokens_per_s": rate} | _prepare(tokenizer, min(steps, 3), machine, console)}


def _prepare(tokenizer: Tokenizer, turns: int, machine: Machine, console: Console) -> Report:
    """Measure a folder of JSON lines to shards; tiktoken alone encodes the same texts with as many threads."""
    from khanhllm.data.prepare import prepare

    texts = list(_texts("stdlib", TEXT))
    copies = -(-PREPARED // sum(map(len, texts)))
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for nth in range(copies):
            lines = "".join(json.dumps({"text": f"{nth} {text}"}) + "\n" for text in texts)
            (corpus / f"{nth}.jsonl").write_text(lines, encoding="utf-8")
        many = [f"{nth} {text}" for nth in range(copies) for text in texts]

        def whole() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                prepare(str(corpus), tokenizer, Path(out, "shards"), validation=0.01)

        bare = partial(tokenizer.engine.encode_ordinary_batch, many, num_threads=cores())
        ours, theirs = _turns([whole, bare], turns, machine)
    size = sum(len(text.encode()) for text in many)
    speed, ratio = (
        spread([size / 1e6 / one for one in ours]),
        spread([b / a for a, b in zip(ours, theirs, strict=True)]),
    )
    console.print(f"text to shards: {_shown(speed, '.1f')} MB/s, x {_shown(ratio, '.2f')} of bare tiktoken")
    return {"prepare_mb_per_s": speed, "prepare_over_tiktoken": ratio}


PARTS: dict[str, Callable[[Machine, MachineConfig, int, Console], Report]] = {
    "step": _step,
    "moe": _moe,
    "decode": _decode,
    "tokenizer": _tokenizer,
    "data": _data,
}


def _turns(works: list[Callable[[], Any]], turns: int, machine: Machine) -> list[tuple[float, ...]]:
    """Seconds of each work in each turn, after one turn that warms up."""
    rows = []
    for _ in range(turns + 1):
        row = []
        for work in works:
            started = time.perf_counter()
            work()
            machine.wait()
            row.append(time.perf_counter() - started)
        rows.append(row)
    return list(zip(*rows[1:], strict=True))


def _shown(measured: Report | None, spec: str) -> str:
    if measured is None:
        return "–"
    return f"{measured['median']:{spec}} ({measured['least']:{spec}} to {measured['most']:{spec}})"
