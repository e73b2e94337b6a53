"""Removal of HTML, and masking of addresses: what goes, what must stay, and that no text takes long."""

import html.parser
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.corpus.clean import clean
from megagpt.corpus.config import CleanConfig
from megagpt.corpus.markup import remove_html
from megagpt.corpus.private import mask_emails, mask_ips

EVERYTHING = CleanConfig(remove_html=True, mask_emails=True, mask_ips=True, normalize_punctuation=True)
MARKS = "< > <p> <!-- --> <script> </script> </STYLE> <b &lt; &amp; &# &#65; a@ me@x.org . 1. 8.8.8.8 10.0.0.1 … “ 〈 é"
FRAGMENTS = st.lists(
    st.sampled_from([*MARKS.split(), "</div >", "<style x='1'>", "\u0338", " ", "\n"]), max_size=30
).map("".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<p>One &amp; two</p><p>three</p>", "\nOne & two\n\nthree\n"),
        ('a <a href="x?y=1&amp;z">link</a> in text', "a link in text"),
        ("one<br/>two<BR>three", "one\ntwo\nthree"),
        ("<td>1</td><td>2</td>", " 1  2 "),
        ("a<!-- hidden <b>x</b> -->b", "ab"),
        ("a<script type='x'>if (a < b) { <p> }</script>b<STYLE>p {}</style >c", "abc"),
        ("<!DOCTYPE html>text", "text"),
        ("no end <!-- of <b>this</b> and <script>that", "no end <!-- of this and that"),
        ("&lt;b&gt; is bold&nbsp;&#x41;&#66;", "<b> is bold\xa0AB"),
        ("a < b > c, List<String>, <name@example.org>, std::vector<int>, AT&T, ?a=1&copy=2", None),
        ("if x<y and y>z", None),
        ("&#99999999999; &nosuch; &", None),
    ],
)
def test_html_goes_and_what_only_looks_like_it_stays(text: str, expected: str | None) -> None:
    assert remove_html(text) == (text if expected is None else expected)


class _Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, _: object) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.texts.append(data)


WORDS = st.text("abcdé &<", max_size=8).map(html.escape)
ELEMENTS = st.recursive(
    WORDS,
    lambda inner: (
        st.tuples(st.sampled_from(["p", "b", "div", "td", "span"]), st.lists(inner, max_size=4)).map(
            lambda pair: f'<{pair[0]} class="x">{"".join(pair[1])}</{pair[0]}>'
        )
        | st.text("abc <{", max_size=5).map(lambda code: f"<!-- {code} --><script>{code}</script>")
    ),
)


@given(ELEMENTS)
def test_of_well_formed_html_the_text_that_a_parser_finds_remains(page: str) -> None:
    parser = _Text()
    parser.feed(page)
    parser.close()
    assert "".join(remove_html(page).split()) == "".join("".join(parser.texts).split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jane.doe+x@mail.example-site.co.uk.", "write to <email>."),
        ("(a@b.io), <c_d%e@f.museum>", "(<email>), <<email>>"),
        ("...first.last@example.com\nand x@y.de", "...<email>\nand <email>"),
        ("@user, a@b, a@b.c, user@host.123, git@github:me/x, 3 @ 4.50", None),
        ("decorators: @functools.cache, m@n@o", None),
        ("a" * 65 + "@example.com", None),
    ],
)
def test_email_addresses_are_masked(text: str, expected: str | None) -> None:
    assert mask_emails(text) == (text if expected is None else expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from 8.8.8.8 and 151.101.1.140:80.", "from <ip> and <ip>:80."),
        ("at 93.184.216.34.", "at <ip>."),
        ("10.1.2.3 127.0.0.1 192.168.1.1 172.31.0.1 169.254.1.1 100.64.0.1 0.0.0.0 255.255.255.255 224.0.0.1", None),
        ("192.0.2.1 198.51.100.7 203.0.113.9 198.19.0.1", None),
        ("172.16.0.0 172.31.255.255 100.127.255.255 198.19.255.255 239.255.255.255 192.0.0.255", None),
        ("172.15.0.1 172.32.0.1 100.63.0.1 100.128.0.1 11.0.0.1 223.255.255.255", " ".join(["<ip>"] * 6)),
        ("256.1.1.1 1.2.3.444 8.8.8.08 1.2.3 1.2.3.4.5 12.1.2.3.4.5.6.7 1234.5.6.7", None),
    ],
)
def test_public_ip_addresses_are_masked(text: str, expected: str | None) -> None:
    assert mask_ips(text) == (text if expected is None else expected)


@given(st.tuples(*[st.integers(0, 255)] * 4))
def test_what_is_public_is_what_belongs_to_no_special_range(parts: tuple[int, int, int, int]) -> None:
    a, b, c, _ = parts
    special = (
        a in (0, 10, 127)
        or a >= 224
        or (a, b) in ((169, 254), (192, 168), (198, 18), (198, 19))
        or (a == 100 and 64 <= b < 128)
        or (a == 172 and 16 <= b < 32)
        or (a, b, c) in ((192, 0, 0), (192, 0, 2), (198, 51, 100), (203, 0, 113))
    )
    address = ".".join(map(str, parts))
    assert mask_ips(address) == (address if special else "<ip>")


@given(FRAGMENTS)
def test_masking_and_punctuation_twice_are_as_once(text: str) -> None:
    config = EVERYTHING.model_copy(update={"remove_html": False, "repair_encoding": False})
    once = clean(text, config)
    assert clean(once, config) == once


@given(FRAGMENTS | st.text(st.characters(exclude_categories=["Cs"]), max_size=100))
def test_no_text_breaks_the_options(text: str) -> None:
    clean(text, EVERYTHING).encode()


def test_punctuation_becomes_ascii() -> None:
    text = "“It’s — well… 5 – 6」，done！（yes）〈x〉"
    assert clean(text, CleanConfig(normalize_punctuation=True)) == '"It\'s - well... 5 - 6",done!(yes)<x>'
    assert clean(text) == text


def test_options_are_off_by_default() -> None:
    text = "<b>me@example.org</b> 8.8.8.8 “x”"
    assert clean(text) == text


UNITS = "< a@ 1. a. <!-- <script> <p </ & &# &amp @ a- x@a- 8.8.8.8 a {"


@pytest.mark.parametrize("unit", [*UNITS.split(), "<a ", " ", "\n"])
@pytest.mark.parametrize("step", [remove_html, mask_emails, mask_ips, lambda text: clean(text, EVERYTHING)])
def test_the_time_grows_linearly_with_any_text(unit: str, step: Callable[[str], str]) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    step(text)
    assert time.process_time() - start < 5  # a quadratic one takes many minutes
