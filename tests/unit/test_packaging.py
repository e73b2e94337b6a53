"""constraints.txt pins every dependency of setup.py exactly once for each Python that setup.py allows."""

import runpy
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PINNED_EXTRAS = ("dev", "mpi", "export", "web")


def pins(python: str) -> list[Requirement]:
    """The lines of constraints.txt that hold for a Python version."""
    text = ROOT.joinpath("constraints.txt").read_text(encoding="utf-8")
    lines = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    return [line for line in lines if line.marker is None or line.marker.evaluate({"python_version": python})]


def requirements() -> list[Requirement]:
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    arguments = setup.call_args.kwargs
    extras = [text for extra in PINNED_EXTRAS for text in arguments["extras_require"][extra]]
    return [Requirement(text) for text in arguments["install_requires"] + extras]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_each_package_has_one_exact_version_for_each_python(python):
    names = [canonicalize_name(pin.name) for pin in pins(python)]
    assert len(names) == len(set(names))
    assert all([clause.operator for clause in pin.specifier] == ["=="] for pin in pins(python))
    assert not [pin for pin in pins(python) if "+" in str(pin.specifier)], "a local version fits one machine only"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_each_requirement_of_setup_py_is_pinned_at_a_version_it_allows(python):
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins(python)}
    for requirement in requirements():
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"
