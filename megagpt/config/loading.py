"""Configuration files: YAML in, a validated RunConfig (or another schema) out, and back.

`section.key=value` overrides are applied on top of the file. All problems are collected, each with its file and line
or its override, and raised as one ConfigError.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megagpt.config.batch import join_choices
from megagpt.config.describe import all_keys, choices, expectation, nested_section
from megagpt.config.schema import RunConfig, Section
from megagpt.config.yaml12 import KeyPath, describe_error, dump, parse
from megagpt.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)


Override = str | tuple[str, Any]
"""What replaces a value of the file: "section.key=value" with a YAML value, or key and value as they are."""


class Source(NamedTuple):
    """Where a value was written: `rank` sorts lines before overrides, `label` is "small.yaml:12" or "override a=b"."""

    rank: tuple[int, int]
    label: str


class Problem(NamedTuple):
    """One thing to mend, and where."""

    source: Source
    text: str


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration from the YAML file `path` and apply `overrides` in order.

    An override is "section.key=value" with a YAML value: "train.steps=100", "data.train=[{path: a, weight: 2}]",
    "data.train.0.path=b". Raises ConfigError that names every problem of file and overrides at once.
    """
    return load_section(RunConfig, path, overrides)


def load_section(
    schema: type[SectionT], path: str | os.PathLike[str] | None, overrides: Sequence[Override] = ()
) -> SectionT:
    """Like `load_config`, for any schema; without a file (path None) the overrides are all there is.

    An override may also be a pair such as ("train.steps", 100), for values that are not YAML, or hard to write in it.
    """
    tree, lines, problems = _read_file(Path(path), schema) if path is not None else ({}, {}, [])
    sources: dict[KeyPath, Source] = {(): Source((0, 0), "configuration" if path is None else str(path))}
    sources |= {key_path: Source((0, line), f"{path}:{line}") for key_path, line in lines.items()}
    for number, override in enumerate(overrides):
        label = override if isinstance(override, str) else f"{override[0]}={override[1]!r}"
        source = Source((1, number), f"override {' '.join(label.split())}")
        try:
            key_path, value, inner_paths = _parse_override(override)
            tree = _replaced(tree, key_path, value)
        except ValueError as error:
            problems.append(Problem(source, str(error)))
        else:
            sources = {known: at for known, at in sources.items() if known[: len(key_path)] != key_path}
            for end in range(1, len(key_path) + 1):
                sources.setdefault(key_path[:end], source)
            sources |= {(*key_path, *inner): source for inner in inner_paths}
    nullable = {name for name, field in schema.model_fields.items() if field.default is None}
    tree = {name: {} if value is None and name not in nullable else value for name, value in tree.items()}  # "logging:"
    tree = _known_keys(tree, schema, schema, (), sources, problems)
    try:
        config = schema.model_validate(tree)
    except ValidationError as error:
        problems += _validation_problems(error, schema, tree, sources)
    if problems:
        raise ConfigError(_message(problems))
    return config


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write the resolved configuration as YAML, atomically; `load_config(path)` gives the same configuration back."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(dump(config.model_dump()))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _read_file(path: Path, schema: type[Section]) -> tuple[dict[str, Any], dict[KeyPath, int], list[Problem]]:
    """A file's tree, the line of each of its keys, and the keys that it has twice."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration file: {error.strerror}") from None
    try:
        tree, lines, duplicates = parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}:{describe_error(error, text)}") from None
    if tree is None:
        required = [key for key, field in all_keys(schema) if field.is_required()]
        raise ConfigError(f"{path}: the configuration is empty; it needs at least {' and '.join(required)}")
    if not isinstance(tree, dict):
        sections = join_choices(schema.model_fields)
        raise ConfigError(f"{path}: expected sections ({sections}), but it is {_show(tree)}")
    problems = [
        Problem(Source((0, line), f"{path}:{line}"), f"{'.'.join(key_path)}: given twice; remove one")
        for key_path, line in duplicates
    ]
    return tree, lines, problems


# Overrides


def _parse_override(override: Override) -> tuple[KeyPath, Any, Iterable[KeyPath]]:
    """Split "section.key=value" into key, value and the keys within the value; raises ValueError with what is wrong."""
    if not isinstance(override, str):
        return tuple(override[0].split(".")), override[1], ()
    key, separator, value_text = override.partition("=")
    if not separator or not key.strip():
        raise ValueError("expected section.key=value, for example train.steps=100")
    if not value_text.strip():
        raise ValueError(f"no value after '='; write {key}=null to unset it")
    try:
        value, lines, duplicates = parse(value_text)
    except yaml.YAMLError as error:
        raise ValueError(f"line {describe_error(error, value_text)}") from None
    if duplicates:
        raise ValueError(f"{'.'.join(duplicates[0][0])} is given twice; remove one")
    return tuple(key.strip().split(".")), value, lines


def _replaced(tree: Any, path: KeyPath, value: Any) -> Any:
    """`tree` with `value` at `path`, missing mappings made on the way; raises ValueError for a missing list entry."""
    if not path:
        return value
    name, rest = path[0], path[1:]
    if isinstance(tree, list):
        if not name.isdecimal() or int(name) >= len(tree):
            raise ValueError(f"no entry {name}; the list has {len(tree)}, counted from 0")
        return [_replaced(item, rest, value) if index == int(name) else item for index, item in enumerate(tree)]
    mapping = tree if isinstance(tree, dict) else {}
    return {**mapping, name: _replaced(mapping.get(name), rest, value)}


# Problems


def _known_keys(
    value: Any,
    section: type[Section],
    schema: type[Section],
    path: KeyPath,
    sources: dict[KeyPath, Source],
    problems: list[Problem],
) -> Any:
    """`value` with the section's keys only; what a misspelt key holds goes to the key that was meant, to be checked."""
    if isinstance(value, list):
        return [_known_keys(item, section, schema, (*path, str(i)), sources, problems) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    known = {name: child for name, child in value.items() if name in section.model_fields}
    for name in [str(name) for name in value if name not in known]:
        source = _source_of((*path, name), sources)
        near, advice = _nearest_key(name, section, schema, path)
        problems.append(Problem(source, f"{'.'.join((*path, name))}: unknown key; {advice}"))
        if near and near not in known:
            known[near] = value[name]
            sources[(*path, near)] = source
    for name, child in known.items():
        if child_section := nested_section(section.model_fields[name].annotation):
            known[name] = _known_keys(child, child_section, schema, (*path, name), sources, problems)
    return known


def _nearest_key(name: str, section: type[Section], schema: type[Section], path: KeyPath) -> tuple[str | None, str]:
    """The key of `section` that `name` was meant to be, if one is near, and the advice to print."""
    fields = list(section.model_fields)
    for near in difflib.get_close_matches(name, fields, n=1):
        return near, f"did you mean {'.'.join((*path, near))}?"
    elsewhere = [key for key, _ in all_keys(schema) if key.rpartition(".")[2] == name]
    if elsewhere:
        return None, f"did you mean {join_choices(elsewhere)}?"
    return None, f"{'.'.join(path) or 'a configuration'} has {', '.join(fields)}"


def _validation_problems(
    error: ValidationError, schema: type[Section], tree: Any, sources: dict[KeyPath, Source]
) -> Iterator[Problem]:
    """Pydantic's errors in our words, one for each field."""
    seen = set()
    for details in error.errors():
        key_path, field = _field_at(schema, tuple(map(str, details["loc"])))
        context = details.get("ctx", {})
        if details["type"] == "between_sections":
            key_path, text = tuple(context["key"].split(".")), context["message"]
        elif details["type"] == "value_error":
            text = str(context["error"])
        elif details["type"] == "missing":
            text = f"required, but not given; expected {expectation(field)}"
        else:
            text = _wrong_value(_value_at(tree, key_path), field)
        if key_path not in seen:
            seen.add(key_path)
            yield Problem(_source_of(key_path, sources), f"{'.'.join(key_path)}: {text}")


def _field_at(schema: type[Section], location: KeyPath) -> tuple[KeyPath, FieldInfo]:
    """The innermost configuration key that a pydantic location lies in, with its field."""
    section: type[Section] | None = schema
    field, end = schema.model_fields[location[0]], 0
    for position, name in enumerate(location):
        if section and name in section.model_fields:
            field, end = section.model_fields[name], position + 1
            section = nested_section(field.annotation)
    return location[:end], field


def _value_at(tree: Any, path: KeyPath) -> Any:
    for name in path:
        tree = tree[int(name)] if isinstance(tree, list) else tree[name]
    return tree


def _wrong_value(value: Any, field: FieldInfo) -> str:
    text = f"expected {expectation(field)}, but it is {_show(value)}"
    near = difflib.get_close_matches(str(value), choices(field.annotation), n=1)
    return f"{text}; did you mean {near[0]}?" if near else text


def _show(value: Any) -> str:
    """A value as YAML writes it, on one short line."""
    line = f"the text {value!r}" if isinstance(value, str) else dump(value, flow=True).strip()
    return f"{line[:77]}..." if len(line) > 80 else line


def _source_of(path: KeyPath, sources: dict[KeyPath, Source]) -> Source:
    """Where the value at `path`, or the nearest thing around it, was written."""
    while path not in sources:
        path = path[:-1]
    return sources[path]


def _message(problems: list[Problem]) -> str:
    lines = [
        f"{problem.source.label}: {problem.text}"
        for problem in sorted(problems, key=lambda problem: problem.source.rank)
    ]
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems in the configuration", *lines])
