"""docs/performance.md: its prose is docs/performance.md.j2, its numbers are those of the results in docs/measurements.

What the measurements have in common (machine, revision, day) stands once, in the page's head; a section says where its
own differs. A measurement that is missing is a section that says how to make it.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jinja2

from megagpt.benchmark.figures import COLUMNS, Figure
from megagpt.benchmark.machine import command_of
from megagpt.benchmark.measurements import read_figures, read_measurement
from megagpt.benchmark.suite import CPU, GPU, Entry
from megagpt.benchmark.targets import number
from megagpt.errors import UserError

TEMPLATE = "performance.md.j2"
_SIGNATURE = "Measurement"  # the text in a picture's file that tells what it was drawn from


class Picture(NamedTuple):
    """A picture of the page."""

    measurement: str
    """The name of the result that it shows."""
    part: str
    """The key of what of it is shown."""
    draw: Callable[[Mapping[str, Any], BinaryIO], None]


def _draw_growth(measurement: Mapping[str, Any], file: BinaryIO) -> None:
    from megagpt.benchmark.growth import draw, from_json

    draw(from_json(measurement), file)


def _draw_corpus(measurement: Mapping[str, Any], file: BinaryIO) -> None:
    from megagpt.benchmark.corpus_plot import draw_linear

    draw_linear(measurement["linear"], file)


PICTURES = {
    "performance_growth.png": Picture("growth", "axes", _draw_growth),
    "performance_corpus.png": Picture("corpus", "linear", _draw_corpus),
}
"""By the names of their files."""


def render(folder: Path) -> str:
    """The page, for FOLDER/performance.md, of the results in FOLDER/measurements.

    Raises UserError for a damaged result, or a template that is not there.
    """
    page = _Page(folder / "measurements")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"n": number, "times": _times, "percent": lambda share: f"{share:.0%}"}
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    try:
        return environment.get_template(TEMPLATE).render(page=page)
    except jinja2.TemplateNotFound:
        raise UserError(f"{folder / TEMPLATE}: no such file; choose another folder") from None
    except (jinja2.UndefinedError, TypeError, ValueError) as error:
        if page.being_read is None:
            raise
        raise UserError(f"{page.being_read}: damaged ({error}); measure it again") from None


def drawn(picture: Picture, measurement: Mapping[str, Any]) -> bytes:
    """The PNG file of a result, which tells in itself what it was drawn from."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    content, signed, text = io.BytesIO(), io.BytesIO(), PngInfo()
    picture.draw(measurement, content)
    text.add_text(_SIGNATURE, _digest(measurement[picture.part]))
    Image.open(content).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE).save(
        signed, "PNG", pnginfo=text, optimize=True
    )
    return signed.getvalue()


def is_drawn_from(content: bytes, picture: Picture, measurement: Mapping[str, Any]) -> bool:
    """Whether `drawn` made the PNG file from it; fonts and versions of libraries may differ."""
    from PIL import Image

    try:
        found = Image.open(io.BytesIO(content)).info.get(_SIGNATURE)
    except OSError:  # it is no picture, or cut off
        return False
    return found == _digest(measurement[picture.part])


def _digest(part: object) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()


class _Page:
    """What the template asks for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {entry.name: entry for entry in (*CPU, *GPU)}
        self.figures: dict[str, list[Figure]] = {}
        self.measurements: dict[str, dict[str, Any]] = {}
        self.origins: dict[str, dict[str, str]] = {}
        self.being_read: Path | None = None
        """The file whose content the template shows at the moment."""
        for name, entry in self.entries.items():
            self.figures[name] = read_figures(self._file(name), entry.targets)
            if measurement := read_measurement(self._file(name)):
                self.measurements[name] = measurement
                self.origins[name] = _origin(measurement, self._file(name))

    def measurement(self, name: str) -> dict[str, Any] | None:
        """None: there is none."""
        self.being_read = self._file(name)
        return self.measurements.get(name)

    def measurement_ends(self) -> str:
        """What follows is no matter of a file."""
        self.being_read = None
        return ""

    def command(self, name: str) -> str:
        """That was measured, or that measures it."""
        if name in self.measurements:
            return self.measurements[name]["command"]
        return command_of(self.entries[name].arguments(Path("PATH/model.py")))

    def common(self) -> dict[str, str]:
        """Day, revision and machine of most measurements, in words; rates are ranges over all on that machine."""
        if not self.origins:
            return {}
        return {key: Counter(origin[key] for origin in self.origins.values()).most_common(1)[0][0] for key in _ORIGIN}

    def rates(self) -> dict[str, tuple[float, float]]:
        """The lowest and the highest of each rate that the machine of `common` reached."""
        machine = self.common().get("machine")
        found: dict[str, list[float]] = {}
        for name, measurement in self.measurements.items():
            if self.origins[name]["machine"] == machine:
                for rate, value in measurement["machine"]["rates"]["cpu"].items():
                    found.setdefault(rate, []).append(value)
        return {name: (min(rates), max(rates)) for name, rates in found.items()}

    def differences(self, name: str) -> list[str]:
        """Where the measurement differs from `common`, in words."""
        origin, common = self.origins[name], self.common()
        words = [f"{_ORIGIN[key]} {origin[key]}" for key in _ORIGIN if origin[key] != common[key]]
        if origin["machine"] != common["machine"]:
            words.append(origin["rates"])
        return words

    def rows(self, name: str, *parts: str) -> str:
        """Its figures whose names begin with one of `parts`, as the rows of a table; all figures without any."""
        figures = [figure for figure in self.figures[name] if not parts or figure.name.startswith(parts)]
        return _table(COLUMNS, [figure.cells() for figure in figures])

    def targets(self) -> str:
        """All figures that have a target, and targets that were not measured, as a table."""
        rows = []
        for name, entry in self.entries.items():
            rows += [(entry.title, *figure.cells()) for figure in self.figures[name] if figure.target is not None]
            measured = {figure.name for figure in self.figures[name]}
            rows += [
                (entry.title, figure, "not measured", "", target.text, "")
                for figure, target in entry.targets.items()
                if figure not in measured
            ]
        return _table(("section", *COLUMNS), rows)

    def missed(self) -> list[str]:
        """The names of the figures that miss their targets."""
        return [figure.name for figures in self.figures.values() for figure in figures if figure.met is False]

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"


_ORIGIN = {"day": "measured on", "revision": "at", "machine": "on"}


def _origin(measurement: Mapping[str, Any], path: Path) -> dict[str, str]:
    """In words. Raises UserError."""
    try:
        return {
            "day": measurement["date"][:10],
            "revision": _code(measurement["revision"]),
            "machine": _machine(measurement["machine"]),
            "rates": "; ".join(_rates(measurement["machine"])),
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); measure it again") from None


def _code(revision: Mapping[str, Any] | None) -> str:
    if not revision:
        return "a revision that is not known"
    return f"revision {revision['commit']}{' with uncommitted changes' if revision['changed'] else ''}"


def _machine(machine: Mapping[str, Any]) -> str:
    """In words, without its rates."""
    flags = f" ({', '.join(machine['matrix_flags'])})" if machine["matrix_flags"] else ""
    parts = [f"{machine['cpus']} cores of {machine['processor']}{flags}", f"{machine['memory_gib']} GiB of memory"]
    for gpu, count in Counter((gpu["name"], gpu["memory_gib"]) for gpu in machine["gpus"]).items():
        parts.append(f"{count} x {gpu[0]} with {gpu[1]} GiB, driver {machine['driver']}, CUDA {machine['cuda']}")
    parts.append(f"{machine['threads']} threads")
    return "; ".join([*parts, ", ".join(f"{name} {version}" for name, version in machine["versions"].items())])


def _rates(machine: Mapping[str, Any]) -> list[str]:
    return [
        f"its {device} at {number(rates['bf16_gflops'])} GFLOP/s in products of bf16 matrices "
        f"and {number(rates['read_gb_per_second'])} GB/s from memory"
        for device, rates in machine["rates"].items()
    ]


def _times(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """In Markdown, without columns in which nothing stands; without rows, nothing."""
    if not rows:
        return ""
    kept = [column for column in zip(columns, *rows, strict=True) if any(column[1:])]
    head, *body = zip(*kept, strict=True)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body))
