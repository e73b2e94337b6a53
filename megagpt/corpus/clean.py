"""The cleaning of a document's text: repair of mojibake, Unicode NFC, control characters, whitespace.

Careful with code and tables: indentation, tabs and spaces within a line stay as they are, and punctuation is never
changed. Lines in ASCII, the bulk of most corpora, skip the steps that cannot change them.
"""

import re
import unicodedata

import ftfy
from ftfy.fixes import remove_terminal_escapes

# Only what repairs wrongly decoded text; the fixes that restyle it (quotes, ligatures, widths, HTML) stay off.
_REPAIR = ftfy.TextFixerConfig(
    explain=False,
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=False,
    remove_control_chars=False,
    normalization=None,
)
_LINE_BREAK = re.compile("\r\n?|[\v\f]")
_UNICODE_LINE_BREAK = re.compile("[\x85\u2028\u2029]")  # after the repair: \x85 is half of a wrongly decoded letter
# C0 but for tab and line feed, delete, C1, deprecated formatting, byte order marks, annotation, noncharacters
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u206a-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff]")
_BLANK_LINES = re.compile("\n{4,}")


def clean(text: str, repair_encoding: bool = True) -> str:
    """The cleaned text; empty if nothing of it remains.

    In this order: every kind of line break becomes a line feed; with `repair_encoding`, ftfy repairs text that was
    decoded in the wrong encoding ("cafÃ©"); terminal escapes and control characters go; NFC; spaces at line ends go;
    more than two blank lines become two; blank lines around the text go.
    """
    text = _LINE_BREAK.sub("\n", text)
    if not text.isascii():
        if repair_encoding:
            text = "\n".join([line if line.isascii() else ftfy.fix_text(line, _REPAIR) for line in text.split("\n")])
        text = _UNICODE_LINE_BREAK.sub("\n", text)
    if "\x1b" in text:
        text = remove_terminal_escapes(text)
    text = unicodedata.normalize("NFC", _CONTROL.sub("", text))
    text = "\n".join([line.rstrip() for line in text.split("\n")])
    return _BLANK_LINES.sub("\n\n\n", text).strip("\n")
