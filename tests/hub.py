"""A stand-in for the hub on loopback: one data set or model, and the requests that it gets."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    name = ""
    folder = Path()
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""

    def _reply(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: object) -> None:
        self._reply(json.dumps(content).encode(), Content_Type="application/json")

    def _missing(self, code: str) -> None:
        self._reply(b"{}", 404, X_Error_Code=code)

    def _roots(self) -> tuple[str, str]:
        return f"/datasets/{self.name}/resolve/", f"/{self.name}/resolve/"

    def _entries(self) -> list[dict]:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": str(path.relative_to(self.folder)),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in files
        ]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
        self._json([entry for entry in self._entries() if entry["path"] in wanted])

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        api = f"/api/datasets/{self.name}"
        files = next(
            (start for start in self._roots() if path.startswith(start)), "/of nothing that is here"
        )
        if path == "/":
            self._reply(b"")
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": entry["path"]} for entry in self._entries()]
            info = {"id": self.name, "sha": REVISION, "private": False, "gated": False}
            self._json(info | {"siblings": siblings, "tags": [], "disabled": False})
        elif path.startswith(f"{api}/tree/"):
            below = re.sub(rf"^{api}/tree/[^/]+/?", "", path)
            self._json([e for e in self._entries() if e["path"].startswith(below)])
        elif path.startswith(files):
            file = self.folder / path.removeprefix(files).partition("/")[2]
            if not file.is_file():
                self._missing("EntryNotFound")
                return
            content = file.read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            self._reply(content, ETag=f'"{etag}"', X_Repo_Commit=REVISION)
        else:
            self._missing("RepoNotFound")


@contextlib.contextmanager
def serve_hub(name: str, folder: Path) -> Iterator[str]:
    """Serve the files of ``folder`` as the data set or model ``name``; yield the address."""
    handler = type("Handler", (_Handler,), {"name": name, "folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
