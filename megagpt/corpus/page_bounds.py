"""Bounds of what a web page may cost: a few seconds and about half a GiB, whatever was put into it.

What a parser of HTML5 takes grows with more than the size of a page: with the square of the attributes of a tag and of
the different names of elements; with elements of the formatting kind (<b>, <font>) that are open times all tags, as
they are opened again in every block; in resiliparse with the content of each <div> and <article>, once more for each
that it is nested in. Pages beyond a bound are bad records. The first three bounds estimate what a parser will do; they
hold for pages as they are found, not for one that was made to deceive them.
"""

import re
from typing import TYPE_CHECKING, Any

from megagpt.corpus.records import BadRecordError

if TYPE_CHECKING:
    from resiliparse.parse.html import DocumentNode, HTMLTree

_MOST_TAGS = 1 << 19  # half a GiB at most
_MOST_FORMATTED = 1 << 21  # formatting elements that are opened again in blocks
_LONG_TAG = 1 << 16  # characters
_MOST_ATTRIBUTES = 1 << 14  # of a tag: a third of a second
_LARGE_PAGE, _LARGE_COUNT = 1 << 22, 1 << 16  # characters and tags from which on all attributes and names are counted
_MOST_ATTRIBUTES_IN_ALL = 1 << 20
_MOST_NAMES = 1 << 14
_MOST_WORK = 1 << 30  # of the extraction: two seconds
_NODE_WORK = 10  # as much as so many characters of text

_TAG_BEGINNING = re.compile(r"<[a-zA-Z]")
_TAG = re.compile(r"<([a-zA-Z][^\s/>]*)([^>]*)")
_FORMATTING_OR_TABLE = re.compile(
    r"<(/?)(?:(b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u)|(table|tr|td|th|caption))(?:(>)|[\s/])",
    re.IGNORECASE,
)
_MOST_EQUAL = 3  # of one kind are opened again: the "Noah's Ark clause" of the HTML standard
TOO_DEEP, TOO_MANY = "nested too deeply", "too many tags"


def check_page(page: str) -> None:
    """BadRecordError: to parse the page would take too much."""
    tags = page.count("<")
    if tags > _MOST_TAGS:
        raise BadRecordError(TOO_MANY, f"{tags:,} tags, more than {_MOST_TAGS:,}")
    if tags * tags > 4 * _MOST_FORMATTED and (unclosed := _most_unclosed(page)) * tags > _MOST_FORMATTED:
        raise BadRecordError(TOO_DEEP, f"{unclosed:,} elements such as <b> that are not closed, among {tags:,} tags")
    _check_long_tags(page)
    if len(page) > _LARGE_PAGE or tags > _LARGE_COUNT:
        _check_all_tags(page)


def _most_unclosed(page: str) -> int:
    """The most formatting elements that are open at once; those in a cell of a table end with it."""
    scopes: list[tuple[str, dict[str, list[bool]]]] = [("", {})]  # kind, and of each name whether it has no attributes
    count = most = 0
    for tag in _FORMATTING_OR_TABLE.finditer(page):
        if tag[2] is None:
            while len(scopes) > 1 and _ends_scope(scopes[-1][0], tag[3].lower(), bool(tag[1])):
                count -= sum(map(len, scopes.pop()[1].values()))
            kind = "table" if tag[3].lower() == "table" else "cell"
            if not tag[1] and tag[3].lower() != "tr" and (kind == "table" or len(scopes) > 1):
                scopes.append((kind, {}))
            elif tag[1] and kind == "table" and len(scopes) > 1:
                count -= sum(map(len, scopes.pop()[1].values()))
            continue
        opened = scopes[-1][1].setdefault(tag[2].lower(), [])
        if tag[1]:
            count -= bool(opened)
            del opened[-1:]
            continue
        is_plain = tag[4] is not None
        if is_plain and opened.count(True) == _MOST_EQUAL:
            opened.remove(True)
            count -= 1
        opened.append(is_plain)
        count += 1
        most = max(most, count)
    return most


def _ends_scope(kind: str, name: str, is_end: bool) -> bool:
    """Whether a tag of a table ends what is open: a cell ends with the next, its row or its table."""
    return kind == "cell" and (is_end or name != "table")


def _check_long_tags(page: str) -> None:
    """The attributes of all tags that are so long that they may have too many."""
    place = 0
    while len(page) - place >= _LONG_TAG:
        last = page.rfind(">", place, place + _LONG_TAG)
        if last >= 0:
            place = last + 1
            continue
        end = page.find(">", place)
        end = len(page) if end < 0 else end
        begin = _TAG_BEGINNING.search(page, place, end)
        if begin and (attributes := len(page[begin.start() : end].split())) > _MOST_ATTRIBUTES:
            detail = f"a tag of {attributes:,} attributes at character {begin.start()}"
            raise BadRecordError(TOO_MANY, detail)
        place = end + 1


def _check_all_tags(page: str) -> None:
    names: set[str] = set()
    attributes = 0
    for tag in _TAG.finditer(page):
        names.add(tag[1])
        attributes += len(tag[2].split())
        if len(names) > _MOST_NAMES or attributes > _MOST_ATTRIBUTES_IN_ALL:
            raise BadRecordError(TOO_MANY, f"{len(names):,} kinds of tags with {attributes:,} attributes and more")


def check_tree(tree: "HTMLTree", page: str) -> None:
    """BadRecordError: to extract the main content of the parsed page would take too much."""
    document = tree.document
    assert document is not None
    boxes = sum(len(document.get_elements_by_tag_name(name)) for name in ("div", "article"))
    if boxes * (2 * _NODE_WORK * page.count("<") + len(page)) <= _MOST_WORK:
        return
    walk = _Walk(len(page))
    walk.over(document)
    if walk.work > _MOST_WORK:
        raise BadRecordError(TOO_DEEP, f"up to {walk.deepest:,} <div> or <article> in each other, around much content")


class _Walk:
    """How many <div> and <article> the elements of a page lie in."""

    def __init__(self, characters: int) -> None:
        self._characters = characters
        self._sum = 0
        self._open: list[int] = []  # their depths in the tree
        self.deepest = 0

    def over(self, document: "DocumentNode") -> None:
        """Count all its elements."""
        from resiliparse.parse.html import traverse_dom

        assert document.document_element is not None  # the parser makes one, if there is none
        traverse_dom(document.document_element, self._enter, elements_only=True)

    @property
    def work(self) -> int:
        """Characters that the extraction reads, at most: elements and the texts beside them, and all text as if in the
        deepest."""
        return 2 * _NODE_WORK * self._sum + self.deepest * self._characters

    def _enter(self, context: Any) -> None:
        while self._open and self._open[-1] >= context.depth:
            self._open.pop()
        if context.node.tag in ("div", "article"):
            self._open.append(context.depth)
            self.deepest = max(self.deepest, len(self._open))
        self._sum += len(self._open)
