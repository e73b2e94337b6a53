"""HTML and WARC: the main text of pages comes out with its position, all else is left out or named."""

import gzip
import io
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import brotli
import pytest
from fastwarc.stream_io import GzipWriter
from fastwarc.warc import WarcRecord, WarcRecordType
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus.finding import find_files
from megagpt.corpus.records import BadRecord, Document
from megagpt.errors import UserError
from tests.unit.corpus.test_columnar import outcomes
from tests.unit.corpus.test_compression import compress
from tests.unit.corpus.test_reading import read, texts

PAGE = """<html><head><title>Title</title><style>p {{ color: red }}</style></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About</a></li></ul></nav>
<main><h1>Heading</h1><p>{}</p><img src="x.png" alt="a picture"></main>
<footer><a href="/imprint">Imprint</a></footer><script>var x = 1;</script></body></html>"""
WORDS = st.lists(st.text("abcdefghij", min_size=1, max_size=8), min_size=1, max_size=20).map(" ".join)


def page(text: str) -> bytes:
    return PAGE.format(text).encode()


def page_text(text: str) -> str:
    return f"Heading\n\n{text}"


def response(
    body: bytes, status: str = "200 OK", content_type: str = "text/html; charset=utf-8", more: str = ""
) -> bytes:
    """An HTTP response; `more` is header lines."""
    return f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{more}\r\n".encode() + body


def warc_record(block: bytes, record_type: WarcRecordType = WarcRecordType.response) -> bytes:
    """One record, uncompressed."""
    record = WarcRecord()
    record.init_headers(record_type, record_urn=b"urn:uuid:1")
    record.is_http = record_type in (WarcRecordType.response, WarcRecordType.request)
    record.set_bytes_content(block)
    stream = io.BytesIO()
    record.write(stream)
    return stream.getvalue()


def archive(count: int) -> tuple[bytes, list[int], list[str]]:
    """An archive of pages among other records, the positions of the pages, and their texts."""
    content = warc_record(b"software: test\r\n", WarcRecordType.warcinfo)
    positions, expected = [], []
    for number in range(count):
        content += warc_record(b"GET / HTTP/1.1\r\n\r\n", WarcRecordType.request)
        positions.append(len(content))
        expected.append(page_text(f"The page of number {number}."))
        content += warc_record(response(page(f"The page of number {number}.")))
        content += warc_record(response(page("Not found."), status="404 Not Found"))
        content += warc_record(response(b"\x89PNG\0", content_type="image/png"))
        content += warc_record(response(b"body {}", content_type="text/css"))
        content += warc_record(b"fetchTimeMs: 5\r\n", WarcRecordType.metadata)
    return content, positions, expected


@settings(max_examples=50, deadline=None)
@given(WORDS)
def test_of_a_page_the_main_content_stays_without_menus_scripts_and_footers(
    tmp_path_factory: pytest.TempPathFactory, words: str
) -> None:
    path = tmp_path_factory.mktemp("html") / "a.html"
    path.write_bytes(page(words))
    assert outcomes(read(path)) == [(0, page_text(words))]


@pytest.mark.parametrize("name", ["a.html", "a.HTM", "a.xhtml", "a.html.gz", "a.html.xz"])
def test_html_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    content = page("Text of the page.")
    suffix = Path(name).suffix
    (tmp_path / name).write_bytes(compress(content, suffix) if suffix in (".gz", ".xz") else content)
    assert texts(read(tmp_path / name)) == [page_text("Text of the page.")]


@pytest.mark.parametrize(
    ("text", "encoding", "head"),
    [
        ("Ein Café für Müßiggänger", "utf-8", ""),
        ("Ein Café für Müßiggänger", "utf-8", '<meta charset="iso-8859-1">'),  # wrong, as often
        ("Ein Café für Müßiggänger", "utf-8-sig", ""),
        ("Ein Café für Müßiggänger", "iso-8859-1", '<meta charset="iso-8859-1">'),
        ("Ein Café für Müßiggänger", "utf-16", ""),
        ("日本語の文章です", "shift_jis", '<meta http-equiv="Content-Type" content="text/html; charset=Shift_JIS">'),
        ("日本語の文章です", "iso2022_jp", '<meta charset="iso-2022-jp">'),
    ],
)
def test_pages_are_decoded_as_they_are_encoded(tmp_path: Path, text: str, encoding: str, head: str) -> None:
    (tmp_path / "a.html").write_bytes(
        f"<html><head>{head}</head><body><main><p>{text}</p></main></body>".encode(encoding)
    )
    assert texts(read(tmp_path)) == [text]


def test_the_charset_of_the_http_header_counts(tmp_path: Path) -> None:
    body = "<main><p>Dağda ışık</p></main>".encode("windows-1254")  # looks like Western European
    (tmp_path / "a.warc").write_bytes(warc_record(response(body, content_type="text/html; charset=windows-1254")))
    assert texts(read(tmp_path)) == ["Dağda ışık"]


def test_a_page_without_text_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(b"<html><body><script>var x = 1;</script></body></html>")
    assert outcomes(read(tmp_path)) == [(0, "empty")]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_an_archive_gives_its_pages_with_their_offsets_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    content, positions, expected = archive(20)
    (tmp_path / f"a.warc{suffix}").write_bytes(compress(content, suffix) if suffix else content)
    assert outcomes(read(tmp_path, chunk_bytes=100)) == list(zip(positions, expected, strict=True))


def test_an_archive_of_a_gzip_member_for_each_record_is_read_as_crawlers_write_it(tmp_path: Path) -> None:
    content = b""
    for number in range(5):
        stream = io.BytesIO()
        writer = GzipWriter(stream)
        writer.write(warc_record(response(page(f"Page {number}."))))
        writer.close()
        content += stream.getvalue()
    (tmp_path / "a.warc.gz").write_bytes(content)
    assert texts(read(tmp_path)) == [page_text(f"Page {number}.") for number in range(5)]


def test_the_texts_of_wet_files_stay_byte_for_byte(tmp_path: Path) -> None:
    rows = ["Ein Text\n  mit <b>Zeilen</b> & Zeichen: é", "  another\n"]
    content = warc_record(b"", WarcRecordType.warcinfo)
    content += b"".join(warc_record(row.encode(), WarcRecordType.conversion) for row in rows)
    content += warc_record(b"caf\xe9", WarcRecordType.conversion)
    (tmp_path / "a.warc.wet.gz").write_bytes(gzip.compress(content))
    assert [outcome for _, outcome in outcomes(read(tmp_path))] == [*rows, "invalid UTF-8"]


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (gzip.compress(page("A page.")), "Content-Encoding: gzip\r\n"),
        (brotli.compress(page("A page.")), "Content-Encoding: br\r\n"),
        (b"%x\r\n%b\r\n0\r\n\r\n" % (len(page("A page.")), page("A page.")), "Transfer-Encoding: chunked\r\n"),
        (page("A page."), "X-Crawler-Content-Encoding: gzip\r\n"),
    ],
)
def test_bodies_are_decoded_as_http_says(tmp_path: Path, body: bytes, header: str) -> None:
    (tmp_path / "a.warc").write_bytes(warc_record(response(body, more=header)))
    assert texts(read(tmp_path)) == [page_text("A page.")]


def test_a_body_that_cannot_be_decoded_is_named_and_the_next_pages_are_read(tmp_path: Path) -> None:
    bad = warc_record(response(b"not gzip", more="Content-Encoding: gzip\r\n"))
    (tmp_path / "a.warc").write_bytes(bad + warc_record(response(page("A page."))))
    assert outcomes(read(tmp_path)) == [(0, "malformed HTTP"), (len(bad), page_text("A page."))]


@pytest.mark.parametrize(("encoding", "compressed"), [("gzip", gzip.compress), ("Deflate", zlib.compress)])
@pytest.mark.parametrize("cut", [1, 8, 40])
def test_a_compressed_body_that_is_cut_short_is_named(
    tmp_path: Path, encoding: str, compressed: Callable[[bytes], bytes], cut: int
) -> None:
    body, header = compressed(page("A page. " * 20)), f"Content-Encoding: {encoding}\r\n"
    records = [warc_record(response(part, more=header)) for part in (body[:-cut], body)]
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    found = [outcome for _, outcome in outcomes(read(tmp_path))]
    assert found == ["malformed HTTP", page_text("A page. " * 20).strip()]


def test_the_type_of_a_page_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "a.warc").write_bytes(warc_record(response(page("A page."), content_type="Text/HTML; charset=UTF-8")))
    assert texts(read(tmp_path)) == [page_text("A page.")]


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_of_a_compressed_archive_cut_short_the_pages_before_the_cut_stay_and_the_cut_is_named(
    tmp_path: Path, suffix: str, share: float
) -> None:
    content, _, expected = archive(3000)
    content = compress(content, suffix)
    (tmp_path / f"a.warc{suffix}").write_bytes(content[: int(share * len(content))])
    *documents, bad = read(tmp_path)
    found = texts(documents)
    assert len(documents) == len(found) > 3000 * share * 0.5
    assert found == expected[: len(found)]
    assert isinstance(bad, BadRecord)
    assert bad.reason == "damaged compression"


def test_of_an_archive_cut_anywhere_no_page_is_cut(tmp_path: Path) -> None:
    first, second = warc_record(response(page("One."))), warc_record(response(page("Two.")))
    path = tmp_path / "a.warc"
    for cut in range(1, len(second), 7):
        path.write_bytes((first + second)[:-cut])
        *documents, last = read(path)
        if cut <= 4:  # only the empty lines after the page
            assert texts([*documents, last]) == [page_text("One."), page_text("Two.")]
        else:
            assert texts(documents) == [page_text("One.")]
            assert isinstance(last, BadRecord)
            assert last.reason == "malformed WARC"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"garbage\n" * 100, "malformed WARC"), (b"", "empty"), (warc_record(b"", WarcRecordType.warcinfo), "empty")],
)
def test_archives_that_hold_no_page_say_so(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.warc").write_bytes(content)
    (tmp_path / "b.warc.gz").write_bytes(gzip.compress(content))
    assert [outcome for _, outcome in outcomes(read(tmp_path))] == [reason, reason]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4), st.binary(max_size=20))
def test_any_damage_gives_records(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]], end: bytes
) -> None:
    content = bytearray(archive(2)[0])
    for place, byte in changes:
        content[int(place * (len(content) - 1))] = byte
    path = tmp_path_factory.mktemp("damage") / "a.warc"
    path.write_bytes(bytes(content) + end)
    assert all(isinstance(record, Document | BadRecord) for record in read(path))


@pytest.mark.parametrize(("name", "library"), [("a.html", "resiliparse"), ("a.warc.gz", "fastwarc")])
def test_without_the_extra_such_a_file_is_an_error_that_says_what_to_install_and_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "a.txt").write_text("text")
    assert texts(read(tmp_path)) == ["text"]
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{name}: reading it needs {library}; .* pip install 'megagpt\[web\]'"):
        find_files([str(tmp_path)])


def test_a_page_nested_so_deeply_that_reading_it_would_take_hours_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<DIV class=x>" * 200_000 + "text")
    (bad,) = read(tmp_path / "a.html")
    assert isinstance(bad, BadRecord)
    assert bad.reason == "nested too deeply"
    (tmp_path / "b.html").write_text("<main>" + "<div><p>Text of a long page.</p></div>" * 10_000)
    (document,) = read(tmp_path / "b.html")
    assert isinstance(document, Document)
