"""A hub for one test: what huggingface_hub asks of a server to make a repository, push files to it and load them.

``python fake_hub.py PORT`` serves one until it is killed.
"""

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = 40 * "a"


class Handler(BaseHTTPRequestHandler):
    """Files of all repositories, by ``owner/name`` and path, in the memory of the server."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.answer({"name": "somebody", "type": "user"})
        if path.startswith("/api/models/"):
            repository = "/".join(path.split("/")[3:5])
            if repository not in self.server.files:
                return self.missing("RepoNotFound")
            siblings = [{"rfilename": name} for name in self.server.files[repository]]
            return self.answer({"id": repository, "sha": REVISION, "private": True, "siblings": siblings})
        if "/resolve/" not in path:
            return self.missing("EntryNotFound")
        owner, name, _, _, *file = path.strip("/").split("/")
        files = self.server.files.get(f"{owner}/{name}")
        if files is None or (content := files.get("/".join(file))) is None:
            return self.missing("RepoNotFound" if files is None else "EntryNotFound")
        return self.send(200, content, {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        path = urlsplit(self.path).path
        if self.headers.get("Authorization") != "Bearer hf_token":
            return self.send(401, b"", {"X-Error-Message": "log in first"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            self.server.files.setdefault(repository, {})
            return self.answer({"url": f"{self.server.url}/{repository}", "id": repository})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repository = "/".join(path.split("/")[3:5])
        if path.split("/")[5] == "preupload":
            asked = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]}
            )
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.files[repository][line["value"]["path"]] = content
        url = f"{self.server.url}/{repository}/commit/{REVISION}"
        return self.answer({"success": True, "commitOid": REVISION, "commitUrl": url, "hookOutput": ""})

    def answer(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def missing(self, code: str) -> None:
        self.send(404, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def hub(port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """A server that runs; its ``url``, and the ``files`` of each repository."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.files, server.url = {}, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    with hub(int(sys.argv[1])):
        threading.Event().wait()
