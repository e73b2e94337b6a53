"""YAML 1.2 for configuration files: its core schema, with the line of every key.

3e-4 is a number, only true and false are booleans, `no`, 010 and 2024-01-01 are what they look like (text, 10, text).
https://yaml.org/spec/1.2.2/#103-core-schema, without hexadecimal and octal numbers.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

KeyPath = tuple[str, ...]
"""Where a value stands in the tree: ("data", "train", "0", "path")."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: no other types, no merge keys, no octal or base-60 numbers."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.1 or 1.2 would read as something else."""


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Double quotes escape what PyYAML's other styles would lose or fold: line breaks of any kind."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Dumper.add_representer(str, _represent_str)


def dump(value: Any, flow: bool = False) -> str:
    """`value` as YAML that `parse` reads back; `flow`: all on one line, else the innermost only."""
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20, default_flow_style=flow or None
    )
    return text.removesuffix("...\n")  # PyYAML's end mark after a lone scalar


def parse(text: str) -> tuple[Any, dict[KeyPath, int], list[tuple[KeyPath, int]]]:
    """The value of a YAML document, the line of each key, and (key, line) of repeated keys; raises yaml.YAMLError."""
    loader = _Loader(text)
    root = None
    try:
        root = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        duplicates: list[tuple[KeyPath, int]] = []
        for key_path, line in _key_lines(root, (), ()):
            if key_path in lines:
                duplicates.append((key_path, line))
            lines[key_path] = line
        value = None if root is None else loader.construct_document(root)
    except (ValueError, KeyError, RecursionError) as error:  # !!int abc, a number of 5,000 digits, 3,000 brackets
        mark = None if root is None else root.start_mark
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"a value does not fit its type: {error}"
        raise yaml.constructor.ConstructorError(None, None, reason, mark) from error
    finally:
        loader.dispose()
    return value, lines, duplicates


def _key_lines(node: yaml.Node | None, path: KeyPath, parents: tuple[yaml.Node, ...]) -> Iterator[tuple[KeyPath, int]]:
    if any(node is parent for parent in parents):
        raise yaml.composer.ComposerError(None, None, "an alias contains itself", parents[-1].start_mark)
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(index), value, value) for index, value in enumerate(node.value)]
    else:
        return
    for name, marked, value in children:
        yield (*path, name), marked.start_mark.line + 1
        yield from _key_lines(value, (*path, name), (*parents, node))


def describe_error(error: yaml.YAMLError, text: str) -> str:
    """A YAML error as one line that starts with its line number."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        words = [part for part in (error.context, error.problem) if part]
        return f"{mark.line + 1 if mark else 1}: not valid YAML: {', '.join(words)}"
    position = getattr(error, "position", 0)  # yaml.reader.ReaderError
    return f"{text.count(chr(10), 0, position) + 1}: not valid YAML: {str(error).splitlines()[0]}"
