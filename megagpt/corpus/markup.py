"""Removal of HTML that was left in extracted text: comments, scripts and styles, tags, entities.

Only names of HTML's elements make a tag, so that `a < b`, `List<String>` and <name@example.org> stay. No parser: what
is cut short or nested wrongly stays or goes as it stands. The time grows linearly with any text.
"""

import html
import re

_BLOCKS = (
    "address article aside blockquote body br center dd details dialog div dl dt fieldset figcaption figure footer "
    "form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html legend li link main menu meta nav noframes "
    "noscript ol optgroup option p pre section select summary table tbody textarea tfoot thead title tr ul"
)
_CELLS = "td th"
_INLINE = (
    "a abbr acronym area audio b base bdi bdo big button canvas caption cite code col colgroup data datalist del dfn "
    "em embed font i iframe img input ins kbd label map mark meter object output param picture progress q rp rt ruby s "
    "samp script small source span strike strong style sub sup svg template time track tt u var video wbr"
)
_SPACE_OF_ELEMENT = {
    **dict.fromkeys(_BLOCKS.split(), "\n"),
    **dict.fromkeys(_CELLS.split(), " "),
    **dict.fromkeys(_INLINE.split(), ""),
}

_HIDDEN = re.compile(r"<(?:(!--)|(script|style)(?:\s[^<>]*)?>)", re.IGNORECASE)
_END_OF_HIDDEN = {
    "!--": re.compile("-->"),
    "script": re.compile(r"</script\s{0,9}>", re.IGNORECASE),
    "style": re.compile(r"</style\s{0,9}>", re.IGNORECASE),
}
_TAG = re.compile(r"</?([A-Za-z][A-Za-z0-9]{0,15})(?:[\s/][^<>]*)?>|<!doctype[^<>]*>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def remove_html(text: str) -> str:
    """The text without comments, scripts, styles and tags (a line break for those of blocks), entities decoded."""
    if "<" in text:
        text = _TAG.sub(_space_of_tag, _without_hidden(text))
    if "&" in text:
        text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    return text


def _without_hidden(text: str) -> str:
    """The text without comments, scripts and styles; one that does not end stays."""
    kept, position = [], 0
    endless = set()  # kinds that have no more end
    while opening := _HIDDEN.search(text, position):
        kind = (opening[1] or opening[2]).lower()
        ending = None if kind in endless else _END_OF_HIDDEN[kind].search(text, opening.end())
        kept.append(text[position : opening.start() if ending else opening.end()])
        if ending is None:
            endless.add(kind)
        position = ending.end() if ending else opening.end()
    return "".join([*kept, text[position:]])


def _space_of_tag(tag: re.Match[str]) -> str:
    if tag[1] is None:
        return ""
    return _SPACE_OF_ELEMENT.get(tag[1].lower(), tag[0])
