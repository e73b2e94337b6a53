"""The schema in words: which keys exist, what each expects. Error messages and docs/configuration.md share them."""

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from megagpt.config.batch import join_choices
from megagpt.config.schema import RunConfig, Section

_BOUNDS: tuple[tuple[type, str, str], ...] = (
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Lt, "lt", "below"),
    (annotated_types.Le, "le", "at most"),
)
_SCALARS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def all_keys(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key below `section` that takes a value, as (dotted name, field): ("model.hidden_size", ...)."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from all_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def nested_section(annotation: Any) -> type[Section] | None:
    """The section that a value of this type consists of, itself or as a list's entries; None for plain values."""
    if get_origin(annotation) is list:
        (annotation,) = get_args(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def choices(annotation: Any) -> list[str]:
    """The values of a Literal type as they are written in YAML; empty for other types."""
    return [str(choice) for choice in get_args(annotation)] if get_origin(annotation) is Literal else []


def expectation(field: FieldInfo) -> str:
    """What a field accepts: "a whole number above 0, or null", "bf16, fp16 or fp32"."""
    words = _expectation(field.annotation, field.metadata)
    return f"{words}, or null" if _is_nullable(field.annotation) else words


def _is_nullable(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType) and types.NoneType in get_args(annotation)


def _expectation(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    if _is_nullable(annotation):
        annotation = Union[tuple(arg for arg in get_args(annotation) if arg is not types.NoneType)]  # noqa: UP007
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _expectation(arguments[0], [item for info in arguments[1:] for item in info.metadata])
    if origin is Literal:
        return join_choices(choices(annotation))
    if annotation in _SCALARS:
        bounds = [f"{words} {getattr(item, name)}" for kind, name, words in _BOUNDS for item in metadata
                  if isinstance(item, kind)]  # fmt: skip
        return " ".join([_SCALARS[annotation], *filter(None, [" and ".join(bounds)])])
    section = nested_section(annotation)
    if origin is list:
        least = next((item.min_length for item in metadata if isinstance(item, annotated_types.MinLen)), 0)
        values = join_choices(choices(arguments[0])) if choices(arguments[0]) else _expectation(arguments[0])
        entries = f"{{{', '.join(section.model_fields)}}}" if section else values
        return f"a list of {entries}" + (f", at least {least}" if least else "")
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_expectation(arguments[0])}"
    if origin is dict and arguments[1] is float:
        return "a mapping of names to numbers"
    return f"a section with {', '.join(section.model_fields)}" if section else "a mapping of JSON values"
