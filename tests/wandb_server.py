"""A fake W&B server: it answers wandb 0.31 well enough for online runs, records requests, and can fail.

`with WandbServer() as server:` and then, for wandb: `WANDB_BASE_URL=server.url`, `WANDB_API_KEY=KEY`.
"""

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

KEY = "0123456789" * 4


class WandbServer(ThreadingHTTPServer):
    """Records `requests`, such as `Viewer` (an operation of GraphQL) or `PUT /storage/...`, and the data of `runs`.

    Args:
        status: Requests are answered by this HTTP status, such as 500 or 403.
        closes: Connections are closed without an answer, and then refused.
        hangs: Requests are not answered; their connections stay open.
        fails_after: This many requests are answered before it fails. Like the failures, it may be set later.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, *, status: int = 200, closes: bool = False, hangs: bool = False, fails_after: int = 0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.closes, self.hangs, self.fails_after = status, closes, hangs, fails_after
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, bytes] = {}
        self.lock, self.ended = threading.Lock(), threading.Event()

    def run(self, name: str) -> dict[str, Any]:
        """All about one run. Rows that came again after an interruption have the same `_step`."""
        new: dict[str, Any] = {"upserts": [], "history": [], "summary": {}, "exit_code": None}
        return self.runs.setdefault(name, {**new, "complete": False, "resumes": 0})

    def graphql(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data of an answer; missing objects are null."""
        project = {"id": "P", "name": given.get("project"), "entity": {"id": "E", "name": "guest"}}
        put: dict[str, Any] = {"id": "F", "uploadUrl": f"{self.url}/storage/manifest", "uploadHeaders": []}
        match operation:
            case "Viewer":
                teams = {"edges": [{"node": {"name": "guest"}}]}
                return {"viewer": {"id": "V", "entity": "guest", "username": "guest", "flags": "{}", "teams": teams}}
            case "RunResumeStatus" if given["name"] in self.runs:
                run = self.run(given["name"])
                run["resumes"] += 1
                bucket = {"id": "B", "name": given["name"], "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]"}
                bucket |= {"historyTail": json.dumps([json.dumps(row) for row in run["history"][-1:]])}
                bucket |= {"historyLineCount": len(run["history"]), "summaryMetrics": json.dumps(run["summary"])}
                bucket |= {"config": run["upserts"][-1].get("config", "{}"), "tags": [], "wandbConfig": '{"t": 1}'}
                return {"model": {**project, "bucket": bucket}}
            case "UpsertBucket":
                run = self.run(given["name"])
                run["upserts"].append({key: value for key, value in given.items() if value is not None})
                bucket = {"id": "B", "name": given["name"], "displayName": given.get("displayName"), "project": project}
                bucket |= {"config": "{}", "historyLineCount": len(run["history"])}
                return {"upsertBucket": {"bucket": bucket, "inserted": len(run["upserts"]) == 1}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in given["files"]]
                return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
            case "CreateArtifact":  # a wandb.Table is one
                artifact = {"id": "A", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
                return {"createArtifact": {"artifact": artifact}}
            case "CreateArtifactManifest":
                return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": put}}}
            case "CreateArtifactFiles":
                names = [file["name"] for file in given["input"]["artifactFiles"]]
                put |= {"artifact": {"id": "A"}}  # without it wandb's own process crashes
                files = [put | {"storagePath": n, "uploadUrl": f"{self.url}/storage/{n}"} for n in names]
                return {"createArtifactFiles": {"files": {"edges": [{"node": file} for file in files]}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": "A", "digest": "0"}}}
        return {"model": {**project, "bucket": None}, "project": {"artifact": None}, "serverInfo": {"features": []}}

    def file_stream(self, name: str, sent: dict[str, Any]) -> None:
        run = self.run(name)
        for file, part in (sent.get("files") or {}).items():
            rows = [json.loads(line) for line in part["content"]]
            if file == "wandb-history.jsonl":
                run["history"][part["offset"] :] = rows
            elif file == "wandb-summary.json":
                run["summary"] = rows[-1]
        if sent.get("complete"):
            run["complete"], run["exit_code"] = True, sent["exitcode"]

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def _handle(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request, answer = json.loads(body) if path == "/graphql" else None, {}
        operation = re.split(r"\W+", request["query"].strip(), maxsplit=2)[1] if request else ""
        with server.lock:
            server.requests.append(operation or f"{self.command} {path}")
            fails = len(server.requests) > server.fails_after
            if not fails or not (server.closes or server.hangs or server.status != 200):
                if request:
                    answer = {"data": server.graphql(operation, request.get("variables") or {})}
                elif stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
                    server.file_stream(stream[1], json.loads(body))
                else:
                    server.uploads[path] = body
        if fails and server.hangs:
            server.ended.wait()
        if fails and server.closes:
            server.socket.close()
        if fails and (server.hangs or server.closes):
            self.close_connection = True
            return
        content = json.dumps(answer).encode()
        self.send_response(server.status if fails else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _handle

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def black_hole() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
