"""A stand-in for the hub on loopback: repositories that are read and pushed to, and its requests.

It answers what huggingface_hub 0.27 and 2.4 ask, without the xet protocol. It is not the real hub.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_secretsecretsecretsecret"


def contents_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder by their names in a repository."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@dataclass
class Repository:
    """The commits of a repository; the last one is that of the branch main.

    Attributes:
        private: whether it can be read with the token only.
        commits: files by name, of each commit by its id.
        tags: names of commits.
        ignored: files that its .gitignore keeps out of commits.
    """

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit with these files; return its id."""
        names = [(name, hashlib.sha1(content).hexdigest()) for name, content in files.items()]
        sha = hashlib.sha1(repr((len(self.commits), names)).encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit names."""
        if revision == "main":
            return [*self.commits][-1]
        sha = self.tags.get(revision, revision)
        return sha if sha in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the newest commit."""
        return self.commits[self.find("main") or ""]


@dataclass
class Hub:
    """What the stand-in holds and has seen.

    Attributes:
        repositories: by ``owner/name``.
        objects: large files, by sha256.
        requests: method, path and body of each, in order.
        with_token: those of them that came with an Authorization header.
        fails: answers a request by a status, or with 0 by closing the connection; None for neither.
        address: of the server.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)
    with_token: list[tuple[str, str]] = field(default_factory=list)
    fails: Callable[[str, str], int | None] = lambda *_: None
    address: str = ""

    def add(self, name: str, folder: Path, private: bool = False) -> Repository:
        """Add a repository with the files of a folder."""
        self.repositories[name] = Repository(private)
        self.repositories[name].commit(contents_of(folder))
        return self.repositories[name]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""

    # ------------------------------------------------------------ replies

    def _reply(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: object, status: int = 200, **headers: str) -> None:
        headers["Content_Type"] = "application/json"
        self._reply(json.dumps(content).encode(), status, **headers)

    def _error(self, status: int, text: str, code: str = "") -> None:
        codes = {"X_Error_Code": code} if code else {}
        self._json({"error": text}, status, X_Error_Message=text, **codes)

    # ------------------------------------------------------------ requests

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        authorization = self.headers.get("Authorization")
        self.hub.requests.append((self.command, path, body))
        if authorization:
            self.hub.with_token.append((self.command, path))
        status = self.hub.fails(self.command, path)
        if status == 0:
            self.close_connection = True
            self.connection.close()
            return
        if status:
            self._error(status, f"the stand-in answers {status}")
        elif path == "/":
            self._reply(b"")
        elif authorization not in (None, f"Bearer {TOKEN}"):
            self._error(401, "Invalid credentials in Authorization header")
        elif self.command in ("HEAD", "GET"):
            self._read(path)
        elif path.startswith("/objects/"):
            self._store(path.removeprefix("/objects/"), body)
        elif "/paths-info/" in path:
            self._describe(path, json.loads(body)["paths"])
        elif not authorization:
            self._error(401, "Invalid username or password.")
        else:
            self._write(path, body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _repository(self, name: str) -> Repository | None:
        """Return a repository that may be read; reply and return None if there is none."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.headers.get("Authorization")):
            status = 404 if self.headers.get("Authorization") else 401
            self._error(status, "Repository not found", "RepoNotFound")
            return None
        return found

    # ------------------------------------------------------------ reading

    def _read(self, path: str) -> None:
        parts = path.removeprefix("/datasets").split("/")[1:]
        if parts[0] == "api":
            parts = parts[2:]
        if len(parts) < 2:  # it asks for more than it needs
            self._error(404, f"the stand-in does not know {path}")
            return
        owner, name, kind, revision, *below = [*parts, *("", "main")[len(parts) - 2 :]]
        repository = self._repository(f"{owner}/{name}")
        if repository is None:
            return
        sha = repository.find(revision)
        if sha is None:
            self._error(404, "Invalid rev id", "RevisionNotFound")
        elif kind == "resolve":
            content = repository.commits[sha].get("/".join(below))
            if content is None:
                self._error(404, "Entry not found", "EntryNotFound")
                return
            etag = hashlib.sha1(content).hexdigest()
            self._reply(content, ETag=f'"{etag}"', X_Repo_Commit=sha)
        elif kind == "tree":
            start = "/".join(below)
            self._json([e for e in _entries(repository, sha) if e["path"].startswith(start)])
        else:
            files = repository.commits[sha]
            card = _metadata(files.get("README.md", b""))
            self._json(
                {
                    "id": f"{owner}/{name}",
                    "sha": sha,
                    "private": repository.private,
                    "gated": False,
                    "disabled": False,
                    "tags": card.get("tags", []),
                    "cardData": card,
                    "siblings": [
                        {"rfilename": file, "size": len(content)} for file, content in files.items()
                    ],
                }
            )

    def _describe(self, path: str, wanted: list[str]) -> None:
        owner, name, _, revision = path.split("/")[3:7]
        repository = self._repository(f"{owner}/{name}")
        if repository is not None:
            entries = _entries(repository, repository.find(revision) or "")
            self._json([entry for entry in entries if entry["path"] in wanted])

    # ------------------------------------------------------------ writing

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._error(400, "other bytes than were announced")
            return
        self.hub.objects[oid] = body
        self._reply(b"")

    def _write(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json({"transfer": "basic", "objects": self._uploads(json.loads(body)["objects"])})
        elif "/preupload/" in path:
            self._decide(path, json.loads(body)["files"])
        elif "/commit/" in path:
            self._commit(path, [json.loads(line) for line in body.splitlines()])
        elif path == "/verify":
            self._reply(b"{}")
        else:
            self._error(404, f"the stand-in does not know {path}")

    def _create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self._error(409, "You already created this model repo")
            return
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private)
        self.hub.repositories[name].commit({".gitattributes": b""})
        self._json({"url": f"{self.hub.address}/{name}", "name": name})

    def _decide(self, path: str, files: list[dict]) -> None:
        owner, name = path.split("/")[3:5]
        repository = self.hub.repositories[f"{owner}/{name}"]
        self._json(
            {
                "files": [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs"
                        if one["path"].endswith((".safetensors", ".onnx"))
                        else "regular",
                        "shouldIgnore": one["path"] in repository.ignored,
                    }
                    for one in files
                ]
            }
        )

    def _uploads(self, objects: list[dict]) -> list[dict]:
        verify = {"href": f"{self.hub.address}/verify"}
        return [
            one
            | {
                "actions": {
                    "upload": {"href": f"{self.hub.address}/objects/{one['oid']}"},
                    "verify": verify,
                }
            }
            for one in objects
        ]

    def _commit(self, path: str, lines: list[dict]) -> None:
        owner, name = path.split("/")[3:5]
        repository = self.hub.repositories[f"{owner}/{name}"]
        header, *operations = [(line["key"], line["value"]) for line in lines]
        if header[1].get("parentCommit") not in (None, repository.find("main")):
            self._error(412, "A commit has happened since. Please refresh and try again.")
            return
        files = dict(repository.files)
        for kind, value in operations:
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del files[value["path"]]
        sha = repository.commit(files)
        self._json(
            {"commitUrl": f"{self.hub.address}/{owner}/{name}/commit/{sha}", "commitOid": sha}
        )


def _entries(repository: Repository, sha: str) -> list[dict]:
    return [
        {
            "type": "file",
            "path": name,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }
        for name, content in repository.commits[sha].items()
    ]


def _metadata(card: bytes) -> dict:
    parts = card.decode().split("---\n")
    found = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0] else {}
    return found or {}


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on loopback."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def serve_hub(name: str, folder: Path) -> Iterator[str]:
    """Serve the files of ``folder`` as the data set or model ``name``; yield the address."""
    hub = Hub()
    hub.add(name, folder)
    with serve(hub):
        yield hub.address


def use(hub: Hub, home: Path, patch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
    """Let the hub's library in this process ask the stand-in, with a cache below ``home``."""
    constants = "huggingface_hub.constants."
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in (
        ("ENDPOINT", hub.address),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_CACHE", str(home / "hub")),
        ("HF_TOKEN_PATH", str(home / "token")),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_DISABLE_PROGRESS_BARS", True),
    ):
        patch.setattr(constants + name, value, raising=False)
    patch.setattr(
        "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False
    )
    patch.setenv("HF_HOME", str(home))
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
