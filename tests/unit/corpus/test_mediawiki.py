"""A wiki's dump: its articles come out as a reader sees them, with their positions, whatever it holds besides."""

import bz2
import time
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus.mediawiki import plain_text
from megagpt.corpus.records import BadRecord, BadRecordError, Document
from megagpt.corpus.sources import SourceFile
from tests.unit.corpus.test_columnar import outcomes
from tests.unit.corpus.test_reading import GOOD_TEXT, read, texts

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo><sitename>Wikipedia</sitename><namespaces>
    <namespace key="0" case="first-letter" /><namespace key="1" case="first-letter">Diskussion</namespace>
    <namespace key="6" case="first-letter">Datei</namespace>
    <namespace key="14" case="first-letter">Kategorie</namespace>
  </namespaces></siteinfo>
"""
ARTICLE = """{{Infobox person|name=[[A]]|x={{y}}}}
'''Ada''' was a ''[[mathematician|mathematical]] writer'' and [[poet]]s' daughter.<ref name="a">{{cite|b}}</ref>
She<ref name="b" /> wrote on [https://example.org machines] ({{lang|x}}).<!-- really? -->

== Life &amp; work ==
* born in [[London]]
* see https://example.org/a

[[Datei:Ada.jpg|mini|Ada in [[1843]]]]
{| class="wikitable"
|-
| a || b
|}
<math>x^2</math> is {{{1|}}}<br />a square.
<gallery>
File:A.png
</gallery>
[[:Kategorie:Frau]] <nowiki>[[as is]]</nowiki>
[[Category:Women]][[Kategorie:Frau]]__NOTOC__
"""
SHOWN = """Ada was a mathematical writer and poets' daughter.
She wrote on machines.

 Life & work

 born in London
 see https://example.org/a

x^2 is
a square.

Kategorie:Frau [[as is]]"""


def dump(pages: Sequence[tuple[str, str]], more: str = "") -> bytes:
    """A dump of articles, titles and wikitexts; `more` is XML of other pages."""
    articles = "".join(article(title, text) for title, text in pages)
    return f"{HEAD}{articles}{more}</mediawiki>\n".encode()


def article(title: str, text: str, inside: str = "", namespace: int = 0, model: str = "wikitext") -> str:
    """The XML of a page; `inside` is more elements."""
    return (
        f"  <page><title>{escape(title)}</title><ns>{namespace}</ns><id>1</id>{inside}<revision><id>2</id>"
        f"<model>{model}</model><format>text/x-wiki</format>"
        f'<text bytes="{len(text.encode())}" xml:space="preserve">{escape(text)}</text></revision></page>\n'
    )


def test_of_wikitext_stays_what_a_reader_sees(tmp_path: Path) -> None:
    path = tmp_path / "dewiki-20240101-pages-articles.xml"
    path.write_bytes(dump([("Ada", ARTICLE)]))
    (document,) = read(path)
    assert isinstance(document, Document)
    assert document.text == SHOWN


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abcdef é日 .\n", min_size=1, max_size=40).filter(lambda text: not text.isspace()), max_size=6))
def test_articles_without_markup_come_out_in_order_with_the_offset_of_their_page(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str]
) -> None:
    content = dump([(f"Title {number}", f"a {row}") for number, row in enumerate(rows)])
    path = tmp_path_factory.mktemp("wiki") / "pages-articles.xml.bz2"
    path.write_bytes(bz2.compress(content))
    offsets = [place for place in range(len(content)) if content.startswith(b"<page>", place)]
    found = read(path, chunk_bytes=10)
    if not rows:
        assert outcomes(found) == [(0, "empty")]
        return
    assert [record.position for record in found] == offsets
    words = [record.text.split() for record in found if isinstance(record, Document)]
    assert words == [f"a {row}".split() for row in rows]


def test_talk_redirects_styles_and_old_revisions_are_no_documents(tmp_path: Path) -> None:
    others = article("Diskussion:A", "talk", namespace=1) + article("B", "#REDIRECT [[A]]", '<redirect title="A" />')
    others += article("C.css", "p {}", model="css")
    history = article("D", "new").replace(
        "<revision>", "<revision><model>wikitext</model><text>old</text></revision><revision>"
    )
    (tmp_path / "pages-articles.xml").write_bytes(dump([("A", "text")], others + history))
    assert texts(read(tmp_path)) == ["text", "new"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("enwiki-20240101-pages-articles.xml.bz2", "mediawiki"),
        ("enwiki-latest-pages-articles-multistream1.xml-p1p41242.bz2", "mediawiki"),
        ("dewiki-pages-meta-current.xml.gz", "mediawiki"),
        ("enwiki-20240101-pages-articles-multistream-index.txt.bz2", "text"),
        ("a.xml", "text"),
    ],
)
def test_a_dump_is_known_by_its_name(name: str, kind: str) -> None:
    assert SourceFile(name, 1, 0, False).kind == kind


def test_the_streams_of_a_dump_are_read_one_after_another(tmp_path: Path) -> None:
    streams = [HEAD, *(article(f"A {number}", f"text {number}") for number in range(20)), "</mediawiki>"]
    path = tmp_path / "pages-articles-multistream.xml.bz2"
    path.write_bytes(b"".join(bz2.compress(stream.encode()) for stream in streams))
    assert texts(read(path)) == [f"text {number}" for number in range(20)]
    path.write_bytes(path.read_bytes()[:-300])
    *documents, bad = read(path)
    assert texts(documents) == [f"text {number}" for number in range(len(documents))]
    assert isinstance(bad, BadRecord)
    assert bad.reason == "damaged compression"
    assert 10 < len(documents) < 20


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda content: content[:-14], "no element found"),
        (lambda content: content.replace(b"text 1", b"text </b>"), "mismatched tag"),
        (lambda content: content.replace(b"text 1", b"\x00"), "not well-formed"),
        (lambda content: b'<!DOCTYPE a [<!ENTITY b "c">]>' + content, "declares an entity 'b'"),
        (lambda content: b"garbage", "syntax error"),
    ],
)
def test_where_the_xml_is_damaged_the_articles_before_stay_and_it_is_named(
    tmp_path: Path, change: object, detail: str
) -> None:
    assert callable(change)
    content = dump([(f"A {number}", f"text {number}") for number in range(3)])
    (tmp_path / "pages-articles.xml").write_bytes(change(content))
    *documents, bad = read(tmp_path)
    assert isinstance(bad, BadRecord)
    assert bad.reason == "malformed XML"
    assert detail in bad.detail
    assert texts(documents) == [f"text {number}" for number in range(len(documents))]
    assert bad.position in (0, *(place for place in range(len(content)) if content.startswith(b"<page>", place)))


def test_wikitext_with_so_much_unclosed_that_reading_it_would_take_hours_is_a_bad_record(tmp_path: Path) -> None:
    hostile = [construct * 20_000 for construct in ("{{a|", "<a ", "[http://a ", "[[a|", "{|\n", "<b>", "<nowiki>")]
    (tmp_path / "pages-articles.xml").write_bytes(dump([("A", text) for text in hostile] + [("B", "good")]))
    start = time.monotonic()
    found = [outcome for _, outcome in outcomes(read(tmp_path))]
    assert time.monotonic() - start < 5
    assert found == ["malformed wikitext"] * len(hostile) + ["good"]


@pytest.mark.parametrize(
    "text",
    [
        *(construct * 100_000 for construct in ("<ref>", "<!--", "'", "(", "]]")),
        *(construct * 1_000_000 for construct in (":", "#*", "\n*", ";a\n")),
        *("{|\n" + construct * 300_000 + "\n|}" for construct in ("\n ", "|a\n", "|-\n", "|a||b\n", "!a!!b\n")),
        "{|" + "\n " * 300_000 + "x",
    ],
)
def test_wikitext_of_one_thing_many_times_takes_no_long_time(text: str) -> None:
    start = time.monotonic()
    try:
        plain_text(text)
    except BadRecordError as error:
        assert error.args[0] == "malformed wikitext"  # noqa: PT017 (either outcome is right)
    assert time.monotonic() - start < 5


def test_an_article_of_a_long_list_and_a_large_table_is_read() -> None:
    rows = "".join(f"|-\n| [[Place {number}]] || {number}\n" for number in range(3000))
    text = plain_text("".join(f"* born {number}\n" for number in range(3000)) + f"{{|\n{rows}|}}\nThe end")
    assert text.startswith("born 0")
    assert text.endswith("The end")


WIKITEXT = st.lists(
    st.sampled_from(
        ["{{", "}}", "[[", "]]", "{|", "|}", "|", "=", "<b>", "</b>", "<ref>", "</ref>", "<!--", "-->", "'"]
    )
    | st.sampled_from(["<nowiki>", "&#xFFFFFFFF;", "&#0;", "&nbsp;", "\n", "* ", "== ", "http://a", "[", "]", "<a b"])
    | GOOD_TEXT,
    max_size=30,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(WIKITEXT)
def test_any_wikitext_is_a_text_or_a_bad_record(wikitext: str) -> None:
    try:
        text = plain_text(wikitext)
    except BadRecordError:
        return
    assert text == text.strip()
    assert "\n\n\n" not in text
