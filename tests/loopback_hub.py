"""A Hub of one process on loopback: as much of its HTTP interface as `huggingface_hub` asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class LoopbackHub(ThreadingHTTPServer):
    """Models by their names, each one commit of files without Git LFS."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def sha(self, model: str) -> str:
        """Of the model's only commit."""
        return hashlib.sha1(repr(sorted(self.models[model].items())).encode()).hexdigest()


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A Hub that serves while the block runs."""
    with LoopbackHub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._path()
        if path == "/api/repos/create":
            told = json.loads(body)
            model = "/".join(filter(None, (told.get("organization"), told["name"])))
            self.server.models.setdefault(model, {})
            self._json({"url": f"{self.server.endpoint}/{model}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch("/api/models/(.+)/preupload/main", path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": name, **regular} for name in paths]})
        elif match := re.fullmatch("/api/models/(.+)/commit/main", path):
            files = self.server.models[match[1]]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            sha = self.server.sha(match[1])
            url = f"{self.server.endpoint}/{match[1]}/commit/{sha}"
            self._json({"commitUrl": url, "commitOid": sha, "success": True})
        else:
            self._json({"error": "no such thing"}, 404)

    def do_GET(self) -> None:
        path = self._path()
        match = re.fullmatch("/api/models/(.+)/(revision|tree)/.+", path)
        if match and match[1] in self.server.models:
            files = self.server.models[match[1]]
            tree = [{"type": "file", "path": name, "size": len(files[name]),
                     "oid": hashlib.sha1(files[name]).hexdigest()} for name in files]  # fmt: skip
            siblings = [{"rfilename": name} for name in files]
            info = {"id": match[1], "sha": self.server.sha(match[1]), "siblings": siblings}
            self._json(info if match[2] == "revision" else tree)
            return
        match = re.fullmatch("/(.+)/resolve/[^/]+/(.+)", path)
        if match and match[2] in self.server.models.get(match[1], {}):
            content = self.server.models[match[1]][match[2]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._send(content, 200, {"X-Repo-Commit": self.server.sha(match[1]), "ETag": etag})
            return
        self._json({"error": "no such thing"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def _path(self) -> str:
        self.server.requests.append(f"{self.command} {self.path}")
        return unquote(urlsplit(self.path).path)

    def _json(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(json.dumps(value).encode(), code, {**kind, **(headers or {})})

    def _send(self, content: bytes, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `requests` has it."""
