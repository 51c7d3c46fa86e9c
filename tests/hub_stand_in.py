"""A Hub on this machine: the few answers that `hf download` and `hf cache verify` ask for, and a connection that breaks when told to."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 39 + "1"


@dataclass
class Hub:
    """Repositories by "models/OWNER/NAME" or "datasets/OWNER/NAME", each with its files' bytes.

    Attributes:
        broken: path of a file -> how many bytes its first transfer yields before the connection breaks.
        asked: (path of a file, the Range header or None) of each transfer.
    """

    repositories: dict[str, dict[str, bytes]]
    broken: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    address: str = ""

    def tree(self, repository: str) -> list[dict[str, Any]]:
        """As the Hub lists files: each one as if it were in LFS, so that its sha256 is published."""
        return [
            {"type": "file", "path": path, "size": len(data), "oid": "1" * 40,
             "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
            for path, data in self.repositories[repository].items()
        ]  # fmt: skip


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, body: bytes, status: int = 200, send: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:send])

        def do_GET(self) -> None:
            path = self.path.split("?")[0].removeprefix("/")
            if path.startswith("api/"):
                parts = path.removeprefix("api/").split("/")
                if len(parts) < 4:  # who calls, which version: not needed here
                    return self.answer(b"", 404)
                kind, owner, name, what = parts[:4]
                repository = f"{kind}/{owner}/{name}"
                found = hub.tree(repository) if what == "tree" else {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []}
                return self.answer(json.dumps(found).encode(), Content_Type="application/json")
            path = path if path.startswith("datasets/") else f"models/{path}"
            repository, file = path.split("/resolve/")
            file = file.split("/", 1)[1]
            data = hub.repositories[repository][file]
            etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            if self.command == "HEAD":
                return self.answer(data, **etag)
            asked = self.headers["Range"]
            hub.asked.append((file, asked))
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            more = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
            self.answer(data[start:], 206 if start else 200, hub.broken.pop(file, None), **etag, **more)

        do_HEAD = do_GET

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The Hub at `hub.address`, which is what HF_ENDPOINT takes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
