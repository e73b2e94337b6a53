"""What a page may cost: hostile pages are named within seconds, ordinary ones pass."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus import page_bounds
from megagpt.corpus.records import BadRecordError
from megagpt.corpus.web import main_text

ROOT = Path(__file__).parents[3]
HOSTILE: dict[str, Callable[[], str]] = {
    "div": lambda: "<div>" * 32_000,
    "article": lambda: "<article>" * 32_000,
    "div whose end is ignored": lambda: "<div><table><tr><td></div>" * 32_000,
    "content in many div": lambda: "<div>" * 1000 + "<b>a</b>" * 100_000,
    "text in many div": lambda: "<div>" * 3000 + "a b " * 1_000_000,
    "tags": lambda: "<p>a</p>" * 1_000_000,
    "formatting in every block": lambda: "".join(f"<b id={n}>" for n in range(300)) + "<p>x" * 400_000,
    "font": lambda: "<p><font size=2>x" * 5000,
    "attributes of a tag": lambda: "<a " + " ".join(f"a{n}=b" for n in range(400_000)) + ">x",
    "attributes of tags": lambda: ("<a " + " ".join(f"a{n}=b" for n in range(1000)) + ">x") * 4000,
    "names": lambda: "".join(f"<b{n}>x" for n in range(400_000)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_page_is_a_bad_record_within_seconds(what: str) -> None:
    content = HOSTILE[what]().encode()
    start = time.monotonic()
    with pytest.raises(BadRecordError) as caught:
        main_text(content)
    assert time.monotonic() - start < 3
    assert caught.value.args[0] in ("nested too deeply", "too many tags")


@pytest.mark.parametrize(
    "page",
    [
        "<main>" + "<div><p>Text of a long page.</p></div>" * 10_000,
        "<main>"
        + "<div><article><div><p><b>Text</b> of <i>a</i> long <a href=x>page</a>.</p></div></article></div>" * 9000,
        "<table>" + "<tr><td><font size=2>a cell<td><font size=3>another" * 5000,
        "<main><table>" + "<tr><td><table><tr><td><font size=1><b>x</td></tr></table></td></tr>" * 3000,
        "<p>" + "<b>not closed<p>" * 5000,
        "<pre>" + "a text that is long, and has no tags at all " * 50_000,
        "<div>" * 200 + "<p>deep</p>" * 2000,
    ],
)
def test_a_page_as_they_are_found_is_read(page: str) -> None:
    start = time.monotonic()
    assert main_text(page.encode())
    assert time.monotonic() - start < 3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<div>", "</div>", "<article>", "</article>", "<p>", "<table>", "<tr>", "<td>", "</table>", "a"]
        )
        | st.sampled_from(["<b>", "</b>", "<span>", "<!--</div>-->", "<a title='</div>'>"]),
        max_size=40,
    ).map("".join)
)
def test_the_walk_counts_what_every_box_holds(page: str) -> None:
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(page)
    walk = page_bounds._Walk(len(page))
    assert tree.document is not None
    walk.over(tree.document)
    boxes = [box for name in ("div", "article") for box in tree.document.get_elements_by_tag_name(name)]
    assert walk._sum == sum(1 + len(box.query_selector_all("*")) for box in boxes)
    assert (walk.deepest > 0) == bool(boxes)


MEASURE = """
import re
from pathlib import Path
from megagpt.corpus.web import main_text
from megagpt.corpus.records import BadRecordError
content = {content}
try:
    main_text(content)
except BadRecordError as error:
    print(error)
# Not getrusage's ru_maxrss, which begins with that of the process that this one was forked from.
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.parametrize("content", ["b'<p>a' * ((1 << 19) - 1)", "b'<p>a</p>' * 6_250_000", "b'a<td>x' * 500_000"])
def test_a_page_takes_less_than_700_mb(content: str) -> None:
    command = [sys.executable, "-c", MEASURE.format(content=content)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout.split()[-1]) < 700
