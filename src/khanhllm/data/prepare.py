"""Prepare token shards from documents, once for any number of runs.

A datatrove pipeline reads and writes groups of files that the source alone decides, so the shards are the same bytes
whatever the number of workers and of tasks, and wherever they run (executors.py). A hash of its text decides whether a
document is held out for validation: two copies of a text are always in the same split, and adding files moves no
document, unless it changes where plain text is cut: into 64ths of a source between 128 KiB and 64 MiB. The file alone
cannot decide that, as a short text must fall into pieces where it is all there is, and stay whole among many.

If a run needs only some tokens, tasks run in waves until a prefix of them holds enough. Results beyond the prefix are
dropped, so again the number of workers does not matter. Everything is written aside and published by one rename: a
folder of shards is complete or absent. The same call continues after an interruption.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout

from khanhllm.data.belt_notes import spool
from khanhllm.data.belt_setup import KEPT, check_names, create_belt
from khanhllm.data.cache import folder_of
from khanhllm.data.clean import COMPARING, Cleaner, cleaning_of, steps_of, table
from khanhllm.data.executors import Execution, Job, Unfinished, console, say
from khanhllm.data.fetch import NotItsFault
from khanhllm.data.readers import Reader, for_conversations
from khanhllm.data.shards import MANIFEST, VERSION, Laid, Manifest, dtype_for
from khanhllm.data.source_syntax import with_home
from khanhllm.data.sources import Source, components, in_words, is_remote, locate
from khanhllm.data.tokenizer import Tokenizer, check_fits, train_tokenizer
from khanhllm.data.writer import HASHES, Report, no_text, share_note, text_hash
from khanhllm.errors import UserError
from khanhllm.files import locked, read, there
from khanhllm.schema import DataConfig
from khanhllm.units import as_size

MADE_FROM = "made-from.json"
"""in a folder of shards: the text and settings they were made of, so that the same call finds its work done"""
WHOLE = 2**28
"""local text up to this size (bytes) is prepared whole, whatever the run needs, so that the next run finds it"""
LEAST_SAMPLE = 2**24
"""least text for a tokenizer, however short the run (bytes)"""
SPREAD = 16
"""least number of files that the tokenizer's sample is spread over"""


def prepare(
    source: str,
    tokenizer: Tokenizer,
    out: Path,
    *,
    validation: float,
    tokens: int = 0,
    workers: int = 0,
    execution: Execution | None = None,
    clean: str = "",
    bad: Literal["refuse", "skip"] = "refuse",
    laid_for: int = 0,
) -> Manifest | None:
    """Write the shards of a source into the new folder `out`.

    validation: share of documents held out, in (0, 1). tokens: training tokens after which reading stops, 0 reads all.
    workers: processes, 0 means one for each core. execution: where the tasks run, instead of `workers` processes here.
    clean: steps between reading and tokens (clean.py). bad: what to do with files that cannot be read, as data.bad.
    laid_for: above 0, the source holds conversations, to be packed into rows of so many tokens.

    Returns None while a cluster is still working. Raises UserError for anything wrong with the source, and if `out`
    exists or cannot be written; if it was prepared from the same, there is nothing to do. After an error or an
    interruption the finished groups stay aside, and the same call continues from there.
    """
    execution = execution or Execution(workers=workers)
    execution.check(tokens)
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken and not (out / MADE_FROM).exists():
        raise UserError(f"{out} exists already; remove it or choose another folder")
    if len(components(source)) > 1:
        raise UserError(f"{source} is a mixture, which is made while training; give it to khanhllm train --data")
    located = locate(source, bad)
    if laid_for:
        located = for_conversations(located, laid_for, tokenizer, clean)
    _say_left_out(located)
    steps = ", ".join(steps_of(clean))
    Cleaner(steps)  # raises now, not in an hour, if something is not installed
    if (compares := _comparing(steps)) and is_remote(source):
        raise UserError(f"{compares} reads the text twice; download {source} and prepare the files")
    started = time.monotonic()
    recipe: list[Any] = [VERSION, located.name, located.fingerprint, tokenizer.sha256, validation, tokens]
    recipe += [steps] * bool(steps) + [bad] * (bad == "skip") + [["conversations", laid_for]] * bool(laid_for)
    if taken:
        if read(out / MADE_FROM) != json.dumps(recipe).encode():
            raise UserError(f"{out} was prepared from other text or otherwise; remove it or choose another folder")
        say(f"{out} is prepared already, from the same text")
        return Manifest.read(out)
    with _resumable(out, json.dumps(recipe)) as partial:
        job = Job(located, tokenizer, partial, tokens, execution, steps)
        try:
            manifest = _manifest(located, tokenizer, validation, job.split(validation), steps)
        except Unfinished as so_far:
            say(str(so_far))
            return None
        (job.shards / MADE_FROM).write_text(json.dumps(recipe), encoding="utf-8")
        (job.shards / MANIFEST).write_text(manifest.model_dump_json(indent=1, exclude_none=True), encoding="utf-8")
        job.shards.rename(out)
    shutil.rmtree(partial, ignore_errors=True)
    _report(manifest, out, time.monotonic() - started)
    return manifest


def _report(manifest: Manifest, out: Path, seconds: float) -> None:
    """Say what was prepared, and what of it the user may not expect."""
    say(
        f"prepared {manifest.train_tokens:,} training and {manifest.validation_tokens:,} validation tokens of "
        f"{sum(shard.documents for shard in manifest.shards):,} documents in {seconds:.0f} s: {out}"
    )
    _say_lost(manifest)
    held = sum(shard.bytes for shard in manifest.of("validation"))
    total = sum(shard.bytes for shard in manifest.shards)
    if note := share_note(held, total, manifest.validation, sum(shard.documents for shard in manifest.shards)):
        say(note)
    if manifest.cleaning:
        console().print(table(manifest.cleaning))


@contextmanager
def _resumable(out: Path, recipe: str) -> Iterator[Path]:
    """A folder beside `out` with the finished groups of this recipe; those of another recipe are removed."""
    partial = out.absolute().parent / f".{out.name}.partial"
    written = partial / "recipe.json"
    try:
        if out.exists() and out.samefile(Path.cwd()):
            raise UserError(f"{out} is the folder that this command runs in; name a new one in it, as in --out shards")
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial / "lock"):
            if out.exists():  # and is empty; Windows would not replace it in the end
                out.rmdir()
            if not written.exists() or written.read_text(encoding="utf-8") != recipe:
                for old in partial.iterdir():
                    if old.is_dir():
                        shutil.rmtree(old)
                written.write_text(recipe, encoding="utf-8")
            yield partial
    except Timeout:
        raise UserError(f"another process is preparing {out}") from None
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A folder beside `out`, for the caller to rename to it when it is complete. After an interruption, or where the
    network was lost, it stays, so that the next call finds what it has downloaded."""
    new = out.with_name(f".{out.name}.new")
    try:
        new.mkdir(parents=True, exist_ok=True)
        yield new
    except NotItsFault:
        raise
    except Exception as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {out}: {error.strerror or error}") from None
        raise


def _say_lost(manifest: Manifest) -> None:
    if manifest.laid:
        say(manifest.laid.describe())
    _say_skipped(manifest.source, manifest.skipped)


def _say_skipped(name: str, skipped: Mapping[str, int] | None) -> None:
    if skipped:
        say(f"skipped, from where they cannot be read (data.bad = skip), in {name}: {in_words(skipped.items())}")


def _manifest(source: Source, tokenizer: Tokenizer, validation: float, reports: list[Report], clean: str) -> Manifest:
    return Manifest(
        version=VERSION,
        source=source.name,
        tokenizer=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype_for(tokenizer.vocab_size),
        validation=validation,
        train_tokens=sum(report.count("train") for report in reports),
        validation_tokens=sum(report.count("validation") for report in reports),
        shards=tuple(shard for report in reports for shard in report.shards),
        cleaning=cleaning_of(clean, (report.tally for report in reports)),
        skipped=sum((Counter(report.skipped) for report in reports), Counter()) or None,
        laid=sum((report.laid for report in reports if report.laid), Laid(context=source.laid_for))
        if source.laid_for
        else None,
    )


def train_on(
    source: str,
    vocab_size: int,
    sample_bytes: int,
    validation: float = 0.01,
    belt: Path | None = None,
    patience: float = 600.0,
    clean: str = "",
    bad: Literal["refuse", "skip"] = "refuse",
) -> Tokenizer:
    """Train a tokenizer on at most `sample_bytes` of the source's training documents, spread over its files.

    Each component of a mixture gives its share. The documents are cleaned first, except by steps that compare all of
    them. belt: folder of a future belt, which keeps the downloads. patience: seconds without any answer from the
    network.

    Memory does not grow with the source. Raises UserError for anything wrong with the source.
    """
    shares = [(locate(name, bad), int(weight * sample_bytes)) for name, weight in components(source)]
    amount = sum(min(located.size or share, share) for located, share in shares)
    say(f"training a tokenizer of {vocab_size:,} tokens on {as_size(amount)} of {source} (at most; a sample is enough)")
    started = time.monotonic()
    readers = [
        Reader(located, [], spool(belt, nth) if belt else None, patience, KEPT)
        for nth, (located, _) in enumerate(shares)
    ]
    samples = chain.from_iterable(
        _sample(reader, share, validation, clean) for reader, (_, share) in zip(readers, shares, strict=True)
    )
    tokenizer = train_tokenizer(samples, vocab_size, progress=console().is_terminal)
    fewer = f" of the {vocab_size:,} asked for: the text gives no more" if tokenizer.vocab_size < vocab_size else ""
    say(f"trained the tokenizer in {time.monotonic() - started:.0f} s: {tokenizer.vocab_size:,} tokens{fewer}")
    for reader in readers:
        _say_skipped(reader.source.name, reader.skipped)
    return tokenizer


def _sample(reader: Reader, most: int, validation: float, clean: str) -> Iterator[str]:
    """Training documents from the beginning of each file, at most a share from each."""
    source, cleaner = reader.source, Cleaner(clean)
    # download no more files of a distant source than the sample needs
    share = most if is_remote(source.root) else max(most // min(SPREAD, len(source.files)), 1)
    empty = True
    for name in source.files:
        room = min(share, most)
        for text, _ in cleaner.run(document.text for document in reader.read_file(name)):
            empty = False
            raw = text.encode()
            if text_hash(raw) >= int(validation * HASHES):
                raw = raw[:room]
                yield raw.decode(errors="ignore")
                room -= len(raw)
                most -= len(raw)
            if room <= 0:
                break
        if most <= 0:
            break
    if empty:
        raise no_text(source.name, clean, bool(reader.skipped))


def from_cache(data: DataConfig, vocab_size: int, tokens_needed: int, laid_for: int = 0) -> Path:
    """The folder of shards of a source of text: one from the cache, or a new one. See `ensure`."""
    if laid_for:
        return _conversations_from_cache(data, vocab_size, laid_for)
    steps = ", ".join(steps_of(data.clean))
    # a remote source keeps its name for now, so that an existing belt is found without a network
    parts = [(name if is_remote(name) else locate(name, data.bad), weight) for name, weight in components(data.source)]
    fingerprints = [part if isinstance(part, str) else part.fingerprint for part, _ in parts]
    (first, _), *others = parts
    whole = not others and isinstance(first, Source) and first.size <= WHOLE
    given = Tokenizer.load(with_home(data.tokenizer)) if data.tokenizer else None
    recipe: list[Any] = [VERSION, fingerprints[0] if whole else fingerprints, data.validation, data.tokens]
    sample = data.tokenizer_sample if whole else _sample_for(data, tokens_needed)
    recipe += [given.sha256] if given else [vocab_size, data.tokenizer_sample]
    recipe += [steps] * bool(steps) + [data.bad] * (data.bad == "skip")
    recipe += [] if whole else [data.shard_tokens, [weight for _, weight in parts]]
    if not given and not data.tokens and sample < data.tokenizer_sample:  # else the recipe decides it already
        recipe += [["sample", sample]]
    if (compares := _comparing(steps)) and not whole:
        raise UserError(
            f"{compares} compares all documents with each other, but {data.source} becomes shards while the model "
            "trains; download it, khanhllm prepare --clean it, and train on that"
        )
    folder = folder_of(data, recipe)
    if given:
        check_fits(given.vocab_size, vocab_size, data.tokenizer)
    if there(folder / MANIFEST):
        for part, _ in parts:
            _say_left_out(part)
        _say_lost(Manifest.read(folder))
    else:
        _make(folder, data, [] if whole else parts, given, vocab_size, sample)
    return folder


def _conversations_from_cache(data: DataConfig, vocab_size: int, laid_for: int) -> Path:
    """As `from_cache`, for a source of conversations, which is always prepared whole, and with a given tokenizer."""
    if not data.tokenizer:
        raise UserError("conversations need a tokenizer that is there already (data.tokenizer); khanhllm tune has one")
    if len(components(data.source)) > 1:
        raise UserError(
            f"{data.source} is a mixture; conversations come from one source: a file, a folder or a pattern"
        )
    tokenizer, located = Tokenizer.load(with_home(data.tokenizer)), locate(data.source, data.bad)
    check_fits(tokenizer.vocab_size, vocab_size, data.tokenizer)
    recipe = [VERSION, located.fingerprint, data.validation, data.tokens, tokenizer.sha256, data.bad, laid_for]
    recipe += [data.clean] * bool(data.clean)  # `prepare` refuses it, but not what lies here already
    folder = folder_of(data, recipe)
    if there(folder / MANIFEST):
        _say_left_out(for_conversations(located, laid_for, tokenizer, ""))
        _say_lost(Manifest.read(folder))
        return folder
    with _alone(folder):
        if not there(folder / MANIFEST):
            _prepare_as(data, tokenizer, folder, laid_for)
    return folder


def _prepare_as(data: DataConfig, tokenizer: Tokenizer, folder: Path, laid_for: int = 0) -> None:
    """`prepare` as the config says."""
    prepare(
        data.source,
        tokenizer,
        folder,
        validation=data.validation,
        tokens=data.tokens,
        execution=Execution(workers=data.workers, patience=data.patience),
        clean=data.clean,
        bad=data.bad,
        laid_for=laid_for,
    )


def _sample_for(data: DataConfig, tokens_needed: int) -> int:
    """Text for the tokenizer of a belt (bytes). A short run must not read a long sample: no vocabulary averages more
    than 8 bytes a token."""
    return min(data.tokenizer_sample, max(8 * (data.tokens or tokens_needed), LEAST_SAMPLE))


def _make(
    folder: Path,
    data: DataConfig,
    parts: list[tuple[str | Source, float]],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    sample: int,
) -> None:
    """Make the folder: a belt from `parts`, or shards of the whole source if there are none. sample: text for a
    tokenizer (bytes)."""
    with _alone(folder):
        if there(folder / MANIFEST):
            return
        cleaned: dict[str, Any] = {"clean": data.clean, "bad": data.bad}
        if not parts:
            tokenizer = tokenizer or train_on(data.source, vocab_size, sample, data.validation, **cleaned)
            _prepare_as(data, tokenizer, folder)
            return
        sources = [(locate(part, data.bad) if isinstance(part, str) else part, weight) for part, weight in parts]
        for located, _ in sources:
            check_names(located)
            _say_left_out(located)
        with aside(folder) as new:
            share, size, patience = data.validation, data.shard_tokens, data.patience
            tokenizer = tokenizer or train_on(data.source, vocab_size, sample, share, new, patience, **cleaned)
            create_belt(new, data.source, sources, tokenizer, share, size, data.tokens, patience, data.clean)
            new.rename(folder)


def _say_left_out(source: str | Source) -> None:
    if isinstance(source, Source) and (line := source.left_out_line()):
        say(line)


def _comparing(steps: str) -> str:
    """The first of the steps that compare all documents; "" if there is none."""
    return next((step for step in steps_of(steps) if step in COMPARING), "")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within this context, only this process prepares the folder; others wait, and then find it done."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = ExitStack()
        line = f"another process is preparing {folder}; waiting for it"
        held.enter_context(locked(folder.parent / f".{folder.name}.lock", lambda: say(line)))
    except OSError as error:
        raise UserError(f"cannot write {folder.parent} (data.cache): {error.strerror}") from None
    with held:
        yield
