"""The literals are those of the YAML 1.2.2 specification, section 10.3, and what YAML 1.1 reads differently."""

import pytest
import yaml

from megagpt.config.yaml12 import parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, None) for text in ("null", "Null", "NULL", "~", "")],
        *[(text, True) for text in ("true", "True", "TRUE")],
        *[(text, False) for text in ("false", "False", "FALSE")],
        *[(text, text) for text in ("yes", "no", "on", "off", "y", "1:30", "2024-01-01", "1_000", "<<", "e5", ".")],
        *[("0", 0), ("-19", -19), ("+12", 12), ("010", 10)],
        *[("3e-4", 3e-4), ("1e5", 1e5), ("+12e03", 12e3), ("-2E+05", -2e5), ("0.", 0.0), (".5", 0.5), ("-0.0", -0.0)],
        *[(".inf", float("inf")), ("-.Inf", -float("inf")), ("+.INF", float("inf"))],
    ],
)
def test_a_plain_scalar_is_read_as_the_core_schema_says(text, value):
    read = parse(f"key: {text}")[0]["key"]
    assert (type(read), read) == (type(value), value)


def test_every_key_and_entry_has_the_line_it_stands_on():
    lines = parse("a:\n  b: 1\n  c:\n  - d: 2\n\n  - 3\n'e f': {g: 4,\n  h: 5}\n")[1]
    assert lines == {
        ("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", "0"): 4, ("a", "c", "0", "d"): 4, ("a", "c", "1"): 6,
        ("e f",): 7, ("e f", "g"): 7, ("e f", "h"): 8,
    }  # fmt: skip


def test_keys_given_twice_are_reported_with_the_line_of_the_later_one():
    assert parse("a: {b: 1}\nc: 2\na: 3\n")[2] == [(("a",), 3)]
    assert parse("a: 1\nb: {a: 2}\n")[2] == []


@pytest.mark.parametrize("text", ["a: !!int abc", "a: !!bool maybe", "a: !!float x", f"a: {'9' * 5000}", "[" * 3000])
def test_what_does_not_fit_its_type_is_a_yaml_error(text):
    with pytest.raises(yaml.YAMLError):
        parse(text)
