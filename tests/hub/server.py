"""A Hub on 127.0.0.1: as much of its API as `huggingface_hub` asks for to create, push to and download a model."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """A running server; use it as a context.

    Attributes:
        endpoint: for the environment variable `HF_ENDPOINT`.
        repos: repo id -> path -> content, the head of `main`.
        commits: (repo id, message, paths) in order.
        unanswered: requests that the server had no answer for; the tests want none.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str, list[str]]] = []
        self.unanswered: list[str] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def head(self) -> str:
        """A commit id, 40 hexadecimal digits."""
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        """Apply one commit in the form of the Hub's NDJSON lines."""
        message, paths = "", []
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
                paths.append(value["path"])
            elif line["key"] == "deletedFile":
                self.repos[repo].pop(value["path"])
            else:
                raise ValueError(f"unexpected operation {line['key']}")
        self.commits.append((repo, message, paths))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """No log on the console."""

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for name, text in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self) -> None:
        self.hub.unanswered.append(f"{self.command} {self.path}")
        self._answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        with self.hub.lock:
            if parts == ["api", "repos", "create"]:
                self._create(json.loads(body))
            elif parts == ["api", "validate-yaml"]:
                self._answer(200, {"errors": [], "warnings": []})
            elif parts[:2] == ["api", "models"] and len(parts) == 6 and "/".join(parts[2:4]) in self.hub.repos:
                self._change("/".join(parts[2:4]), parts[4], body)
            else:
                self._refuse()

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
        status = 409 if repo in self.hub.repos else 200
        self.hub.repos.setdefault(repo, {})
        self._answer(status, {"url": f"{self.hub.endpoint}/{repo}", "name": repo})

    def _change(self, repo: str, action: str, body: bytes) -> None:
        if action == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._answer(200, {"files": modes})
        elif action == "commit":
            self.hub.commit(repo, [json.loads(line) for line in body.splitlines()])
            url = f"{self.hub.endpoint}/{repo}/commit/{self.hub.head}"
            self._answer(200, {"success": True, "commitOid": self.hub.head, "commitUrl": url})
        else:
            self._refuse()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        with self.hub.lock:
            if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.hub.repos:
                repo = "/".join(parts[2:4])
                if len(parts) == 4 or parts[4] == "revision":
                    self._describe(repo)
                elif parts[4] == "tree":
                    self._list(repo)
                else:
                    self._refuse()
            elif len(parts) > 4 and parts[2] == "resolve" and "/".join(parts[:2]) in self.hub.repos:
                self._download("/".join(parts[:2]), "/".join(parts[4:]))
            else:
                self._refuse()

    def _describe(self, repo: str) -> None:
        files = [{"rfilename": path} for path in sorted(self.hub.repos[repo])]
        self._answer(
            200, {"_id": "1", "id": repo, "sha": self.hub.head, "private": False, "siblings": files, "tags": []}
        )

    def _list(self, repo: str) -> None:
        files = self.hub.repos[repo].items()
        found = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files]
        self._answer(200, found)

    def _download(self, repo: str, path: str) -> None:
        content = self.hub.repos[repo].get(path)
        if content is None:
            self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            return
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._answer(200, content, {"ETag": tag, "X-Repo-Commit": self.hub.head})
