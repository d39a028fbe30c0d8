"""submissions/ledger.jsonl: what was sent to Kaggle, what it was made of, and what came back. Lines are only ever added.

    intent   written before anything is sent: what, with which bytes, under which token
    sent     Kaggle's own number for it: the ref of a submission, the version of a dataset or notebook
    failed   that version of a dataset or notebook is not to be used
    seen     what Kaggle says of a ref, whenever that changes; a ref that nothing here was sent as is foreign

A token stands at the end of the message, so an intent whose process died before `sent` is looked up there before anything
is sent again. That is the one look-up by text; from then on refs alone count. Times stand in the lines, and are never compared.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comp.engine.errors import Refused
from comp.engine.store import paths
from comp.engine.store import secrets as secret

Record = dict[str, Any]
SEEN = ("status", "public", "private", "error")


def file() -> Path:
    return paths.path("submissions", "ledger.jsonl")


def add(event: str, **facts: Any) -> Record:
    """On the disk when it returns. A line torn by a power cut is taken away first: it never happened."""
    line = secret_free({"event": event, **facts, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    file().parent.mkdir(parents=True, exist_ok=True)
    with file().open("a+b") as book:
        book.seek(0)
        whole = book.read()
        book.truncate(whole.rfind(b"\n") + 1)
        book.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        book.flush()
        os.fsync(book.fileno())
    return line


def secret_free(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: secret_free(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [secret_free(inner) for inner in value]
    return secret.redact(value) if isinstance(value, str) else value


def lines() -> list[Record]:
    if not file().exists():
        return []
    found = []
    for number, line in enumerate(file().read_bytes().split(b"\n")[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise Refused(
                f"{paths.relative(file())}:{number}: damaged, it is not JSON; git has an older copy of it"
            ) from None
    return found


def intend(kind: str, **facts: Any) -> Record:
    """kind: file or kernel (submissions), dataset, notebook."""
    return add("intent", token=secrets.token_hex(4), kind=kind, **facts)


def things(kinds: Sequence[str], competition: str) -> list[Record]:
    """Intents with what became of them (`number` is None while that is not known), oldest first."""
    found: dict[str, Record] = {}
    seen: dict[int, Record] = {}
    for line in lines():
        if line["event"] == "intent" and line["kind"] in kinds and line["competition"] == competition:
            found[line["token"]] = {**line, "number": None}
        elif line["event"] == "sent" and line["token"] in found:
            found[line["token"]]["number"] = line["number"]
        elif line["event"] == "seen" and line["competition"] == competition:
            seen[line["ref"]] = line
    for each in found.values():
        each.update({key: seen.get(each["number"], {}).get(key) for key in SEEN})
    return list(found.values())


def submissions(competition: str) -> list[Record]:
    """Everything that Kaggle has a ref for, in the order of the refs; what was made elsewhere has kind foreign."""
    ours = {each["number"]: each for each in things(("file", "kernel"), competition) if each["number"]}
    latest = {
        line["ref"]: line
        for line in lines()
        if line["event"] == "seen" and line["competition"] == competition
    }
    for ref, line in latest.items():
        if ref not in ours:
            ours[ref] = {"kind": "foreign", "number": ref, "name": "", "message": line["description"], "cv": None, "honest": None, "at": line["date"]}  # fmt: skip
            ours[ref] |= {key: line[key] for key in SEEN}
    return [ours[ref] for ref in sorted(ours)]


def unsettled(kinds: Sequence[str], competition: str) -> list[Record]:
    """Intents that nobody knows the fate of."""
    return [each for each in things(kinds, competition) if each["number"] is None]


def settle(listed: Sequence[Record], competition: str) -> None:
    """Take over what Kaggle's list of submissions says: refs of intents by their token, and every change."""
    known = {each["number"] for each in things(("file", "kernel"), competition)}
    for intent in unsettled(("file", "kernel"), competition):
        match = [
            each
            for each in listed
            if each["description"].endswith(intent["token"]) and each["ref"] not in known
        ]
        if match:
            add("sent", token=intent["token"], number=match[0]["ref"])
    latest = {
        line["ref"]: line
        for line in lines()
        if line["event"] == "seen" and line["competition"] == competition
    }
    for each in listed:
        old = latest.get(each["ref"])
        if old is None or any(old[key] != each[key] for key in SEEN):
            facts = {key: each[key] for key in ("ref", *SEEN, "description")}
            add("seen", competition=competition, **facts, date=each["at"])
