"""A small Kaggle server for the real client: its wire format, its failures, and everything it received.

The client uses it as a proxy: KAGGLE_API_ENVIRONMENT=LOCALHOST and HTTP_PROXY, which child processes inherit.

    server.fail["CreateSubmission"] = [500]             the next call answers 500, later ones pass
    server.fail["StartSubmissionUpload"] = ["drop"]     the connection is dropped before the call is handled
    server.fail["StartSubmissionUpload"] = ["after"]    the call is handled, but its answer is lost
    server.fail["ListSubmissions"] = [None, None, 403]  two calls succeed, the third answers 403

The methods "upload" and "storage" carry the bytes to Kaggle and from it.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

USER, KEY = "somebody", "planted-kaggle-key-0123456789"
MESSAGES = {
    401: "Unauthorized",
    403: "You must accept this competition's rules before you can continue",
    404: "Not found",
    429: "Too many requests",
    500: "Internal error",
}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fail: dict[str, list[Any]] = {}
        self.messages = dict(MESSAGES)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.archive = b""
        self.archives: list[bytes] = []  # what the next downloads get instead
        self.ranges: list[str] = []
        self.cut: list[int] = []  # the next downloads end after so many bytes
        self.uploads: dict[str, bytes] = {}
        self.short: list[int] = []  # the next uploads are cut there
        self.submissions: list[dict[str, Any]] = []
        self.scores: list[Any] = []  # of the next submissions; "ERROR", None is pending for ever
        self.allowed = 5
        self.taken_meanwhile = False  # the limits allow one, and then somebody else has sent it
        self.total = False
        self.datasets: dict[str, dict[str, Any]] = {}
        self.dataset_states: list[str] = ["READY"]  # one a look, the last for ever
        self.kernels: dict[str, dict[str, Any]] = {}
        self.kernel_runs: list[str] = ["RUNNING", "COMPLETE"]
        self.kernel_log = ""
        self.invalid: dict[str, list[str]] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def environment(self) -> dict[str, str]:
        return {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "HTTP_PROXY": self.url,
            "http_proxy": self.url,
            "NO_PROXY": "",
            "no_proxy": "",
            "KAGGLE_USERNAME": USER,
            "KAGGLE_KEY": KEY,
        }

    def count(self, method: str) -> int:
        return sum(1 for name, _ in self.calls if name == method)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients are killed on purpose

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    # --- transport ------------------------------------------------------------------------------------------

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        *_, method = urlsplit(self.path).path.split("/")
        request = json.loads(body or b"{}")
        self.server.calls.append((method, request))
        failure = self._failure(method)
        if self._failed(failure):
            return
        if not self.headers.get("Authorization"):
            self._answer({"code": 401, "message": "Unauthorized"}, 401)
            return
        answer = getattr(self, f"_{method}", self._unknown)(request)
        if failure == "after":
            self.close_connection = True
        elif isinstance(answer, tuple):
            self._answer(answer[1], answer[0])
        elif answer is not None:
            self._answer(answer)

    def _failure(self, method: str) -> Any:
        failures = self.server.fail.get(method) or []
        return failures.pop(0) if failures else None

    def _failed(self, failure: Any) -> bool:
        if failure == "drop":
            self.close_connection = True
        elif isinstance(failure, int):
            self._answer({"code": failure, "message": self.server.messages[failure]}, failure)
        return failure == "drop" or isinstance(failure, int)

    def do_PUT(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        token = urlsplit(self.path).path.rpartition("/")[2]
        failure = self._failure("upload")
        if failure is not None:
            self.rfile.read(length)
            self._failed(failure)
            return
        if self.server.short:
            self.server.uploads[token] = self.rfile.read(min(self.server.short.pop(0), length))
            self._answer({}, 400)
            self.close_connection = True
            return
        self.server.uploads[token] = self.rfile.read(length)
        self._answer({}, 200)

    def do_GET(self) -> None:
        if self._failed(self._failure("storage")):
            return
        data = self.server.archive
        if self.server.archives:
            data = self.server.archives[0]
        first = 0
        asked = self.headers.get("Range")
        if asked:
            self.server.ranges.append(asked)
            first = int(asked.removeprefix("bytes=").split("-")[0])
        end = self.server.cut.pop(0) if self.server.cut else len(data)
        whole = end >= len(data)
        if whole and self.server.archives:
            self.server.archives.pop(0)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - first))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"one"')
        self.send_header("Last-Modified", "Fri, 20 Nov 2026 10:00:00 GMT")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first:end])
        if not whole:
            self.close_connection = True

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _unknown(self, request: dict[str, Any]) -> Any:
        return 404, {"code": 404, "message": f"no such method {self.path}"}

    # --- competitions ---------------------------------------------------------------------------------------

    def _IntrospectToken(self, request: dict[str, Any]) -> Any:
        return {"active": True, "username": USER}

    def _DownloadDataFiles(self, request: dict[str, Any]) -> None:
        self.send_response(302)
        self.send_header("Location", f"{self.server.url}/storage/{request['competitionName']}.zip?signed=1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _GetSubmissionLimits(self, request: dict[str, Any]) -> Any:
        today = len(self.server.submissions)
        return {
            "numToday": today,
            "numTotal": today,
            "numAllowedNow": 1 if self.server.taken_meanwhile else self.server.allowed,
            "limitedByTotal": self.server.total,
        }

    def _StartSubmissionUpload(self, request: dict[str, Any]) -> Any:
        token = f"token{len(self.server.calls)}"
        return {"token": token, "createUrl": f"{self.server.url}/upload/{token}"}

    def _CreateSubmission(self, request: dict[str, Any]) -> Any:
        data = self.server.uploads[request["blobFileTokens"]]
        return self._submitted(request, bytes=len(data), data=data)

    def _CreateCodeSubmission(self, request: dict[str, Any]) -> Any:
        return self._submitted(
            request,
            kernel=f"{request['kernelOwner']}/{request['kernelSlug']}",
            version=request.get("kernelVersion"),
        )

    def _submitted(self, request: dict[str, Any], **facts: Any) -> Any:
        if self.server.taken_meanwhile:
            self.server.taken_meanwhile, self.server.allowed = False, 0
        if self.server.allowed <= 0:
            return 400, {"code": 400, "message": "Submission limit reached"}
        self.server.allowed -= 1
        score = self.server.scores.pop(0) if self.server.scores else 0.5
        ref = 1000 + len(self.server.submissions)
        self.server.submissions.append({
            "ref": ref, "description": request.get("submissionDescription", ""), "score": score, "looks": 0,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(1.79e9 + ref)), **facts,
        })  # fmt: skip
        return {"message": "Successfully submitted", "ref": ref}

    def _ListSubmissions(self, request: dict[str, Any]) -> Any:
        listed = []
        for each in self.server.submissions[::-1]:
            each["looks"] += 1
            status, public = ("COMPLETE", each["score"]) if each["looks"] > 1 else ("PENDING", None)
            entry = {
                "ref": each["ref"],
                "description": each["description"],
                "date": each["date"],
                "fileName": "submission.csv",
            }
            if each["score"] is None:
                status, public = "PENDING", None
            if each["score"] == "ERROR" and status == "COMPLETE":
                status, public = "ERROR", None
                entry["errorDescription"] = "Evaluation raised: row ids do not match"
            if public is not None:
                entry["publicScore"] = str(public)
                if "private" in each:
                    entry["privateScore"] = str(each["private"])
            listed.append(entry | {"status": status})
        size = int(request.get("pageSize") or 20)
        start = int(request.get("pageToken") or 0)
        more = str(start + size) if start + size < len(listed) else ""
        return {"submissions": listed[start : start + size], "nextPageToken": more}

    # --- datasets and notebooks -----------------------------------------------------------------------------

    def _StartBlobUpload(self, request: dict[str, Any]) -> Any:
        return self._StartSubmissionUpload(request)

    def _GetDatasetStatus(self, request: dict[str, Any]) -> Any:
        if not self._dataset(request):
            return 404, {"code": 404, "message": "Not found"}
        states = self.server.dataset_states
        return {"status": states.pop(0) if len(states) > 1 else states[0]}

    def _GetDataset(self, request: dict[str, Any]) -> Any:
        found = self._dataset(request)
        if not found:
            return 403, {"code": 403, "message": "Permission 'datasets.get' was denied"}
        versions = [
            {"versionNumber": i, "versionNotes": note, "status": "READY"}
            for i, note in enumerate(found["notes"], 1)
        ]
        return {
            "ref": "x",
            "currentVersionNumber": len(versions),
            "description": found["description"],
            "versions": versions,
        }

    def _dataset(self, request: dict[str, Any]) -> Any:
        return self.server.datasets.get(f"{request['ownerSlug']}/{request['datasetSlug']}")

    def _CreateDataset(self, request: dict[str, Any]) -> Any:
        slug = f"{request['ownerSlug']}/{request['slug']}"
        files = [self.server.uploads[each["token"]] for each in request["files"]]
        description = request.get("description", "")
        self.server.datasets[slug] = {"notes": [""], "description": description, "files": [files]}
        return {"ref": slug, "url": f"/{slug}", "status": "ok"}

    def _CreateDatasetVersion(self, request: dict[str, Any]) -> Any:
        found, body = self._dataset(request), request["body"]
        found["notes"].append(body["versionNotes"])
        found["description"] = body.get("description", found["description"])
        found["files"].append([self.server.uploads[each["token"]] for each in body["files"]])
        return {"ref": "x", "status": "ok"}

    def _SaveKernel(self, request: dict[str, Any]) -> Any:
        if self.server.invalid:
            return {"versionNumber": 0, **self.server.invalid}
        found = self.server.kernels.setdefault(request["slug"], {"versions": []})
        found["versions"].append(request)
        found["runs"] = list(self.server.kernel_runs)
        return {"ref": request["slug"], "url": "/x", "versionNumber": len(found["versions"])}

    def _GetKernel(self, request: dict[str, Any]) -> Any:
        found = self.server.kernels.get(f"{request['userName']}/{request['kernelSlug']}")
        if not found:
            return 404, {"code": 404, "message": "Not found"}
        return {
            "metadata": {"currentVersionNumber": len(found["versions"])},
            "blob": {"source": found["versions"][-1]["text"]},
        }

    def _GetKernelSessionStatus(self, request: dict[str, Any]) -> Any:
        runs = self.server.kernels[f"{request['userName']}/{request['kernelSlug']}"]["runs"]
        status = runs.pop(0) if len(runs) > 1 else runs[0]
        return {
            "status": status,
            "failureMessage": "Notebook threw an exception" if status == "ERROR" else "",
        }

    def _ListKernelSessionOutput(self, request: dict[str, Any]) -> Any:
        return {"files": [], "log": self.server.kernel_log, "nextPageToken": ""}
