"""Clean documents by an ordered list of published filters, such as "c4, language:en".

The rules and their thresholds are datatrove's. Three things differ, so that cleaning needs no network and reports what
it did. A few lines here find words and sentences, where datatrove loads spaCy. py3langid identifies languages, where
datatrove downloads a model. What each step removes is counted in documents and in bytes, since C4's rules shorten
documents too.

Left out: C4's list of bad words, which is a download. For steps that compare all documents with each other,
duplicates.py finds beforehand what to remove.
"""

import importlib
import importlib.util
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup.sentence_dedup import SentDedupConfig, SentenceDedupFilter
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.filters.c4_filters import C4ParagraphFilter, C4QualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from rich.table import Table

from khanhllm.data.shards import Cleaning, Removed, Tally
from khanhllm.errors import UserError
from khanhllm.explain import did_you_mean

KNOWN = ("c4", "paragraphs", "gopher", "gopher-quality", "gopher-repetition", "language:CODE", "spans", "minhash")
"""c4: lines and pages by the rules of Raffel et al. 2020, section 2.2. paragraphs: three of 200 characters, as in mC4
(Xue et al. 2021). gopher: both of Rae et al. 2021, A1.1. language: that of most of the text. spans: three sentences in
a row that occur elsewhere too, the last of C4's rules. minhash: near-duplicates"""
COMPARING = ("spans", "minhash")
"""steps that compare all documents with each other"""
SPANS = SentDedupConfig(hash_config=HashConfig(hash_fc="sha1"))  # the other hash needs one more dependency
GOPHER = ("gopher-quality", "gopher-repetition")
SURE = 0.65
"""least probability of the wanted language, as in datatrove"""
GLANCE = 10_000
"""characters of a document that decide its language"""

Removals = Mapping[str, Mapping[int, Sequence[int]]]
"""for each step of COMPARING: number of a document, among those that reach the step -> where its removed spans begin"""


class Words(WordTokenizer):  # type: ignore[misc]
    """Finds the words, signs and sentences of a text whose words are separated by spaces."""

    WORD = re.compile(r"\w+(?:['’]\w+)*|\.\.\.|[^\w\s]")
    END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")

    def word_tokenize(self, text: str) -> list[str]:
        return self.WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        ends = [match.end() for match in self.END.finditer(text)]
        if not ends or text[ends[-1] :].strip():
            ends.append(len(text))
        return list(zip([0, *ends], ends, strict=False))


WORDS = Words()


class Language(BaseFilter):  # type: ignore[misc]
    """Keeps the documents in one language."""

    def __init__(self, code: str) -> None:
        super().__init__()
        if not importlib.util.find_spec("py3langid"):
            raise UserError("clean: language needs py3langid, which is not installed: pip install 'khanhllm[clean]'")
        langid = importlib.import_module("py3langid.langid")
        self.identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
        self.code = code
        known = sorted(map(str, self.identifier.labels))
        if code not in known:
            raise UserError(f"clean: no language {code!r}; known: {' '.join(known)}")

    def filter(self, document: Document) -> bool:
        code, probability = self.identifier.classify(document.text[:GLANCE])
        return bool(code == self.code and probability >= SURE)


class Copies(BaseFilter):  # type: ignore[misc]
    """Removes documents by number, counted in the order in which they reach the filter."""

    def __init__(self, numbers: Collection[int]) -> None:
        super().__init__()
        self.numbers = numbers
        self.asked = 0

    def filter(self, document: Document) -> bool:
        self.asked += 1
        return self.asked - 1 not in self.numbers


class Spans(BaseFilter):  # type: ignore[misc]
    """Removes given spans, and then documents that are too short (datatrove: below 50 words or 3 sentences)."""

    def __init__(self, numbers: Mapping[int, Sequence[int]]) -> None:
        """numbers: number of a document, as it reaches the filter -> the sentences at which its spans begin."""
        super().__init__()
        self.numbers = numbers
        self.asked = 0
        self.remover = SentenceDedupFilter(".", SPANS, language=WORDS)

    def filter(self, document: Document) -> bool:
        begins = self.numbers.get(self.asked)
        self.asked += 1
        if begins is None:
            return True
        document.text, _ = self.remover.remove_dup_sentences(document, np.asarray(begins))
        return (
            len(WORDS.word_tokenize(document.text)) >= SPANS.min_doc_words
            and len(WORDS.sent_tokenize(document.text)) >= SPANS.min_num_sentences
        )


def steps_of(clean: str) -> tuple[str, ...]:
    """The names of the steps, in order. Raises UserError for one that is unknown or named twice."""
    words = [word for part in clean.split(",") if (word := "".join(part.split()).lower())]
    for word in words:
        if word not in KNOWN and not re.fullmatch(r"language:[a-z]{2,3}", word):
            guess = did_you_mean(word, list(KNOWN))
            raise UserError(f"clean: no step named {word!r}{guess}; known: {', '.join(KNOWN)}")
    steps = tuple(step for word in words for step in (GOPHER if word == "gopher" else (word,)))
    if len(set(steps)) < len(steps):
        raise UserError(f"clean: a step is named twice in {clean!r}; each can be taken once")
    return steps


def _filter(step: str, removals: Removals) -> BaseFilter:
    name, _, value = step.partition(":")
    if name == "language":
        return Language(value)
    if name == "spans":
        return Spans(removals.get(name, {}))
    if name == "minhash":
        return Copies(removals.get(name, {}))
    if name == "paragraphs":
        return C4ParagraphFilter()
    kinds = {"c4": C4QualityFilter, "gopher-quality": GopherQualityFilter, "gopher-repetition": GopherRepetitionFilter}
    return kinds[name](language=WORDS)


class Cleaner:
    """Applies the steps to documents and counts what each removes."""

    def __init__(self, clean: str, tally: Tally = (), removals: Removals = {}) -> None:  # noqa: B006, read only
        """tally: counts to continue from. removals: for each step of COMPARING, what it removes of these documents.

        Raises UserError for a step that is unknown or not installed.
        """
        self.filters = [_filter(step, removals) for step in steps_of(clean)]
        self.tally = tally or ((0, 0),) * (len(self.filters) + 1 if self.filters else 0)

    def clean(self, text: str) -> str:
        """The text as the steps leave it; empty if one of them removes it."""
        if not self.filters:
            return text
        document = Document(text=text, id="")
        size = len(text.encode())
        counts = [(1, size)]
        for step in self.filters:
            passes = size and get_filter_result(step.filter(document))[0] and document.text.strip()
            left = len(document.text.encode()) if passes else 0
            counts.append((int(left == 0 < size), size - left))
            size = left
        self.tally = added(self.tally, tuple(counts))
        return document.text if size else ""

    def run(self, texts: Iterable[str]) -> Iterator[tuple[str, Tally]]:
        """Yield what is left of each text, with the counts so far."""
        for text in texts:
            if cleaned := self.clean(text):
                yield cleaned, self.tally


def added(one: Tally, other: Tally) -> Tally:
    """The sum of two tallies; an empty one counts as zero."""
    return tuple((a + c, b + d) for (a, b), (c, d) in zip(one, other, strict=True)) if one and other else one or other


def cleaning_of(clean: str, tallies: Iterable[Tally]) -> Cleaning | None:
    """The counts as a manifest keeps them; None without any step."""
    steps = steps_of(clean)
    total: Tally = ()
    for tally in tallies:
        total = added(total, tally)
    if not steps:
        return None
    (documents, size), *removed = total or ((0, 0),) * (len(steps) + 1)
    lost = (Removed(step=step, documents=n, bytes=b) for step, (n, b) in zip(steps, removed, strict=True))
    return Cleaning(documents=documents, bytes=size, removed=tuple(lost))


def table(cleaning: Cleaning) -> Table:
    """A table of what was read, what each step removed, and what was kept."""
    shown = Table("cleaning", box=None, pad_edge=False, header_style="dim")
    for header in ("documents", "bytes", "of the bytes read"):
        shown.add_column(header, justify="right")

    def row(name: str, documents: int, size: int) -> None:
        shown.add_row(name, f"{documents:,}", f"{size:,}", f"{100 * size / max(cleaning.bytes, 1):.1f} %")

    row("read", cleaning.documents, cleaning.bytes)
    for lost in cleaning.removed:
        row(lost.step, -lost.documents, -lost.bytes)
    row("kept", *cleaning.kept)
    return shown
