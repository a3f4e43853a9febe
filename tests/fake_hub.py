"""A local stand-in for the Hugging Face Hub's API: what huggingface_hub asks for when it fetches and pushes models."""

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

import pytest

TOKEN = "hf_secretTokenOfTheTests"


@dataclass
class Repo:
    """A model: its branches, each at a commit, and the files of every commit."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        known = self.commits.get(self.branches.get(branch, ""), {})
        sha = hashlib.sha1(repr((len(self.commits), sorted({**known, **files}))).encode()).hexdigest()
        self.commits[sha] = {**known, **files}
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The server's state; `requests` are (method, path, authorization) of all that was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.url = ""

    def add(self, name: str, folder: Path, branch: str = "main") -> str:
        """Put a folder's files on a branch; gives the commit."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.repos.setdefault(name, Repo()).commit(files, branch)

    def downloads(self) -> list[str]:
        """Paths of the files that were fetched."""
        return [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, code: str, status: int = 404) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _begin(self) -> list[str]:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path, self.headers.get("Authorization") or ""))
        return [unquote(part) for part in path.strip("/").split("/")]

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        allowed = repo is not None and (not repo.private or self.headers.get("Authorization") == f"Bearer {TOKEN}")
        if repo is None or not allowed:
            self._refuse("RepoNotFound", 401 if not self.headers.get("Authorization") else 404)
            return None
        if repo.gated:
            self._refuse("GatedRepo", 403)
            return None
        return repo

    def do_GET(self) -> None:
        parts = self._begin()
        at = 2 if parts[:2] == ["api", "models"] else 0
        repo = self._repo("/".join(parts[at : at + 2]))
        if repo is None:
            return None
        what, revision, rest = parts[at + 2], parts[at + 3], "/".join(parts[at + 4 :])
        sha = repo.find(revision)
        if sha is None:
            return self._refuse("RevisionNotFound")
        files = repo.commits[sha]
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": "/".join(parts[at : at + 2]), "sha": sha, "siblings": siblings})
        if what == "tree":
            hashes = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
            return self._json([{"type": "file", "path": n, "size": len(files[n]), "oid": h} for n, h in hashes.items()])
        if rest not in files:
            return self._refuse("EntryNotFound")
        tag = hashlib.sha256(files[rest]).hexdigest()
        return self._answer(200, files[rest], {"X-Repo-Commit": sha, "ETag": f'"{tag}"'})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        parts = self._begin()
        self.hub.uploads[parts[-1]] = self._body()
        self._answer(200)

    def do_POST(self) -> None:
        parts, body = self._begin(), self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.repos:
                return self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            self.hub.repos[name] = Repo(private=bool(asked.get("private")) or asked.get("visibility") == "private")
            self.hub.repos[name].commit({".gitattributes": b""}, message="initial commit")
            return self._json({"url": f"{self.hub.url}/{name}", "name": name})
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}}
            return self._json({"transfer": "basic", "objects": objects})
        repo = self.hub.repos["/".join(parts[2:4])]
        what, revision = parts[4], parts[5]
        if what == "branch":
            if revision in repo.branches:
                return self._json({"error": "exists"}, 409)
            repo.branches[revision] = repo.branches["main"]
            return self._json({})
        if revision not in repo.branches:
            return self._refuse("RevisionNotFound")
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [("lfs" if f["path"].endswith(".safetensors") else "regular") for f in files]
            answer = [{"path": f["path"], "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes, strict=True)]
            return self._json({"files": answer})
        sent, message = {}, ""
        for line in body.splitlines():
            value = json.loads(line)["value"]
            kind = json.loads(line)["key"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                sent[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                sent[value["path"]] = self.hub.uploads[value["oid"]]
        sha = repo.commit(sent, revision, message)
        name = "/".join(parts[2:4])
        return self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub at `hub.url`, until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def used(monkeypatch: pytest.MonkeyPatch, cache: Path, token: str = "") -> Iterator[Hub]:
    """A hub that huggingface_hub talks to in this process, with a cache of its own."""
    from huggingface_hub import constants

    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setenv("HF_TOKEN", token)
        yield hub
