"""Read texts from web archives: WARC, as crawlers write it, and WET, the plain text that Common Crawl makes of it.

Of a WARC, only server responses that hold HTML or plain text count. warcio reads the records. Resiliparse (Bevendorff
et al. 2018), which DCLM uses too, finds the encoding of a page and its main content, without menus and footers.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from khanhllm.errors import UserError

HTML = ("text/html", "application/xhtml+xml")
LEAST_CONTENT = 200
"""characters; below this the extraction has probably missed the main content, and the whole page is taken"""


def pages(raw: Any, where: str) -> Iterator[str]:
    """The texts of an unpacked archive, in order. Raises UserError that gives the number of a broken record.

    raw: an open file of bytes.
    """
    if not (importlib.util.find_spec("warcio") and can_read_pages()):
        raise UserError(f"to read {where}, install warcio and Resiliparse: pip install 'khanhllm[web]'")
    iterator = importlib.import_module("warcio.archiveiterator").ArchiveIterator
    records = type("Quiet", (iterator,), {"INC_RECORD": ""})(raw)  # else warcio prints a line
    number = 1
    try:
        for record in records:
            wanted = _type(record)
            content = record.content_stream().read() if wanted else b""
            records.read_to_end()
            if getattr(record.raw_stream, "limit", 1) or records.err_count:
                raise ValueError("its length is not what it says")
            if wanted:
                yield _text(content, wanted, record)
            number += 1
        raw.read(1)  # warcio takes any EOFError for the end of the file; a cut gzip raises it again here
        if records.next_line:
            raise ValueError("its header is cut short")
    except (EOFError, OSError):
        raise  # the file is damaged, not the record
    except Exception as error:
        why = " ".join(str(error).split())[:80]
        raise UserError(f"{where}, record {number} is damaged: {why}; copy or download the file again") from None


def can_read_pages() -> bool:
    """Whether the library that reads pages is installed."""
    return importlib.util.find_spec("resiliparse") is not None


def page(content: bytes) -> str:
    """The main text of one page."""
    return _readable(content, "utf-8", HTML[0])


def _type(record: Any) -> str:
    """The media type of a record that is a text, else ""."""
    if record.rec_type == "conversion":
        header = record.rec_headers.get_header("Content-Type")
    elif record.rec_type == "response" and record.http_headers:
        header = record.http_headers.get_header("Content-Type")
    else:
        return ""
    form = (header or "").partition(";")[0].strip().lower()
    return form if form in (*HTML, "text/plain") else ""


def _text(content: bytes, form: str, record: Any) -> str:
    declared = "" if record.rec_type == "conversion" else record.http_headers.get_header("Content-Type")
    charset = declared.lower().partition("charset=")[2].strip(" \"';") or "utf-8"
    return _readable(content, charset, form)


def _readable(content: bytes, charset: str, form: str) -> str:
    encoding = importlib.import_module("resiliparse.parse.encoding")
    try:
        text = content.decode(charset)
    except (ValueError, LookupError):
        text = encoding.bytes_to_str(content, encoding.detect_encoding(content, from_html_meta=form in HTML))
    if form == "text/plain":
        return text
    extract = importlib.import_module("resiliparse.extract.html2text").extract_plain_text
    main = extract(text, main_content=True, alt_texts=False)
    return main if len(main) >= LEAST_CONTENT else extract(text, alt_texts=False)
