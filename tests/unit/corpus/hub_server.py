"""A server that speaks as much of the Hugging Face hub's API as resolving and streaming a data set takes."""

import http.server
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(rf"/api/datasets/(?P<repo>.+?)(?:/(?P<call>revision|tree|paths-info)/{COMMIT}/?(?P<path>.*))?$")
_FILE = re.compile(rf"/datasets/(?P<repo>.+)/resolve/{COMMIT}/(?P<path>.+)$")


class Hub:
    """The data sets of a server: the files of each, by name; what it was asked; and how it fails."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repositories = repositories
        self.ranges: list[tuple[str, int, int]] = []
        """File, first byte and first byte after it, of each range that was given."""
        self.breaks_at: int | None = None
        """Byte of a file of data at which the connection breaks, whenever it is in a range; None: nowhere."""
        self.breaks_left = 10**9
        """How often it does."""
        self.requests: Counter[str] = Counter()
        """Number of requests by their first word."""
        self.url = ""


@contextmanager
def serving(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    """A hub with these data sets, at `url` while in the context."""
    hub = Hub(repositories)

    class Handler(_Handler):
        state = hub

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Tests have their own output."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self) -> None:
        self.state.requests[self.command] += 1
        path = unquote(urlsplit(self.path).path).replace("/main", f"/{COMMIT}")
        if (call := _API.match(path)) and (files := self.state.repositories.get(call["repo"])) is not None:
            self._answer_api(call["repo"], files, call["call"], call["path"] or "")
        elif (call := _FILE.match(path)) and (files := self.state.repositories.get(call["repo"])) is not None:
            if call["path"] in files:
                self._send_file(call["path"], files[call["path"]])
            else:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _answer_api(self, repo: str, files: Mapping[str, bytes], call: str | None, folder: str) -> None:
        if call in (None, "revision"):
            siblings = [{"rfilename": name} for name in files]
            answer: Any = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        else:
            entries = {}
            for name, content in files.items():
                if name.startswith(f"{folder}/" if folder else ""):
                    entries[name] = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for end in [place for place, letter in enumerate(name) if letter == "/"]:
                        entries[name[:end]] = {"type": "directory", "path": name[:end], "size": 0, "oid": "1" * 40}
            answer = [entry for name, entry in sorted(entries.items()) if len(name) > len(folder)]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name: str, content: bytes) -> None:
        headers = {"ETag": f'"{hash(content) & 0xFFFFFFFF:x}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked:
            self._send(200, content, headers)
            return
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        break_at = self.state.breaks_at
        if break_at is not None and start <= break_at < stop and self.state.breaks_left > 0:
            self.state.breaks_left -= 1
            self._send(206, content[start:stop], headers, most=break_at - start)
            return
        self.state.ranges.append((name, start, stop))
        self._send(206, content[start:stop], headers)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str], most: int | None = None) -> None:
        """Answer; break the connection after `most` bytes."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:most])
        if most is not None:
            self.close_connection = True
