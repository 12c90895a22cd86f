"""A hub on this machine: repositories in memory, behind the few requests that huggingface_hub makes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34


@dataclass
class Repo:
    """Commits by their hash, each all of its files; branches and tags point at them."""

    name: str
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str = "main", message: str = "") -> str:
        text = f"{len(self.commits)} {sorted((name, hashlib.sha1(c).hexdigest()) for name, c in files.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        self.messages.append(message)
        return sha

    def add_folder(self, folder: Path, ref: str = "main") -> str:
        names = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return self.commit({path.relative_to(folder).as_posix(): path.read_bytes() for path in names}, ref)

    def at(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    @property
    def main(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


@dataclass
class Hub:
    """The server, its repositories by name, and every request that reached it."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add(self, name: str, folder: Path | None = None, private: bool = False) -> Repo:
        self.repos[name] = Repo(name, private)
        if folder is not None:
            self.repos[name].add_folder(folder)
        return self.repos[name]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._note()
        if path.startswith("/api/models/"):
            return self._api(path.removeprefix("/api/models/"))
        if path == "/api/whoami-v2":
            return self._json({"name": "me", "type": "user", "auth": {}})
        name, _, rest = path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        found = self._found(name, unquote(revision))
        if found is None:
            return None
        repo, sha = found
        content = repo.commits[sha].get(unquote(file))
        if content is None:
            return self._fail(404, "EntryNotFound", sha)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        return self._send(200, content, "application/octet-stream", headers)

    def do_POST(self) -> None:
        path = self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if not self._known():
            return self._fail(401, None)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        name, verb, revision = self._split(path.removeprefix("/api/models/"))
        repo = self.state.repos[name]
        if verb == "branch":
            repo.refs.setdefault(revision, repo.refs["main"])
            return self._json({})
        if verb == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._json({"files": modes})
        return self._commit(repo, revision, body)

    def _create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.state.repos:
            return self._json({"url": f"{self.state.url}/{name}"}, 409)
        self.state.add(name, private="private" in (asked.get("visibility"), asked.get("private") and "private")).commit(
            {}
        )
        return self._json({"url": f"{self.state.url}/{name}", "name": name})

    def _commit(self, repo: Repo, revision: str, body: bytes) -> None:
        files, message = dict(repo.commits[repo.refs[revision]]), ""
        for line in body.decode().splitlines():
            step = json.loads(line)
            if step["key"] == "header":
                message = step["value"]["summary"]
            elif step["key"] == "file":
                files[step["value"]["path"]] = base64.b64decode(step["value"]["content"])
            elif step["key"] == "deletedFile":
                del files[step["value"]["path"]]
        sha = repo.commit(files, revision, message)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.state.url}/{repo.name}/commit/{sha}"})

    def _api(self, path: str) -> None:
        name, verb, revision = self._split(path)
        found = self._found(name, revision)
        if found is None:
            return None
        repo, sha = found
        files = [{"type": "file", "path": p, "size": len(c), "oid": sha} for p, c in repo.commits[sha].items()]
        if verb == "tree":
            return self._json(files)
        siblings = [{"rfilename": file["path"]} for file in files]
        return self._json({"id": name, "sha": sha, "siblings": siblings, "private": repo.private, "tags": []})

    def _split(self, path: str) -> tuple[str, str, str]:
        owner, name, *rest = path.strip("/").split("/")
        return f"{owner}/{name}", rest[0] if rest else "", unquote(rest[1]) if len(rest) > 1 else "main"

    def _found(self, name: str, revision: str) -> tuple[Repo, str] | None:
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and not self._known()):
            self._fail(401, "RepoNotFound")
            return None
        sha = repo.at(revision)
        if sha is None:
            self._fail(404, "RevisionNotFound")
            return None
        return repo, sha

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _note(self) -> str:
        path = urlsplit(self.path).path
        self.state.requests.append(f"{self.command} {path}")
        return path

    def _fail(self, status: int, code: str | None, sha: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": str(code), "X-Repo-Commit": sha}
        self._send(status, b"{}", "application/json", {key: value for key, value in headers.items() if value})

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", {})

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
