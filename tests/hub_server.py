"""A fake Hugging Face Hub to which models can be pushed: it records what it gets, and can refuse.

`with HubServer() as server:` and then, for huggingface_hub: `HF_ENDPOINT=server.url`, `HF_TOKEN=TOKEN`.
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

TOKEN = "hf_" + "A1" * 17


class HubServer(ThreadingHTTPServer):
    """Holds `repositories`, the files of each by name, and how each was `created`.

    Args:
        refuses: Part of a path, the HTTP status and the message by which requests to such a path are answered.
    """

    daemon_threads = True

    def __init__(self, refuses: tuple[str, int, str] | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuses = refuses
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []
        self.created: dict[str, dict[str, Any]] = {}
        self.repositories: dict[str, dict[str, bytes]] = {}

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            is_new = name not in self.created
            self.created.setdefault(name, wanted)
            self.repositories.setdefault(name, {})
            return 200 if is_new else 409, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name, _, what = path.removeprefix("/api/models/").partition("/main")[0].rpartition("/")
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        if what == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.repositories[name] |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 404, {"error": f"no {path}"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = self._body()
        self.server.requests.append(f"{self.command} {path}")
        part, status, message = self.server.refuses or ("", 0, "")
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            status, answer = 401, {"error": "Invalid username or password."}
        elif status and part in path:
            answer = {"error": message, "errors": [{"message": message}]}
        else:
            status, answer = self.server.answer(path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_: object) -> None:
        pass
