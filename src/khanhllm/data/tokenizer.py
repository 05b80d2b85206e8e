"""Text to token ids and back: byte-level BPE.

Two libraries share the work. `tokenizers` learns the merges and defines the file format, so tokenizer.json loads in
transformers and other runtimes. `tiktoken` encodes: the same ids, several times faster. They agree because of two
facts that loading checks: the pre-tokenizing pattern is one that other runtimes know by name, and ids grow in the order
in which merges were learned, so "lowest id first" and "earliest merge first" are the same rule.

The pattern is GPT-2's, or for text with many combining marks that of Qwen 3.5, `qwen35` in llama.cpp. That keeps marks
with their letters, without which Hindi or Thai falls apart at every vowel sign (benchmarks/results/pretokenizers.json).
It also cuts numbers into digits, and the demo's model then learns Python's source far worse, so it is not for all.

Special tokens take the first ids. Text is always encoded as ordinary text: someone who writes <|endoftext|> into a
document gets the letters, never the token. Every byte is itself a token, so nothing is unknown and any bytes survive
the round trip.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
import tiktoken

from khanhllm.errors import UserError
from khanhllm.files import publish, read

END_OF_TEXT = "<|endoftext|>"
SPECIALS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
LARGEST = 2**28
"""largest tokenizer.json that is read (bytes)"""
SMALLEST = len(SPECIALS) + 256
"""tokens of a vocabulary without merges"""

QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""as tokenizer.json has it"""
# The same pieces for tiktoken, with possessive quantifiers: without backtracking.
PATTERNS = {
    "gpt-2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "qwen35": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?+[\p{L}\p{M}]++|\p{N}"""
    r"""| ?[^\s\p{L}\p{M}\p{N}]++[\r\n]*+|\s*[\r\n]+|\s++$|\s+(?!\S)|\s""",
}
"""by the names that llama.cpp gives them"""

# The one branch that still backtracks, `\s+(?!\S)`, overflows the regex engine's stack on a run of about a million
# blanks before a letter. Python also counts \x1c-\x1f as blank; the patterns do not. A run is looked at from its
# beginning alone, as the time would else grow with the square of its length.
_LONG = 100_000
_LONG_BLANK = re.compile(rf"(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{{{_LONG},}}")
_WORDS = re.compile(r"(?:\s+|\S{1,256}(?!\S))+|\S{256}")  # words, but no more than 256 characters of a longer one
_LOST_BYTES = re.compile("([\udc80-\udcff]+)")


def train_tokenizer(texts: Iterable[str], vocab_size: int, progress: bool = False) -> "Tokenizer":
    """Learn a vocabulary of `vocab_size` tokens, special ones included, from texts. The same texts give the same one.

    Too little text gives fewer tokens. `progress` draws a bar on stderr.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trained

    if vocab_size < SMALLEST:
        raise UserError(f"a byte-level vocabulary needs at least {SMALLEST} tokens, got vocab_size {vocab_size}")
    texts = iter(texts)
    first = list(islice(texts, 256))
    marked = _has_marks(first)
    learner = Trained(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not marked)
    if marked:
        split = pre_tokenizers.Split(Regex(QWEN35), "isolated")
        learner.pre_tokenizer = pre_tokenizers.Sequence([split, learner.pre_tokenizer])
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    learner.train_from_iterator(chain.from_iterable(map(_slices, chain(first, texts))), trainer)
    return Tokenizer(learner.to_str())


def _has_marks(texts: list[str]) -> bool:
    """Whether more than a hundredth of the characters are combining marks."""
    sample = "".join(text[:4000] for text in texts)
    return 100 * sum(category(char)[0] == "M" for char in sample) > len(sample)


def _slices(text: str, longest: int = 10_000) -> Iterator[str]:
    """Bounded slices with bounded words, because the trainer's time grows with the square of the longest piece."""
    for start in range(0, len(text), longest):
        yield from _WORDS.findall(text, start, min(start + longest, len(text)))


class Tokenizer:
    """A byte-level BPE tokenizer, made by `train_tokenizer` or `Tokenizer.load`."""

    def __init__(self, source: str, where: str = "tokenizer") -> None:
        """source: the text of a tokenizer.json. Raises UserError, naming `where`, if it is not a byte-level BPE."""
        try:
            layout = json.loads(source)
            self.pattern = self._pattern(layout)
            vocab: dict[str, int] = layout["model"]["vocab"]
            specials = {str(token["content"]): int(token["id"]) for token in layout["added_tokens"]}
            ranks = {_raw(piece): rank for piece, rank in vocab.items() if piece not in specials}
            self._check_order(layout["model"]["merges"], vocab, ranks, specials)
            # the same content is always written alike, so its hash identifies the tokenizer
            self.canonical = json.dumps(layout, ensure_ascii=False)
            self.sha256 = hashlib.sha256(self.canonical.encode()).hexdigest()
            names = {rank: name.encode() for name, rank in specials.items()}
            self._byte_ids = [ranks[bytes([byte])] for byte in range(256)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{where} is not a byte-level BPE tokenizer.json as `khanhllm tokenizer` writes it: {reason}"
            ) from None
        self.engine = tiktoken.Encoding(
            "khanhllm", pat_str=PATTERNS[self.pattern], mergeable_ranks=ranks, special_tokens=specials
        )
        by_rank = {rank: piece for piece, rank in ranks.items()} | names
        self._pieces = [by_rank[rank] for rank in range(len(by_rank))]
        self.special_ids = frozenset(names)
        """tokens that no text becomes"""
        self.vocab_size = len(self._pieces)
        self.specials = specials
        """their ids by name"""
        self.end_of_text = specials[END_OF_TEXT]
        self.ends = frozenset(specials[name] for name in SPECIALS if name in specials)
        """tokens with which a text or an answer is over; an imported tokenizer may have special ones in the midst"""

    @staticmethod
    def _pattern(layout: dict[str, Any]) -> str:
        """The name of the pre-tokenizing pattern. Raises ValueError for any other kind of tokenizer."""
        pre = layout["pre_tokenizer"] or {}
        steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
        if layout["model"]["type"] != "BPE" or steps[-1].get("type") != "ByteLevel" or layout.get("normalizer"):
            raise ValueError("it must be BPE, pre-tokenized by ByteLevel, without a normalizer")
        if steps[-1].get("add_prefix_space"):
            raise ValueError("ByteLevel must add no prefix space")
        if len(steps) == 1 and steps[0].get("use_regex", True):
            return "gpt-2"
        qwen35 = {"type": "Split", "pattern": {"Regex": QWEN35}, "behavior": "Isolated", "invert": False}
        if steps[:-1] == [qwen35] and not steps[-1].get("use_regex", True):
            return "qwen35"
        raise ValueError("it must split text by the pattern of GPT-2 or of Qwen 3.5")

    @staticmethod
    def _check_order(
        merges: list[Any], vocab: dict[str, int], ranks: dict[bytes, int], specials: dict[str, int]
    ) -> None:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
        learned = [vocab[left + right] for left, right in pairs]
        if learned != sorted(set(learned)) or len(learned) + 256 != len(ranks):
            raise ValueError("ids must grow in the order of the merges, on top of all 256 bytes")
        if any(type(rank) is not int for rank in vocab.values()):
            raise ValueError("ids must be whole numbers")
        if sorted([*ranks.values(), *specials.values()]) != list(range(len(ranks) + len(specials))):
            raise ValueError("ids must be 0, 1, 2 ... without gaps")
        if END_OF_TEXT not in specials:
            raise ValueError(f"{END_OF_TEXT} is missing")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json. Raises UserError if it is missing, damaged or not byte-level BPE."""
        try:
            return cls(read(path, LARGEST).decode(), str(path))
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a tokenizer.json (not UTF-8 text)") from None

    @classmethod
    def of_model(cls, path: Path, vocab_size: int, sha256: str) -> "Tokenizer":
        """Read the tokenizer of a model. Raises UserError if it is not the one that the model learned with. sha256:
        that one's; empty if it was not noted, as in old checkpoints."""
        tokenizer = cls.load(path)
        if tokenizer.vocab_size > vocab_size:
            raise UserError(f"{path} has {tokenizer.vocab_size} tokens, more than this model knows")
        if sha256 not in ("", tokenizer.sha256):
            raise UserError(f"{path} is not the tokenizer that the model learned with; bring that one back")
        return tokenizer

    def save(self, path: Path) -> None:
        """Write tokenizer.json to `path`, and beside it vocab.txt, one readable token a line."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            publish(path, self.canonical)
            publish(path.with_name("vocab.txt"), "".join(self._readable()))
        except OSError as error:
            raise UserError(f"cannot write the tokenizer {path}: {error.strerror}") from None

    def _readable(self) -> Iterator[str]:
        for rank, piece in enumerate(self._pieces):
            shown = piece.decode("utf-8", "backslashreplace")
            shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)
            yield f"{rank}\t{shown}\n" if rank in self.special_ids else f"{rank}\t'{shown}'\n"

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Number of bytes of text that each token stands for, 0 for special tokens; int32, (vocab_size,)."""
        sizes = [0 if rank in self.special_ids else len(piece) for rank, piece in enumerate(self._pieces)]
        return np.array(sizes, dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Nothing in it becomes a special token; a lone surrogate becomes U+FFFD."""
        return [rank for part in _digestible(text, self.pattern) for rank in self.engine.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """The ids of each text, as uint32 arrays: as `encode`, but faster. Encoding does not hold the GIL."""
        if threads == 1:
            return [self._encode_array(text) for text in texts]
        share = -(-len(texts) // (4 * threads)) or 1
        groups = [texts[start : start + share] for start in range(0, len(texts), share)]
        with ThreadPoolExecutor(threads) as pool:
            return list(chain.from_iterable(pool.map(self.encode_batch, groups)))

    def _encode_array(self, text: str) -> np.ndarray:
        try:
            parts = [
                self.engine.encode_to_numpy(part, disallowed_special=()) for part in _digestible(text, self.pattern)
            ]
        except UnicodeEncodeError:  # a lone surrogate, which only `encode` replaces
            return np.array(self.encode(text), dtype=np.uint32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes. Bytes that are not UTF-8 become one token each; `decode_bytes` restores them."""
        ids: list[int] = []
        for odd, part in enumerate(_LOST_BYTES.split(data.decode("utf-8", "surrogateescape"))):
            raw = part.encode("utf-8", "surrogateescape")
            ids += [self._byte_ids[byte] for byte in raw] if odd % 2 else self.encode(part)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind ids; special tokens appear by name. Raises UserError for an id beyond the vocabulary."""
        return b"".join(self._piece(int(rank)) for rank in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind ids; bytes that are no complete UTF-8 character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def _piece(self, rank: int) -> bytes:
        if not 0 <= rank < self.vocab_size:
            raise UserError(f"token {rank} is beyond the vocabulary of {self.vocab_size:,} tokens")
        return self._pieces[rank]


def check_fits(tokens: int, vocab_size: int, where: str) -> None:
    """Raise UserError if a model's vocabulary is smaller than that of the tokenizer in `where`."""
    if tokens > vocab_size:
        raise UserError(
            f"{where} has {tokens:,} tokens, more than model.vocab_size {vocab_size:,}; raise that to {tokens}"
        )


def _digestible(text: str, pattern: str) -> list[str]:
    """The text, cut in very long blanks, only where the pattern cuts too; see _LONG_BLANK.

    Both patterns cut before the last blank, unless the text ends there. Qwen's cuts after the last line break, and
    before the last blank only if that comes later.
    """
    if len(text) <= _LONG:
        return [text]
    cuts = {0, len(text)}
    for match in _LONG_BLANK.finditer(text):
        line = max(map(match[0].rfind, "\r\n")) + 1 if pattern == "qwen35" else 0
        cuts |= {match.start() + line} if line else set()
        cuts |= {match.end() - 1} if line < len(match[0]) and match.end() < len(text) else set()
    return [text[start:end] for start, end in pairwise(sorted(cuts))]


def _raw(piece: str) -> bytes:
    return bytes(_BYTE_OF[char] for char in piece)


def _stand_ins() -> dict[str, int]:
    """GPT-2's printable characters for the 256 bytes: printable Latin-1 stands for itself, the rest follow U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + nth): byte for nth, byte in enumerate(others)}


_BYTE_OF = _stand_ins()
