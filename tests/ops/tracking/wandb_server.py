"""As much of a W&B server as a run needs that sends its history, on loopback: it remembers what it was sent.

It takes no artifacts, and W&B keeps tables as artifacts.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

ENTITY = "somebody"


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class WandbServer:
    """As a context manager it serves at ``url``.

    Attributes:
        history: by run id, the rows of its history as the server would show them.
        views: what was saved as a view.
    """

    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.views: list[dict[str, Any]] = []
        self._server = _Quiet(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, operation: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The data of a GraphQL answer; None: not taken."""
        project = {"id": "1", "name": asked.get("project"), "entity": {"id": "2", "name": ENTITY}}
        if operation in ("Viewer", "GetDefaultEntity"):
            return {"viewer": {"id": "5", "entity": ENTITY, "username": ENTITY, "flags": "{}"}}
        if operation == "RunResumeStatus":
            return {"model": {**project, "bucket": self._bucket(asked["name"])}}
        if operation == "UpsertBucket":
            bucket = self._bucket(asked["name"]) or {"id": "3", "name": asked["name"], "historyLineCount": 0}
            named = {"displayName": asked["displayName"], "sweepName": None, "description": None}
            return {"upsertBucket": {"bucket": {**bucket, **named, "project": project}, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in asked["files"]]
            return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": files}}
        if operation == "UpsertView2":
            self.views.append(asked)
            return {"upsertView": {"view": {"id": "4", "name": asked["name"]}, "inserted": True}}
        return None

    def take(self, run: str, chunk: dict[str, Any]) -> None:
        """Lines of a run's history, from an offset on."""
        rows = self.history[run]
        rows[chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]

    def _bucket(self, run: str) -> dict[str, Any] | None:
        rows = self.history.get(run)
        if not rows:
            return None
        tail = json.dumps([json.dumps(rows[-1])])
        return {
            "id": "3", "name": run, "displayName": run, "summaryMetrics": "{}", "config": "{}", "tags": [],
            "logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0, "historyTail": tail,
            "eventsTail": "[]", "notes": None, "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self._body()
                if self.path == "/graphql":
                    asked = json.loads(body)
                    named = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                    operation = named.group(1) if named else ""
                    data = server.answer(operation, asked.get("variables") or {})
                    self._reply({"data": data} if data else {"errors": [{"message": f"no {operation}"}]})
                elif self.path.endswith("/file_stream"):
                    chunk = json.loads(body).get("files", {}).get("wandb-history.jsonl")
                    if chunk is not None:
                        server.take(self.path.split("/")[-2], chunk)
                    self._reply({"limits": {}})
                else:
                    self._reply({})

            def do_PUT(self) -> None:
                self._body()
                self._reply({})

            def do_GET(self) -> None:
                self._reply({})

            def _body(self) -> bytes:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

            def _reply(self, content: dict[str, Any]) -> None:
                body = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Silent."""

        return Handler
