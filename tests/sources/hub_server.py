"""As much of the Hugging Face hub's API as huggingface_hub asks to find a commit's files, on loopback."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from urllib.parse import parse_qs, unquote

from tests.sources.web_server import Fault, Handler, Request, WebServer


class HubServer:
    """Repositories by name, each with commits by revision; ``web.site`` has the log and the faults."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.web = WebServer(certificate)
        self.url = self.web.url
        self.commits: dict[str, dict[str, bytes]] = {}  # files by commit
        self.revisions: dict[tuple[str, str], str] = {}  # commits by repository and revision
        self.names: dict[str, str] = {}  # what a repository is called now
        self.token: str | None = None
        self.web.route(GET=self._get, POST=self._paths)

    def push(self, repository: str, revision: str = "main", **files: bytes) -> str:
        """A commit, to which ``revision`` leads from now on."""
        names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
        content = {names.get(name, name): data for name, data in files.items()}
        commit = hashlib.sha1(repr((repository, sorted(content.items()))).encode()).hexdigest()
        self.commits[commit] = content
        self.revisions[repository, revision] = self.revisions[repository, commit] = commit
        for name, data in content.items():
            self.web.site.files[f"/{repository}/resolve/{commit}/{name}"] = data
        return commit

    def fail(self, path: str, *faults: Fault) -> None:
        self.web.site.fail(path, *faults)

    def close(self) -> None:
        self.web.close()

    def _get(self, handler: Handler) -> None:
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", handler.path.partition("?")[0])
        if match is None:
            if self._denied(handler):
                return
            handler.answer("GET")
            return
        request = Request("GET", handler.path, handler.headers)
        self.web.site.requests.append(request)
        waiting = self.web.site.faults[handler.path]
        if waiting and waiting.popleft()(handler, request):
            return
        if self._denied(handler):
            return
        repository, revision = match.group(1), unquote(match.group(2) or "main")
        commit = self.revisions.get((repository, revision))
        if commit is None:
            known = any(repository == name for name, _ in self.revisions)
            handler.head(404, Content_Length="0", X_Error_Code="RevisionNotFound" if known else "RepoNotFound")
            return
        self._json(handler, {"id": self.names.get(repository, repository), "sha": commit, "siblings": [], "tags": []})

    def _paths(self, handler: Handler) -> None:
        form = parse_qs(handler.rfile.read(int(handler.headers["Content-Length"])).decode())
        request = Request("POST", handler.path, handler.headers)
        self.web.site.requests.append(request)
        waiting = self.web.site.faults[handler.path]
        if (waiting and waiting.popleft()(handler, request)) or self._denied(handler):
            return
        files = self.commits[handler.path.rpartition("/")[2]]
        self._json(handler, [_described(name, files[name]) for name in form["paths"] if name in files])

    def _denied(self, handler: Handler) -> bool:
        if self.token is None or handler.headers["Authorization"] == f"Bearer {self.token}":
            return False
        handler.head(401, Content_Length="0", X_Error_Code="RepoNotFound", X_Error_Message="Invalid credentials")
        return True

    def _json(self, handler: Handler, answer: object) -> None:
        body = json.dumps(answer).encode()
        handler.head(200, Content_Type="application/json", Content_Length=str(len(body)))
        handler.wfile.write(body)


def _described(name: str, content: bytes) -> dict[str, object]:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    described: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": oid}
    if name.endswith(".safetensors"):
        digest = hashlib.sha256(content).hexdigest()
        described["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return described
