"""Laws of web archives: the text of every page comes through, nothing else does, a broken record is named."""

import gzip
import io

import pytest
from test_readers import complaint, read

from khanhllm.data import warc as module
from khanhllm.data.sources import locate
from khanhllm.errors import UserError

warcio = pytest.importorskip("warcio.warcwriter")
pytest.importorskip("resiliparse")
from warcio.statusandheaders import StatusAndHeaders  # noqa: E402

SENTENCE = "Der alte Kapitän sah über den Hafen und dachte an das Café am anderen Ufer. "
RUSSIAN = "Старый капитан смотрел на гавань и думал о кафе на том берегу. " * 5 + "Да."
HTML = (
    "<html><head><title>{0}</title></head><body><nav>Home | Menu</nav><p>{0}</p><script>code()</script></body></html>"
)


def archive(*records, gzipped=False):
    """Each record: the type, the media type, and the bytes."""
    out = io.BytesIO()
    writer = warcio.WARCWriter(out, gzip=gzipped)
    for form, media, content in records:
        http = StatusAndHeaders("200 OK", [("Content-Type", media)], protocol="HTTP/1.1")
        writer.write_record(
            writer.create_warc_record(
                "http://a.b/c",
                form,
                payload=io.BytesIO(content),
                http_headers=http if form == "response" else None,
                warc_content_type=media if form == "conversion" else "",
            )
        )
    return out.getvalue()


def page(number):
    return f"Seite {number}. " + SENTENCE * 5


RECORDS = [
    ("warcinfo", "application/warc-fields", b"software: test"),
    ("request", "text/plain", b"GET / HTTP/1.1\r\n\r\n"),
    ("response", "text/html; charset=utf-8", HTML.format(page(1)).encode()),
    ("response", "text/html; charset=ISO-8859-1", HTML.format(page(2)).encode("latin-1")),
    ("response", "image/png", b"\x89PNG" * 100),
    ("response", "text/html", HTML.format(RUSSIAN).replace("<head>", "<head><meta charset=cp1251>").encode("cp1251")),
    ("response", "text/plain", page(4).encode()),
    ("metadata", "text/plain", b"fetchTimeMs: 3"),
]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_pages_come_through_without_menus_in_any_encoding(tmp_path, name):
    (tmp_path / name).write_bytes(archive(*RECORDS, gzipped=name.endswith(".gz")))
    assert locate(str(tmp_path)).files == (name,)
    assert [text.strip() for text in read(tmp_path / name)] == [
        page(1).strip(),
        page(2).strip(),
        RUSSIAN,
        page(4).strip(),
    ]


@pytest.mark.parametrize("name", ["a.warc.wet.gz", "a.wet"])
def test_wet_is_taken_as_it_is(tmp_path, name):
    records = [("conversion", "text/plain", page(number).encode()) for number in range(20)]
    (tmp_path / name).write_bytes(archive(*records, gzipped=name.endswith(".gz")))
    assert read(tmp_path / name) == [page(number) for number in range(20)]


def test_a_short_page_is_taken_whole(tmp_path):
    (tmp_path / "a.warc").write_bytes(archive(("response", "text/html", HTML.format("Kurz.").encode())))
    assert "Kurz." in read(tmp_path / "a.warc")[0]


def test_what_is_broken_is_one_line_with_the_number_of_the_record(tmp_path):
    path = tmp_path / "a.warc"
    whole = archive(*RECORDS)
    for cut, number in ((6, 8), (30, 8), (200, 8), (450, 7), (1000, 7)):
        path.write_bytes(whole[:-cut])
        assert f"a.warc, record {number} is damaged" in complaint(path)
    path.write_bytes(whole.replace(b"Seite 1. ", b"", 1))
    assert "a.warc, record 3 is damaged" in complaint(path)
    path.write_bytes(b"\n".join([b"no archive at all"] * 9))
    assert "a.warc, record 1 is damaged" in complaint(path)
    packed = tmp_path / "a.warc.gz"
    packed.write_bytes(archive(*RECORDS, gzipped=True)[:-30])
    assert "a.warc.gz is cut short" in complaint(packed)
    packed.write_bytes(gzip.compress(whole))  # one member for all; others refuse it, but nothing is wrong with it
    assert len(read(packed)) == 4


def test_without_the_libraries_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.warc").write_bytes(archive(*RECORDS))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"to read .*a\.warc, install .* pip install 'khanhllm\[web\]'"):
        read(tmp_path / "a.warc")
