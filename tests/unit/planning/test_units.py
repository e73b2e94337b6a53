"""Quantities as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import UsageError
from megagpt.planning.units import duration_text, parse_count, parse_counts, parse_seconds, size_text


@given(st.integers(1, 10**15))
def test_whole_numbers_are_read_as_they_are_written(number):
    assert parse_count(str(number), "tokens") == parse_count(f"{number:,}", "tokens") == number


@given(st.integers(1, 99_999), st.sampled_from([("k", 3), ("M", 6), ("B", 9), ("b", 9), ("T", 12)]))
def test_suffixes_are_powers_of_ten_exactly(tenths, suffix):
    letter, power = suffix
    assert parse_count(f"{tenths / 10}{letter}", "tokens") == tenths * 10 ** (power - 1)


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_a_usage_error(text):
    for parse in (parse_count, parse_seconds, parse_counts):
        try:
            parsed = parse(text, "it")
        except UsageError:
            continue
        assert parsed


@pytest.mark.parametrize("text", ["", "0", "-3", "1.5", "many", "3X", "1e400", "nan", "8;9"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(UsageError):
        parse_counts(text, "--gpus")


def test_several_counts_come_in_order_and_once():
    assert parse_counts("512, 8,64,8", "--gpus") == [8, 64, 512]


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("10min", 600), ("6300h", 6300 * 3600), ("1.5 d", 129600), ("2y", 2 * 31557600)]
)
def test_durations_have_units(text, seconds):
    assert parse_seconds(text, "--mtbf") == seconds


@pytest.mark.parametrize("text", ["", "12", "h", "0s", "-1h", "5 parsecs"])
def test_a_duration_without_a_unit_is_refused(text):
    with pytest.raises(UsageError):
        parse_seconds(text, "--mtbf")


def test_texts_have_three_digits_and_a_unit():
    assert size_text(80 * 2**30) == "80 GiB"
    assert size_text(5) == "5 B"
    assert duration_text(90) == "90 s"
    assert duration_text(0.0123) == "12.3 ms"
    assert duration_text(3 * 86400) == "3 days"
