"""Pages made from a schema, such as docs/configuration.md: a table a section, each key's type, default and meaning."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from megagpt.config.describe import expectation, nested_section
from megagpt.config.schema import RunConfig, Section
from megagpt.config.yaml12 import dump

RUN_HEAD = """\
# Configuration

<!-- Written by `python -m tools.config_docs` from megagpt/config/schema.py; change that file and run it again. -->

A run is configured by a YAML file (configs/ has some to start from) and by `section.key=value` arguments, which win:

    python -m launch.train configs/small.yaml train.steps=200 optimizer.lr=1e-3 'data.train=[{path: data/a/train}]'

Values are YAML 1.2: only `true` and `false` are booleans, `3e-4` is a number. A list's entries count from 0:
`data.train.0.path=data/b/train`. Unknown keys, wrong types and values that contradict each other are errors, all
reported at once. The run folder's `config.yaml` holds the resolved configuration.
"""


def reference(schema: type[Section] = RunConfig, head: str = RUN_HEAD) -> str:
    """The reference of all keys of a configuration as Markdown, after `head`."""
    parts = [head]
    for is_section, group in itertools.groupby(schema.model_fields.items(), lambda item: _section_of(item) is not None):
        fields = list(group)
        if is_section:
            parts += [part for name, field in fields for part in _tables(_section_of((name, field)), f"{name}.")]
        else:
            parts.append(f"## {', '.join(name for name, _ in fields)}\n\n{_table(fields)}")
    return "\n".join(parts)


def _section_of(item: tuple[str, FieldInfo]) -> Any:
    return nested_section(item[1].annotation)


def _tables(section: type[Section], prefix: str) -> Iterator[str]:
    """A section's table, then those of the sections whose entries it lists."""
    fields = [(prefix + name, field) for name, field in section.model_fields.items()]
    yield f"## {prefix.rstrip('.')}\n\n{inspect.getdoc(section)}\n\n{_table(fields)}"
    lists: dict[type[Section], list[str]] = {}
    for key, field in fields:
        if entry := nested_section(field.annotation):
            lists.setdefault(entry, []).append(f"`{key}`")
    for entry, keys in lists.items():
        yield f"Entries of {' and '.join(keys)}:\n\n{_table(list(entry.model_fields.items()))}"


def _table(fields: list[tuple[str, FieldInfo]]) -> str:
    rows = [("Key", "Value", "Default", "Meaning"), ("---",) * 4]
    for key, field in fields:
        default = "required" if field.is_required() else f"`{dump(field.default, flow=True).strip()}`"
        rows.append((f"`{key}`", expectation(field), default, " ".join((field.description or "").split())))
    return "".join(f"| {' | '.join(_escaped(cell) for cell in row)} |\n" for row in rows)


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|").replace("<", "&lt;")
