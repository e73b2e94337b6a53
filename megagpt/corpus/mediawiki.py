"""XML dumps of a MediaWiki such as Wikipedia's (pages-articles*.xml.bz2, export format 0.3 and later): an article each.

Documents are the pages of the main namespace that are wikitext and no redirects, with what their newest revision says:
without templates, tables, references, files, categories and comments; of links the label stays, of headings the text.
A page's position is the offset of its <page> in the uncompressed dump. Needs the `web` extra, mwparserfromhell, whose
time for a page grows with the product of its length and the number of constructs that are not closed, and is long for
lists and tables: a page beyond a bound is a bad record. It reads about 1 MB of wikitext a second.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING
from xml.parsers import expat

from megagpt.corpus.compression import DAMAGED_ERRORS
from megagpt.corpus.records import DAMAGED, EMPTY, BadRecord, BadRecordError, Document, ReadCount, checked, too_large

if TYPE_CHECKING:
    from mwparserfromhell.nodes import HTMLEntity, Tag, Wikilink
    from mwparserfromhell.wikicode import Wikicode

_READ_BYTES = 1 << 16
_LONGEST_TAG = 1 << 20
_MALFORMED, _MALFORMED_TEXT = "malformed XML", "malformed wikitext"
_MAIN_NAMESPACE = "0"
_NAMESPACES_NOT_SHOWN = frozenset({"-2", "6", "14"})  # media, files, categories
_THEIR_NAMES = ("media", "file", "image", "category")  # which every wiki understands, beside its own language's


# The XML


@dataclass
class _Page:
    """What is known of a page so far."""

    position: int
    is_redirect: bool = False
    size: int = 0
    """Bytes of the text."""
    parts: dict[str, list[str]] = field(default_factory=dict)
    """Content of the elements `ns`, `model` and `text`, in parts."""


class _DumpParser:
    """Takes the bytes of a dump, and keeps what it finds in `found`. Holds no more than one page."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        self._parser.EntityDeclHandler = self._refuse_entity
        self._fed = 0
        self._page: _Page | None = None
        self._element = ""
        self._namespace_key = ""
        self._not_shown = set(_THEIR_NAMES)
        self.found: list[Document | BadRecord] = []
        self.bytes = 0
        """Bytes of the texts of all documents found."""
        self.position = 0
        """Where the last page begins."""

    def feed(self, content: bytes, is_last: bool = False) -> None:
        """The next bytes. expat.ExpatError or BadRecordError: they are no XML, or none of a wiki."""
        self._fed += len(content)
        self._parser.Parse(content, is_last)
        if self._fed - self._parser.CurrentByteIndex > _LONGEST_TAG:  # which is held whole, and begun again and again
            raise BadRecordError(_MALFORMED, f"a tag, or what looks like one, of more than {_LONGEST_TAG} bytes")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "page":
            self.position = self._parser.CurrentByteIndex
            self._page = _Page(self.position)
        elif name == "redirect" and self._page:
            self._page.is_redirect = True
        elif name == "namespace":
            self._namespace_key = attributes.get("key", "")
        elif name in ("ns", "model", "text") and self._page:
            self._page.parts[name] = []
            if name == "text":  # of the newest revision, which is the last
                self._page.size = 0
        self._element = name

    def _end(self, name: str) -> None:
        self._element = ""
        if name == "page" and self._page:
            self._finish(self._page)
            self._page = None

    def _characters(self, content: str) -> None:
        name = self._element
        if name == "namespace" and self._namespace_key in _NAMESPACES_NOT_SHOWN:
            self._not_shown.add(content.strip().lower())
        if self._page and name in ("ns", "model", "text"):
            if name == "text":
                self._page.size += len(content) if content.isascii() else len(content.encode(errors="replace"))
                if self._page.size > self._max_bytes:
                    self._page.parts[name].clear()
                    return
            self._page.parts[name].append(content)

    def _refuse_entity(self, name: str, *_: object) -> None:
        raise BadRecordError(_MALFORMED, f"declares an entity {name!r}, as no wiki does")

    def _finish(self, page: _Page) -> None:
        values = {name: "".join(parts) for name, parts in page.parts.items()}
        is_article = values.get("ns", _MAIN_NAMESPACE) == _MAIN_NAMESPACE and not page.is_redirect
        if not is_article or values.get("model", "wikitext") != "wikitext" or "text" not in values:
            return
        self.bytes += page.size
        try:
            if page.size > self._max_bytes:
                raise too_large(self._max_bytes, page.size)
            text = plain_text(values["text"], frozenset(self._not_shown))
            self.found.append(Document(page.position, checked(text)))
        except BadRecordError as bad:
            self.found.append(BadRecord(page.position, None, *bad.args))


def read_mediawiki(stream: IO[bytes], count: ReadCount, max_bytes: int) -> Iterator[Document | BadRecord]:
    """The articles of a dump, given uncompressed; `count.bytes` grows by the bytes of their wikitext.

    Where it is damaged, cut short or no XML, a BadRecord with the position of the last page ends it.
    """
    parser = _DumpParser(max_bytes)
    is_empty, is_last = True, False
    bad = None
    while not is_last and not bad:
        try:
            content = stream.read(_READ_BYTES)
            is_last = not content
            parser.feed(content, is_last)
        except DAMAGED_ERRORS as error:
            bad = BadRecord(
                parser.position, None, DAMAGED, f"{error}, in or after the page at this byte of its content"
            )
        except expat.ExpatError as error:
            bad = BadRecord(parser.position, None, _MALFORMED, f"{error}, in or after the page at this byte")
        except BadRecordError as error:
            bad = BadRecord(parser.position, None, *error.args)
        count.bytes += parser.bytes
        is_empty = is_empty and not parser.found
        yield from parser.found
        parser.found, parser.bytes = [], 0
    if bad:
        yield bad
    elif is_empty:
        yield BadRecord(0, None, EMPTY, "no article")


# The wikitext

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_REFERENCE_TAG = re.compile(r"<(/?)ref(?:\s[^<>]*)?>", re.IGNORECASE)
_STYLE_OR_SWITCH = re.compile(r"'{2,}|__[A-Z]{3,}__")
_EMPTY_BRACKETS = re.compile(r" ?\([\s,;]*\)")  # what templates leave behind
_BLANK_LINES = re.compile(r"\n{3,}")
# fmt: off
_TAGS_NOT_SHOWN = frozenset((
    "categorytree", "chem", "gallery", "graph", "hiero", "imagemap", "indicator", "inputbox", "mapframe", "maplink",
    "ref", "references", "score", "script", "section", "style", "table", "templatestyles", "timeline",
))
_TAGS_ON_THEIR_OWN_LINE = frozenset(
    ("blockquote", "br", "center", "dd", "div", "dl", "dt", "hr", "li", "ol", "p", "ul")
)
_TAGS_WITHOUT_END = frozenset(  # for mwparserfromhell
    ("br", "hr", "wbr", "img", "meta", "link", "dd", "dt", "li", "td", "th", "tr")
)
# fmt: on

_CONSTRUCT = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}|\[(?=https?:|//)|\]|<(/?)([a-zA-Z]\w*)[^<>]*(/?>)?")
_CLOSED_BY = {"}}": "{{", "]]": "[[", "|}": "{|", "]": "["}
_LIST_MARKS = re.compile(r"^[*#:;]+", re.MULTILINE)
_CELL = re.compile(r"^[ \t]*(?:\|-?|!)|\|\||!!", re.MULTILINE)  # or a row
_MARK_WORK = 128  # 18 microseconds
_MOST_WORK = 1 << 24  # characters times unclosed constructs: a quarter of a minute at worst


def plain_text(wikitext: str, not_shown: frozenset[str] = frozenset(_THEIR_NAMES)) -> str:
    """What a reader sees of wikitext; links into the namespaces `not_shown` are left out.

    BadRecordError: it would take too long, or is nested too deeply.
    """
    import mwparserfromhell
    from mwparserfromhell.parser import ParserError

    wikitext = _without_references(_COMMENT.sub("", wikitext))
    _check_work(wikitext)
    parts: list[str] = []
    try:
        _collect(mwparserfromhell.parse(wikitext, skip_style_tags=True), not_shown, parts)
    except (ParserError, RecursionError) as error:
        raise BadRecordError(_MALFORMED_TEXT, str(error)) from None
    text = _EMPTY_BRACKETS.sub("", _STYLE_OR_SWITCH.sub("", "".join(parts)))
    return _BLANK_LINES.sub("\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()


def _without_references(wikitext: str) -> str:
    """Half of an article is often references: this is faster than to parse them."""
    parts, place, opened = [], 0, None
    for tag in _REFERENCE_TAG.finditer(wikitext):
        if tag[1]:
            if opened is not None:
                parts.append(wikitext[place:opened])
                place, opened = tag.end(), None
        elif tag[0].endswith("/>"):
            if opened is None:
                parts.append(wikitext[place : tag.start()])
                place = tag.end()
        else:
            opened = tag.start()
    return "".join([*parts, wikitext[place:]])


def _check_work(wikitext: str) -> None:
    unclosed, opened = 0, Counter[str]()
    for construct in _CONSTRUCT.finditer(wikitext):
        token, name = construct[0], construct[2]
        if name is None:
            closes = _CLOSED_BY.get(token)
            opened[closes or token] += -1 if closes and opened[closes] else not closes
        elif not construct[3]:
            unclosed += 1
        elif construct[1]:
            opened[name] -= opened[name] > 0
        elif construct[3] == ">" and name.lower() not in _TAGS_WITHOUT_END and not token.endswith("/>"):
            opened[name] += 1
    unclosed += opened.total()
    marks = sum(marks.end() - marks.start() for marks in _LIST_MARKS.finditer(wikitext))
    if "{|" in wikitext:
        marks += sum(1 for _ in _CELL.finditer(wikitext))
    if unclosed * len(wikitext) + marks * _MARK_WORK > _MOST_WORK:
        what = f"{unclosed:,} constructs that are not closed, and {marks:,} marks of lists and cells of tables"
        raise BadRecordError(_MALFORMED_TEXT, f"{what}, in {len(wikitext):,} characters")


def _collect(page: "Wikicode", not_shown: frozenset[str], parts: list[str]) -> None:
    """Append to `parts` what is shown of parsed wikitext."""
    from mwparserfromhell import nodes

    for node in page.nodes:
        match node:
            case nodes.Text():
                parts.append(node.value)
            case nodes.Wikilink():
                _collect_link(node, not_shown, parts)
            case nodes.Tag():
                _collect_tag(node, not_shown, parts)
            case nodes.Heading():
                parts.append("\n")
                _collect(node.title, not_shown, parts)
                parts.append("\n")
            case nodes.ExternalLink():
                if not node.brackets:
                    parts.append(str(node.url))
                elif node.title is not None:
                    _collect(node.title, not_shown, parts)
            case nodes.HTMLEntity():
                parts.append(_character(node))


def _collect_link(link: "Wikilink", not_shown: frozenset[str], parts: list[str]) -> None:
    title = str(link.title).strip()
    prefix, colon, _ = title.partition(":")
    if colon and prefix.strip().lower() in not_shown:
        return
    if link.text is not None:
        _collect(link.text, not_shown, parts)
    else:
        parts.append(title.removeprefix(":"))


def _collect_tag(tag: "Tag", not_shown: frozenset[str], parts: list[str]) -> None:
    name = str(tag.tag).strip().lower()
    if name in _TAGS_NOT_SHOWN:
        return
    if name in _TAGS_ON_THEIR_OWN_LINE and not tag.wiki_markup:
        parts.append("\n")
    if tag.contents is not None:
        _collect(tag.contents, not_shown, parts)


def _character(entity: "HTMLEntity") -> str:
    """The character; as it is written, if there is none."""
    try:
        return entity.normalize()
    except (ValueError, OverflowError):
        return str(entity)
