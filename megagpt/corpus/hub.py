"""Datasets of the Hugging Face hub as input: `hf:NAME[:CONFIG][:SPLIT]`, read as streams and never downloaded whole.

Without CONFIG the default one is meant, without SPLIT `train` (or the only one); with one name after NAME it is a
configuration if there is such, else a split. A dataset stands for its data files at the commit that is the newest when
the run is planned; they are read in ranges of bytes, so that a large one can be read by several workers. Each range is
tried a few times; then the run ends, and can be continued.
"""

import contextlib
import dataclasses
import io
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megagpt.corpus.sources import HUB_SCHEME, Format, SourceFile, one_line
from megagpt.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.utils import httpx

HUB_PREFIX = "hf:"
_DATASETS_URL = f"{HUB_SCHEME}datasets/"
_FORMAT_OF_MODULE: dict[str, Format] = {"json": "jsonl", "parquet": "parquet", "arrow": "arrow", "text": "auto"}
"""What the files of a dataset hold, by the module of `datasets` that reads them; auto: what their names say."""

_LEAST_BYTES, _MOST_BYTES = 1 << 16, 8 << 20  # of a request
_TIMEOUT_SECONDS = 10.0  # of connecting, and of waiting for the next bytes
_WAITS_SECONDS = (0.5, 1.5)  # before the second and the third try
_LONGEST_WAIT_SECONDS = 300.0  # that a busy hub can ask for: its limits of requests are for five minutes
_BUSY, _TRANSIENT = 429, frozenset({408, 429, 500, 502, 503, 504})


# Names


def hub_files(name: str, format: Format) -> list[SourceFile]:
    """The data files that `hf:NAME[:CONFIG][:SPLIT]` means, read as `format`.

    UserError: the hub cannot be reached, or has no such dataset, configuration or split, or nothing in it is text.
    """
    where = f"input {one_line(name)}"
    dataset, *choice = name.removeprefix(HUB_PREFIX).split(":")
    if not dataset or len(choice) > 2:
        raise UserError(f"{where}: is not of the form hf:NAME[:CONFIG][:SPLIT], as in hf:allenai/c4:en:train")
    commit = _newest_commit(where, dataset)
    with _hub_errors(where, dataset):
        module, urls = _data_files(where, dataset, commit, choice)
        files = [_describe(where, url, format) for url in urls]
    if format != "auto":
        return files
    return [_with_known_kind(where, file, module) for file in files]


def _with_known_kind(where: str, file: SourceFile, module: str) -> SourceFile:
    """The file, read as its name tells, or, if that tells nothing, as `module` of `datasets` would read it."""
    if file.kind != "text":  # the module is the same for all configurations, which may be of several kinds
        return file
    if module not in _FORMAT_OF_MODULE:
        kinds = ", ".join(_FORMAT_OF_MODULE)
        raise UserError(f"{where}: its files are of the kind {module}; only {kinds} can be read as text")
    return dataclasses.replace(file, format=_FORMAT_OF_MODULE[module])


def _newest_commit(where: str, dataset: str) -> str:
    """Asked first, without the retries of other requests: offline, they would take minutes."""
    from huggingface_hub import HfApi

    with _hub_errors(where, dataset):
        commit = HfApi().dataset_info(dataset, timeout=_TIMEOUT_SECONDS).sha
    assert commit is not None  # the hub always tells it
    return commit


def _data_files(where: str, dataset: str, commit: str, choice: Sequence[str]) -> tuple[str, list[str]]:
    """The module that would read the chosen split, and the URLs of its files."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # such as warnings of dataset cards without metadata
    configs = datasets.get_dataset_config_names(dataset, revision=commit)
    config, split = _config_and_split(choice, configs)
    config = config or (configs[0] if len(configs) == 1 else None)
    config = config or datasets.get_dataset_default_config_name(dataset, revision=commit)
    if config not in configs:
        problem = "there is no default configuration" if config is None else f"there is no configuration {config!r}"
        raise UserError(f"{where}: {problem}; choose one of {_some(configs)}, as in hf:{dataset}:{configs[0]}")
    builder = datasets.load_dataset_builder(dataset, config, revision=commit)
    files: Mapping[str, list[str]] = builder.config.data_files or {}
    splits = list(map(str, files))
    split = split or ("train" if "train" in files or len(splits) != 1 else splits[0])
    if split not in splits:
        of_config = f" of configuration {config!r}" if len(configs) > 1 else ""
        raise UserError(
            f"{where}: there is no split {split!r}{of_config}; choose one of {_some(splits)}, as in "
            f"hf:{dataset}:{config}:{splits[0] if splits else split}"
            + (f"; configurations are {_some(configs)}" if len(configs) > 1 else "")
        )
    return type(builder).__module__.rpartition(".")[2], list(files[split])


def _config_and_split(choice: Sequence[str], configs: Sequence[str]) -> tuple[str | None, str | None]:
    match choice:
        case [config, split]:
            return config or None, split or None
        case [either] if either in configs:
            return either, None
        case [split]:
            return None, split or None
    return None, None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"


def _describe(where: str, url: str, format: Format) -> SourceFile:
    from huggingface_hub import HfFileSystem

    if not url.startswith(_DATASETS_URL):
        raise UserError(f"{where}: {one_line(url)} does not lie in a dataset of the hub; download it and give its path")
    info: dict[str, Any] = HfFileSystem().info(url)
    return SourceFile(url, info["size"], 0, found_in_folder=False, format=format)


@contextlib.contextmanager
def _hub_errors(where: str, dataset: str) -> Iterator[None]:
    """Says what the hub's and the libraries' errors mean for the user."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
    from huggingface_hub.utils import httpx

    try:
        yield
    except GatedRepoError as error:
        page = f"https://huggingface.co/datasets/{dataset}"
        raise UserError(f"{where}: access must be asked for at {page}; then log in with hf auth login") from error
    except RepositoryNotFoundError as error:
        advice = "check the name; if the dataset is private, log in with hf auth login"
        raise UserError(f"{where}: the hub has no such dataset; {advice}") from error
    except (OfflineModeIsEnabled, httpx.TransportError, ConnectionError) as error:
        raise UserError(
            f"{where}: the Hugging Face hub cannot be reached ({_line(error)}); where it can be, run hf download "
            f"{dataset} --repo-type dataset --local-dir FOLDER, bring the folder here and give it as input"
        ) from error
    except (OSError, RuntimeError, ValueError, httpx.HTTPError) as error:  # what `datasets` and the hub raise
        raise UserError(f"{where}: cannot be read from the hub: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:500] or type(error).__name__


# Content


def open_hub_file(file: SourceFile, wanted: int) -> io.BufferedReader:
    """The content of a file on the hub, which can seek, and of which about `wanted` bytes will be read."""
    return io.BufferedReader(_HubFile(file), min(max(wanted, _LEAST_BYTES), _MOST_BYTES))


class _HubFile(io.RawIOBase):
    """A file on the hub; each read is a request. UserError: it cannot be read, says where."""

    def __init__(self, file: SourceFile) -> None:
        from huggingface_hub import hf_hub_url

        self._file = file
        self._position = 0
        repository, _, rest = file.name.removeprefix(_DATASETS_URL).partition("@")
        commit, _, path = rest.partition("/")
        self._url = hf_hub_url(repository, path, repo_type="dataset", revision=commit)

    def readable(self) -> bool:
        """As io.RawIOBase has it."""
        return True

    def seekable(self) -> bool:
        """As io.RawIOBase has it."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As io.RawIOBase has it."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        return self._position

    def tell(self) -> int:
        """As io.RawIOBase has it."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """As io.RawIOBase has it."""
        stop = min(self._position + min(len(buffer), _MOST_BYTES), self._file.size)
        if stop <= self._position:
            return 0
        content = self._fetch(self._position, stop)
        buffer[: len(content)] = content
        self._position = stop
        return len(content)

    def _fetch(self, start: int, stop: int) -> bytes:
        """The bytes of a range, in a few tries."""
        from huggingface_hub.utils import httpx

        problem = ""
        for wait in (0.0, *_WAITS_SECONDS):
            time.sleep(wait)
            try:
                response, content = self._request(start, stop)
            except (httpx.TransportError, httpx.DecodingError) as error:
                problem = _line(error)
                continue
            if response.status_code == 206 and len(content) == stop - start:
                return content
            problem = f"HTTP {response.status_code} with {len(content)} of {stop - start} bytes"
            if response.status_code not in _TRANSIENT | {200, 206}:
                break
            if response.status_code == _BUSY:
                time.sleep(_asked_seconds(response))
        raise UserError(
            f"{one_line(self._file.name)}: bytes {start} to {stop} cannot be read from the hub: {problem}; "
            "run the same command again to go on"
        )

    def _request(self, start: int, stop: int) -> "tuple[httpx.Response, bytes]":
        """The response to one request, and its content, of which no more than is asked for is read."""
        from huggingface_hub.utils import build_hf_headers, get_session

        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        content = bytearray()
        with get_session().stream("GET", self._url, headers=headers, timeout=_TIMEOUT_SECONDS) as response:
            if response.status_code == 206:
                for part in response.iter_bytes():
                    content += part
                    if len(content) > stop - start:
                        break
        return response, bytes(content)


def _asked_seconds(response: "httpx.Response") -> float:
    """How long a busy hub asks to wait."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), _LONGEST_WAIT_SECONDS) if text.isdigit() else 0.0
