"""Text as it comes, against the whole text looked at afterwards."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megagpt.errors import UsageError
from megagpt.inference.text import TextSample, TextStream
from megagpt.tokenizer import load_tokenizer

LETTERS = "abé"


def naive(chunks, stop):
    """The text when a stop string is first complete, cut at the first one; else all of it."""
    for end in range(1, len(chunks) + 1):
        text = b"".join(chunks[:end]).decode(errors="ignore")
        if any(string in text for string in stop):
            return text[: min(text.find(string) for string in stop if string in text)], True
    return b"".join(chunks).decode(errors="replace"), False


@settings(max_examples=300, deadline=None)
@given(
    st.text(LETTERS, max_size=30).map(str.encode),
    st.lists(st.integers(0, 40)),
    st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=3),
)
@example(b"aab", [1, 2], ["ab"])
@example("aé".encode(), [1, 2], ["é"])
def test_what_streams_is_the_text_up_to_the_first_stop_string(said, cuts, stop):
    borders = [0, *sorted(cut for cut in cuts if cut < len(said)), len(said)]
    chunks = [said[start:end] for start, end in pairwise(borders)]
    expected, stopped = naive(chunks, stop)
    stream, shown = TextStream(stop), ""
    for chunk in chunks:
        shown += stream.push(chunk)
        assert expected.startswith(shown), "no part of a stop string is ever shown"
    shown += stream.push(b"", final=True)
    assert (shown, stream.stopped) == (expected, stopped)


def test_text_that_begins_no_stop_string_is_not_held_back():
    stream = TextStream(["xyz"])
    assert [stream.push(piece) for piece in (b"abx", b"x", b"y", b"a")] == ["ab", "x", "", "xya"]


@pytest.mark.parametrize(
    ("said", "stop", "text", "ended"),
    [
        (b"one.\n\ntwo", ["\n\n"], "one.", "stop"),
        (b"one.\n", ["\n\n"], "one.\n", "length"),
        (b"one\x80", [], "one\ufffd", "length"),
        (b"one", ["e"], "on", "stop"),
    ],
)
def test_a_sample_says_why_it_ended(said, stop, text, ended):
    sample = TextSample([1], 0, len(said), load_tokenizer("bytes"), stop)
    for token in said:
        if not sample.ended:
            sample.take(token, 0.0)
    assert (sample.text, sample.ended) == (text, ended)


def test_text_held_back_is_shown_when_the_document_ends():
    tokenizer = load_tokenizer("bytes")
    sample = TextSample([1], 0, 9, tokenizer, ["ab"])
    sample.take(ord("a"), 0.0)
    assert sample.text == ""
    sample.take(tokenizer.eod_id, 0.0)
    assert (sample.text, sample.ended, sample.tokens) == ("a", "end", [ord("a")])


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UsageError, match="must not be empty"):
        TextStream([""])
