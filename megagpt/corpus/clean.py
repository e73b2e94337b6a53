"""The cleaning of a document's text: repair of mojibake, Unicode NFC, control characters, whitespace.

Careful with code and tables: indentation, tabs and spaces within a line stay as they are, and punctuation is not
changed unless asked for, nor are HTML, e-mail and IP addresses (markup.py, private.py). Lines in ASCII, the bulk of
most corpora, skip the steps that cannot change them.
"""

import re
import unicodedata

import ftfy
from ftfy.badness import is_bad
from ftfy.fixes import remove_terminal_escapes

from megagpt.corpus.config import CleanConfig
from megagpt.corpus.markup import remove_html
from megagpt.corpus.normalization import map_lines, normalize
from megagpt.corpus.private import mask_emails, mask_ips

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
_MAY_BE_REPAIRED = re.compile("[\x80-\x9f]|^[ÂÃ] ", re.MULTILINE)  # beside what ftfy finds bad in the middle of a line
_LINE_BREAK = re.compile("\r\n?|[\v\f]")
_UNICODE_LINE_BREAK = re.compile("[\x85\u2028\u2029]")  # after the repair: \x85 is half of a wrongly decoded letter
# C0 but for tab and line feed, delete, C1, deprecated formatting, byte order marks, annotation, noncharacters
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u206a-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff]")
_BLANK_LINES = re.compile("\n{4,}")
# After the table of CCNet (Wenzek et al. 2019, arXiv 1911.00359), with more quotes and dashes.
_PUNCTUATION = {
    **dict.fromkeys("“”„‟«»「」『』《》〝〞", '"'),
    **dict.fromkeys("‘’‚‛´′", "'"),
    **dict.fromkeys("‐‑‒–—―━−", "-"),
    **dict.fromkeys("，、", ","),
    **dict.fromkeys("。．", "."),
    **dict.fromkeys("：∶", ":"),
    "…": "...",
    "？": "?",
    "！": "!",
    "（": "(",
    "）": ")",
    "；": ";",
    "～": "~",
    "〈": "<",
    "〉": ">",
    "【": "[",
    "】": "]",
    "％": "%",
    "►": "-",
}
_PUNCTUATION_MARK = re.compile(f"[{''.join(_PUNCTUATION)}]")
_DEFAULTS = CleanConfig()


def clean(text: str, config: CleanConfig = _DEFAULTS) -> str:
    """The cleaned text; empty if nothing of it remains.

    In this order: HTML goes, if asked for; every kind of line break becomes a line feed; with `repair_encoding`, ftfy
    repairs text that was decoded in the wrong encoding ("cafÃ©"); terminal escapes and control characters go; NFC, of
    more than 30 combining marks in a row the first 30 staying; punctuation and addresses are replaced, if asked for;
    spaces at line ends go; more than two blank lines become two; blank lines around the text go.
    """
    if config.remove_html:
        text = remove_html(text)
    if _has_line_break(text):
        text = _LINE_BREAK.sub("\n", text)
    if not text.isascii():
        if config.repair_encoding:
            text = map_lines(_repaired, text)
        text = _UNICODE_LINE_BREAK.sub("\n", text)
    if "\x1b" in text:
        text = remove_terminal_escapes(text)
    text = normalize("NFC", _CONTROL.sub("", text))
    if config.normalize_punctuation and not text.isascii():
        text = _PUNCTUATION_MARK.sub(lambda mark: _PUNCTUATION[mark[0]], text)
    if config.mask_ips:  # first: an e-mail address may end where one begins
        text = mask_ips(text)
    if config.mask_emails:
        text = mask_emails(text)
    text = unicodedata.normalize("NFC", text)  # again: a new > may meet a combining mark
    text = map_lines(_without_spaces_at_ends, text)
    if "\n\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n\n", text)
    return text.strip("\n")


def _has_line_break(text: str) -> bool:
    return "\r" in text or "\v" in text or "\f" in text


def _repaired(lines: list[str]) -> list[str]:
    """The lines as ftfy repairs each; nearly all are good, which is seen sooner of many at once."""
    suspects = "\n".join([line for line in lines if not line.isascii()])
    if not (is_bad(suspects) or _MAY_BE_REPAIRED.search(suspects)):
        return lines
    return [line if line.isascii() else ftfy.fix_text(line, _REPAIR) for line in lines]


def _without_spaces_at_ends(lines: list[str]) -> list[str]:
    return [line.rstrip() for line in lines]
