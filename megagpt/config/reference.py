"""docs/configuration.md, made from the schema: one table a section with each key's type, default and meaning."""

import inspect
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from megagpt.config.describe import expectation, nested_section
from megagpt.config.schema import RunConfig, Section
from megagpt.config.yaml12 import dump

_HEAD = """\
# Configuration

<!-- Written by `python -m tools.config_docs` from megagpt/config/schema.py; change that file and run it again. -->

A run is configured by a YAML file (configs/ has some to start from) and by `section.key=value` arguments, which win:

    python -m launch.train configs/small.yaml train.steps=200 optimizer.lr=1e-3 'data.train=[{path: data/a/train}]'

Values are YAML 1.2: only `true` and `false` are booleans, `3e-4` is a number. A list's entries count from 0:
`data.train.0.path=data/b/train`. Unknown keys, wrong types and values that contradict each other are errors, all
reported at once. The run folder's `config.yaml` holds the resolved configuration.
"""


def reference() -> str:
    """The reference of all configuration keys as Markdown."""
    parts = [_HEAD]
    for name, field in RunConfig.model_fields.items():
        section = nested_section(field.annotation)
        if section:
            parts += _tables(section, f"{name}.")
        else:
            parts.append(f"## {name}\n\n{_table([(name, field)])}")
    return "\n".join(parts)


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
        rows.append((f"`{key}`", expectation(field), default, field.description or ""))
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)
