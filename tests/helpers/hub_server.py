"""A hub of our own on loopback: what listing and downloading of a model takes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """Attributes: files: by branch. fault: "" or how its files are not had. token: who may read."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    fault: str = ""
    token: str = ""

    @classmethod
    def of(cls, folder: Path, **more: str) -> Repo:
        """All files of a folder."""
        names = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        return cls({"main": {name: path.read_bytes() for name, path in names.items()}}, **more)

    def commit(self, branch: str) -> str:
        told = sorted((n, hashlib.sha1(x).hexdigest()) for n, x in self.files[branch].items())
        return hashlib.sha1(json.dumps(told).encode()).hexdigest()

    def branch(self, revision: str) -> str | None:
        return next((b for b in self.files if revision in (b, self.commit(b))), None)


@dataclass
class Hub:
    """Attributes: asked: (method, path) of each request; got: names of files that were sent."""

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    got: list[str] = field(default_factory=list)
    address: str = ""


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *said: object) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append((self.command, path))
            parts = [unquote(part) for part in path.strip("/").split("/")]
            api = parts[:2] == ["api", "models"]
            id, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4 if api else 2 :]
            repo = hub.repos.get(id)
            if repo is None:
                return self.refuse(401, "RepoNotFound")
            if repo.fault == "down":
                return self.refuse(503)
            if repo.token and self.headers.get("authorization") != f"Bearer {repo.token}":
                return self.refuse(401, "RepoNotFound")
            branch = repo.branch(rest[1] if len(rest) > 1 else "main")
            if branch is None:
                return self.refuse(404, "RevisionNotFound")
            files, commit = repo.files[branch], repo.commit(branch)
            if api and "tree" in rest:
                tree = [
                    {"type": "file", "path": n, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                    for n, x in files.items()
                ]
                return self.send(json.dumps(tree).encode())
            if api:
                about = {"id": id, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
                return self.send(json.dumps(about).encode())
            self.file(repo, "/".join(rest[2:]), files, commit)

        do_HEAD = do_GET

        def file(self, repo: Repo, name: str, files: dict[str, bytes], commit: str) -> None:
            if repo.fault == "gated":
                return self.refuse(403, "GatedRepo")
            if name not in files or repo.fault == "gone":
                return self.refuse(404, "EntryNotFound")
            data = files[name]
            etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
            if self.command == "GET":
                hub.got.append(name)
                if repo.fault == "truncated":
                    data = data[: len(data) // 2]
                if repo.fault == "altered":
                    data = data[:-4] + bytes(4)
            self.send(data, etag)

        def refuse(self, status: int, code: str = "") -> None:
            self.send(b"", {"X-Error-Code": code} if code else {}, status)

        def send(self, data: bytes, more: dict[str, str] | None = None, status: int = 200) -> None:
            self.send_response(status)
            for key, value in {**(more or {}), "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
