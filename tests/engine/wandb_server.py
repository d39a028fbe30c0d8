"""A small W&B server on this machine, for the real client. It speaks just enough GraphQL to take a run and
its history.

works     takes everything, and remembers it: a resumed run learns how many lines are held
silent    accepts connections and never answers
refuses   401 to everything: the key is wrong
dies      takes the run, then never answers again
"""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "project", "name": "practice", "entity": {"name": "me"}}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, habit: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.habit = habit
        self.history: dict[int, dict[str, Any]] = {}  # by W&B's step
        self.repeated: list[int] = []
        self.received = b""
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that gave up waiting is what some of these tests are about

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        self.server.received += body
        if self.server.habit == "silent":
            self.server.closing.wait()
            return
        if self.server.habit == "refuses":
            self._answer({"errors": [{"message": "unauthorized"}]}, 401)
            return
        if self.path.endswith("file_stream"):
            if self.server.habit == "dies":
                self.server.habit = "silent"
                self.server.closing.wait()
                return
            self._keep(json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", []))
        request = json.loads(body) if self.path == "/graphql" else {}
        self._answer(self._data(request.get("query", ""), request.get("variables") or {}))

    do_GET = do_PUT = do_POST

    def _keep(self, lines: list[str]) -> None:
        for row in map(json.loads, lines):
            if row["_step"] in self.server.history:
                self.server.repeated.append(row["_step"])
            self.server.history[row["_step"]] = row

    def _data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        held = len(self.server.history)
        last = max(self.server.history, default=-1)
        run = {
            "id": "run",
            "name": variables.get("name"),
            "displayName": "run",
            "config": "{}",
            "project": PROJECT,
        }
        if "mutation UpsertBucket" in query:
            return {
                "data": {"upsertBucket": {"bucket": {**run, "historyLineCount": held}, "inserted": not held}}
            }
        if "RunResumeStatus" in query:
            counts = {"historyLineCount": held, "logLineCount": 0, "eventsLineCount": 0}
            tails = {
                "historyTail": json.dumps([json.dumps({"_step": last, "_runtime": 1})]),
                "eventsTail": "[]",
            }
            bucket: dict[str, Any] = {
                **run,
                **counts,
                **tails,
                "tags": [],
                "summaryMetrics": json.dumps({"_step": last}),
                "wandbConfig": '{"t": 1}',
            }
            return {"data": {"model": {**PROJECT, "bucket": bucket if held else None}}}
        if "viewer" in query:
            viewer = {
                "id": "user",
                "username": "me",
                "entity": "me",
                "email": "me@example.com",
                "flags": "{}",
            }
            return {"data": {"viewer": {**viewer, "teams": {"edges": []}}}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/storage"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
