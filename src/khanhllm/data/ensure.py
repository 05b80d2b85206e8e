"""Find or make the shards of a run. Opening prepared shards needs only NumPy; imports for making them come later."""

from pathlib import Path

from khanhllm.data.shards import MANIFEST, Manifest, too_short
from khanhllm.data.source_syntax import with_home
from khanhllm.data.tokenizer import Tokenizer, check_fits
from khanhllm.errors import UserError
from khanhllm.files import there
from khanhllm.schema import DataConfig


def check_rows_fit(source: str, shard_tokens: int, context: int) -> None:
    """Raise UserError if the shards of a mixture, which has no end, might be too short for even one row."""
    if shard_tokens > context or there(with_home(source) / MANIFEST):
        return
    from khanhllm.data.sources import components

    if len(components(source)) > 1:
        raise UserError(too_short(shard_tokens, context))


def ensure(data: DataConfig, vocab_size: int, tokens_needed: int, laid_for: int = 0) -> Path:
    """The folder of shards for a run: the given one, one from the cache, or a new one.

    vocab_size: of the model, no less than the tokenizer's. tokens_needed: training tokens of the run. A source that is
    remote, a mixture or large gets a belt, whose shards are made while the model trains. laid_for: above 0, it holds
    conversations, which lie in rows of so many tokens. Raises UserError.
    """
    folder = with_home(data.source)
    if not there(folder / MANIFEST):
        from khanhllm.data.prepare import from_cache

        folder = from_cache(data, vocab_size, tokens_needed, laid_for)
    elif data.clean:
        from khanhllm.data.clean import steps_of

        steps, made = ", ".join(steps_of(data.clean)), Manifest.read(folder).cleaned_by
        if steps and steps != made:
            raise UserError(f"{folder} was prepared with cleaning by {made or 'nothing'}; leave out data.clean {steps}")
    manifest = Manifest.read(folder)
    if manifest.laid and manifest.laid.context != laid_for:
        needs = f"rows of {laid_for:,} (model.context)" if laid_for else "train.targets = answers"
        raise UserError(f"{folder} holds {manifest.laid.describe()}; this run needs {needs}")
    check_fits(manifest.vocab_size, vocab_size, str(folder))
    for path in (folder / "tokenizer.json", *([with_home(data.tokenizer)] if data.tokenizer else [])):
        tokenizer = Tokenizer.load(path)
        if (tokenizer.sha256, tokenizer.vocab_size) != (manifest.tokenizer, manifest.vocab_size):
            raise UserError(f"the tokenizer {path} does not match the shards in {folder}; prepare them again with it")
    return folder
