"""A hub on this machine: a real HTTP server that answers what huggingface_hub asks, ranges included.

It serves folders as repositories, counts the bytes it sends, and can be told to fail in the ways the hub does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_readersonly"


@dataclass
class HubState:
    """What the server serves and how it behaves; tests change it while it runs.

    `breaks_off` maps a file's name to the bytes after which its connection closes; of `corrupt` files one byte is
    changed on the way; `gated` repositories want TOKEN.
    """

    repos: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    breaks_off: dict[str, int] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    sent_bytes: int = 0
    requests: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def hub_server() -> Iterator[HubState]:
    """A running server on loopback; ends with the context."""
    state = HubState()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: HubState

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests read `state.requests`."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", path)
        repo, kind, revision, name = found.groups() if found else (None, None, None, None)
        if repo not in self.state.repos:
            return self._refuse(404, "RepoNotFound", body)
        if repo in self.state.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(403, "GatedRepo", body)
        if revision not in (None, "main", COMMIT):
            return self._refuse(404, "RevisionNotFound", body)
        folder = self.state.repos[repo]
        if kind == "resolve":
            return self._file(folder / (name or ""), body)
        content = _tree(folder) if kind == "tree" else _info(repo, folder)
        return self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, body)

    def _refuse(self, status: int, code: str, body: bool) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, body)

    def _file(self, path: Path, body: bool) -> None:
        if not path.is_file():
            return self._refuse(404, "EntryNotFound", body)
        content = path.read_bytes()
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if path.name in self.state.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, content, headers, body, self.state.breaks_off.get(path.name))
        start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self._send(206, content[start : end + 1], headers, body, self.state.breaks_off.get(path.name))

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], body: bool, stop_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        sent = content if stop_after is None else content[:stop_after]
        self.wfile.write(sent)
        self.state.sent_bytes += len(sent)
        if len(sent) < len(content):
            self.close_connection = True


def _is_large(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin")


def _etag(path: Path) -> str:
    content = path.read_bytes()
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _info(repo: str, folder: Path) -> dict[str, object]:
    files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
    return {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files, "private": False, "tags": []}


def _tree(folder: Path) -> list[dict[str, object]]:
    return [_entry(path) for path in sorted(folder.iterdir())]


def _entry(path: Path) -> dict[str, object]:
    size = path.stat().st_size
    entry: dict[str, object] = {"type": "file", "path": path.name, "size": size, "oid": _etag(path)}
    if _is_large(path):
        entry["lfs"] = {"oid": _etag(path), "size": size, "pointerSize": 134}
    return entry
