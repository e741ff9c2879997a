"""A Hub on 127.0.0.1: as much of its API as `huggingface_hub` asks for to create, push to and download a model, and as
`datasets` asks for to load a data set."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

TOKEN, USER, ORGANIZATION = "hf_test", "somebody", "lab"
#: Those of the Hub's lists that the tests need.
LICENSES = {"apache-2.0", "mit", "other"}
PIPELINE_TAGS = {
    "text-classification", "token-classification", "tabular-regression", "tabular-classification", "graph-ml",
    "image-classification", "text-generation",
}  # fmt: skip


class Hub:
    """A running server; use it as a context.

    Attributes:
        endpoint: for the environment variable `HF_ENDPOINT`.
        repos: repo id (of a data set with `datasets/` before it) -> path -> content, the head of `main`.
        branches: (repo id, branch) -> path -> content, of the others.
        private: ids of those that are.
        commits: (repo id, message, paths) in order.
        blobs: SHA-256 -> content of large files, uploaded before the commit that names them.
        large: files of this many bytes or more are large; None: none is.
        dies_in_upload: the number of the large file that the server dies in the middle of; None: it does not.
        uploads: SHA-256 of the large files that came whole, in order.
        unanswered: requests that the server had no answer for; the tests want none.
    """

    def __init__(self, large: int | None = None) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[tuple[str, str, list[str]]] = []
        self.blobs: dict[str, bytes] = {}
        self.large = large
        self.dies_in_upload: int | None = None
        self.begun = 0
        self.uploads: list[str] = []
        self.unanswered: list[str] = []
        self.is_up = True
        self.lock = threading.Lock()
        self._server = self._listen(0)
        self._port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"

    def _listen(self, port: int) -> ThreadingHTTPServer:
        return ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        """From now on, nobody answers, on connections that are open neither."""
        self.is_up = False
        self._server.shutdown()
        self._server.server_close()

    def start_again(self) -> None:
        """At the same address, with what came before it stopped."""
        self.dies_in_upload, self.is_up = None, True
        self._server = self._listen(self._port)
        self.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, folder: Path, token: str | None = TOKEN) -> dict[str, str]:
        """The environment of a process that knows this Hub alone, with its caches in `folder`."""
        found = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        found.update(HF_ENDPOINT=self.endpoint, HF_HOME=str(folder / "home"), HF_HUB_DISABLE_TELEMETRY="1")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_TOKEN"):
            found.pop(name, None)
        found["HF_HUB_DISABLE_XET"] = "1"
        return found if token is None else {**found, "HF_TOKEN": token}

    @property
    def head(self) -> str:
        """A commit id, 40 hexadecimal digits."""
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.branches.get((repo, revision), self.repos[repo])

    def commit(self, repo: str, revision: str, lines: list[dict[str, Any]]) -> None:
        """Apply one commit in the form of the Hub's NDJSON lines."""
        message, paths, files = "", [], self.files(repo, revision)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                paths.append(value["path"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
                paths.append(value["path"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                raise ValueError(f"unexpected operation {line['key']}")
        self.commits.append((repo, message, paths))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def parse_request(self) -> bool:
        self.close_connection = not self.hub.is_up
        return self.hub.is_up and super().parse_request()

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

    def _is_known(self) -> bool:
        """Whether the token is one; answers where it is not."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, {"error": "Invalid credentials in Authorization header"})
        return False

    @property
    def _parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    # --- writing -------------------------------------------------------------------------------------------------

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self._parts
        with self.hub.lock:
            if parts[:2] == ["api", "datasets"]:  # reading, though by POST
                self._read_set("/".join(parts[1:4]), parts[4:], parse_qs(body.decode()))
            elif not self._is_known():
                return
            elif parts == ["api", "repos", "create"]:
                self._create(json.loads(body))
            elif parts == ["api", "validate-yaml"]:
                errors = card_errors(json.loads(body)["content"])
                found = {"errors": [{"message": error} for error in errors], "warnings": []}
                self._answer(400 if errors else 200, found)
            elif parts[2:] == ["info", "lfs", "objects", "batch"]:
                self._plan_uploads(json.loads(body)["objects"])
            elif parts[:2] == ["api", "models"] and len(parts) == 6 and "/".join(parts[2:4]) in self.hub.repos:
                self._change("/".join(parts[2:4]), parts[4], parts[5], body)
            else:
                self._refuse()

    def _create(self, wanted: dict[str, Any]) -> None:
        owner = wanted.get("organization") or USER
        if owner not in (USER, ORGANIZATION):
            self._answer(403, {"error": f'You don\'t have the rights to create a model under the namespace "{owner}"'})
            return
        repo = f"{owner}/{wanted['name']}"
        is_there = repo in self.hub.repos
        if not is_there and wanted.get("visibility") == "private":
            self.hub.private.add(repo)
        self.hub.repos.setdefault(repo, {})
        self._answer(409 if is_there else 200, {"url": f"{self.hub.endpoint}/{repo}", "name": repo})

    def _change(self, repo: str, action: str, revision: str, body: bytes) -> None:
        if action == "preupload":
            self._answer(200, {"files": [self._mode(repo, revision, file) for file in json.loads(body)["files"]]})
        elif action == "commit":
            self.hub.commit(repo, revision, [json.loads(line) for line in body.splitlines()])
            url = f"{self.hub.endpoint}/{repo}/commit/{self.hub.head}"
            self._answer(200, {"success": True, "commitOid": self.hub.head, "commitUrl": url})
        elif action == "branch":
            self.hub.branches.setdefault((repo, revision), dict(self.hub.repos[repo]))
            self._answer(200, {})
        else:
            self._refuse()

    def _mode(self, repo: str, revision: str, file: dict[str, Any]) -> dict[str, Any]:
        is_large = self.hub.large is not None and file["size"] >= self.hub.large
        mode = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        content = self.hub.files(repo, revision).get(file["path"])
        if content is None:
            return mode
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content)
        return {**mode, "oid": hashlib.sha256(content).hexdigest() if is_large else blob.hexdigest()}

    def _plan_uploads(self, objects: list[dict[str, Any]]) -> None:
        planned = []
        for one in objects:
            wanted = {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}
            planned.append(one if one["oid"] in self.hub.blobs else {**one, "actions": wanted})
        self._answer(200, {"transfer": "basic", "objects": planned})

    def do_PUT(self) -> None:
        size, oid = int(self.headers["Content-Length"]), self._parts[-1]
        with self.hub.lock:
            number, self.hub.begun = self.hub.begun, self.hub.begun + 1
        if number == self.hub.dies_in_upload:
            while len(self.hub.uploads) < number:  # several are sent at the same time
                time.sleep(0.01)
            self.rfile.read(size // 2)
            self.hub.stop()
            self.close_connection = True
            return
        content = self.rfile.read(size)
        with self.hub.lock:
            assert hashlib.sha256(content).hexdigest() == oid
            self.hub.blobs[oid] = content
            self.hub.uploads.append(oid)
            self._answer(200, {})

    # --- reading -------------------------------------------------------------------------------------------------

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self._parts
        with self.hub.lock:
            if parts == ["api", "agent-harnesses"]:  # asked by huggingface_hub where it thinks that a program runs it
                self._answer(200, {})
            elif parts == ["api", "whoami-v2"]:
                if self._is_known():
                    self._answer(200, {"type": "user", "name": USER, "orgs": [{"name": ORGANIZATION}]})
            elif parts[:2] == ["api", "datasets"]:
                self._read_set("/".join(parts[1:4]), parts[4:], {})
            elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
                if self._is_seen("/".join(parts[:3])):
                    self._download("/".join(parts[:3]), parts[4], "/".join(parts[5:]))
            elif parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.hub.repos:
                repo = "/".join(parts[2:4])
                revision = parts[5] if len(parts) > 5 else "main"
                if repo in self.hub.private and not self._is_known():
                    return
                if len(parts) == 4 or parts[4] == "revision":
                    self._describe(repo, revision)
                elif parts[4] == "tree":
                    self._list(repo, revision)
                else:
                    self._refuse()
            elif len(parts) > 4 and parts[2] == "resolve" and "/".join(parts[:2]) in self.hub.repos:
                self._download("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self._refuse()

    def _is_seen(self, repo: str) -> bool:
        """Whether the repository is there for whoever asks; answers where it is not, as the Hub does: a private one is
        none without a token."""
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo in self.hub.repos and (has_token or repo not in self.hub.private):
            return True
        said = "Repository not found" if has_token else "Invalid username or password."
        self._answer(404 if has_token else 401, {"error": said}, {"X-Error-Code": "RepoNotFound"})
        return False

    def _read_set(self, repo: str, asked: list[str], form: dict[str, list[str]]) -> None:
        if not self._is_seen(repo):
            return
        action, revision = asked[0] if asked else "revision", asked[1] if len(asked) > 1 else "main"
        if action == "revision":
            self._describe(repo, revision)
        elif action == "tree":
            self._list_folder(repo, revision, "/".join(asked[2:]))
        elif action == "paths-info":
            known = self._files_and_folders(repo, revision)
            self._answer(200, [known[path] for path in form["paths"] if path in known])
        else:
            self._refuse()

    def _files_and_folders(self, repo: str, revision: str) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for path, content in self.hub.files(repo, revision).items():
            oid = hashlib.sha1(content).hexdigest()
            found[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
            for folder in list(PurePosixPath(path).parents)[:-1]:
                found[str(folder)] = {"type": "directory", "path": str(folder), "oid": oid}
        return found

    def _list_folder(self, repo: str, revision: str, folder: str) -> None:
        known = self._files_and_folders(repo, revision)
        if folder and folder not in known:
            self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            return
        deep = parse_qs(urlsplit(self.path).query).get("recursive") in (["True"], ["true"])
        own = PurePosixPath(folder)
        inside = [path for path in map(PurePosixPath, known) if own in path.parents if deep or path.parent == own]
        self._answer(200, [known[str(path)] for path in inside])

    def _describe(self, repo: str, revision: str) -> None:
        files = [{"rfilename": path} for path in sorted(self.hub.files(repo, revision))]
        facts = {"private": repo in self.hub.private, "siblings": files, "tags": []}
        self._answer(200, {"_id": "1", "id": repo, "sha": self.hub.head, **facts})

    def _list(self, repo: str, revision: str) -> None:
        files = self.hub.files(repo, revision).items()
        found = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files]
        self._answer(200, found)

    def _download(self, repo: str, revision: str, path: str) -> None:
        content = self.hub.files(repo, revision).get(path)
        if content is None:
            self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            return
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._answer(200, content, {"ETag": tag, "X-Repo-Commit": self.hub.head})


def card_errors(card: str) -> list[str]:
    """What the Hub says of a card whose head it cannot use."""
    _, _, rest = card.partition("---\n")
    try:
        head = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"]
    if not isinstance(head, dict):
        return ["the metadata are no mapping"]
    errors = []
    if head.get("license", "mit") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if head.get("pipeline_tag", "graph-ml") not in PIPELINE_TAGS:
        errors.append('"pipeline_tag" is none that is known')
    for key in ("tags", "datasets", "language"):
        if not all(isinstance(value, str) for value in head.get(key, [])):
            errors.append(f'"{key}" must be a list of texts')
    if "model-index" in head:
        _, results = model_index_to_eval_results(head["model-index"])
        if not all(isinstance(result.metric_value, int | float) for result in results):
            errors.append('"model-index": a value is no number')
    return errors
