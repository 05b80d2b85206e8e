"""Score a run on the text that it held out, or on any other."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from khanhllm.data.chat import from_json
from khanhllm.data.render import blocks, cut
from khanhllm.data.shards import MANIFEST, Shards
from khanhllm.data.source_syntax import with_home
from khanhllm.errors import UserError
from khanhllm.files import there
from khanhllm.inference.score import Score
from khanhllm.runs.run import Run


def score_opened(opened: Run, source: str | None = None) -> Score:
    """Score a run on all that it held out, or on every byte of another source."""
    return opened.score_windows(held_out(opened).windows() if source is None else windows_of(source, opened))


def held_out(opened: Run) -> Shards:
    """The validation documents of a run. UserError if its shards are gone, or it has none yet."""
    if not opened.state["folder"]:
        raise UserError("this run has read no text yet; name one (--data)")
    if not there(opened.data / MANIFEST):
        raise UserError(
            f"the shards of this run, {opened.data}, are gone; name a text to score (--data), "
            "or train on with --resume, which makes them again"
        )
    return validation_of(opened.data, opened)


def windows_of(source: str, opened: Run) -> Iterator[np.ndarray]:
    """The text of any source as windows to score; of prepared shards, the validation split."""
    if shards := prepared(source, opened):
        yield from shards.windows()
        return
    from khanhllm.data.readers import Reader
    from khanhllm.data.sources import locate

    with TemporaryDirectory(prefix="khanhllm-") as spool:
        if (rows := conversations(source, opened, Path(spool))) is None:
            rows = windowed(Reader(locate(source), [], Path(spool)).all_texts(), opened)
        yield from rows


def windowed(texts: Iterable[str], opened: Run) -> Iterator[np.ndarray]:
    """Texts as windows of context + 1 ids, each text as training sees it: after an end-of-text. Only the last
    window may be shorter."""
    context, kept = opened.config.model.context, np.empty(0, np.int64)
    for text in texts:
        ids = [opened.tokenizer.end_of_text, *opened.tokenizer.encode(text)]
        kept = np.concatenate((kept, np.array(ids, np.int64)))
        while len(kept) > context:
            yield kept[: context + 1]
            kept = kept[context:]
    if len(kept) > 1:
        yield kept


def conversations(source: str, opened: Run, spool: Path | None = None) -> Iterator[np.ndarray] | None:
    """The conversations of a source as rows; None if it holds texts, or the run does not talk. spool: where what was
    downloaded to see that stays, for another reader."""
    from khanhllm.data.readers import Reader, holds_conversations
    from khanhllm.data.sources import components, locate

    if not opened.talks or len(components(source)) > 1:
        return None
    place, context, end = locate(source), opened.config.model.context, opened.tokenizer.end_of_text
    if not holds_conversations(place, spool):
        return None
    reader = Reader(replace(place, laid_for=context), [], spool)
    found = (cut(from_json(text), opened.tokenizer, context)[0] for text in reader.all_texts())
    return (np.append(block, end).astype(np.int64) for block in blocks(filter(len, found), context, end))


def prepared(source: str, opened: Run) -> Shards | None:
    """The validation split of a source that is a folder of prepared shards; None of any other."""
    folder = with_home(source)
    return validation_of(folder, opened) if there(folder / MANIFEST) else None


def validation_of(folder: Path, opened: Run) -> Shards:
    """The validation split of prepared shards. UserError if they have another tokenizer than the run."""
    shards = Shards.open(folder, "validation", opened.config.model.context)
    if (shards.manifest.tokenizer, shards.vocab_size) != (opened.tokenizer.sha256, opened.tokenizer.vocab_size):
        raise UserError(f"{folder} was prepared with another tokenizer than the run's; score its text instead (--data)")
    return shards
