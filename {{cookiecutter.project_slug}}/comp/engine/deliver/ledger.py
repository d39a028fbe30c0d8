"""submissions/ledger.jsonl: what was sent to Kaggle, what it was made from, and its scores. Lines are only
ever appended.

    intent   written before anything is sent: what, the hash of its bytes, and a random token
    sent     the number that Kaggle gave it: the ref of a submission, the version of a dataset or notebook
    failed   this version of a dataset or notebook must not be used
    status   status and scores that Kaggle lists for a ref, appended whenever they change

A ref without an intent is a submission that was made elsewhere: its kind is `foreign`. The token stands at
the end of the message, so that an intent whose process died before `sent` can be found on Kaggle before
anything is sent again. That is the only look-up by text; everything else goes by ref. Times are written and
never compared.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comp.engine.bank import bank
from comp.engine.config import experiments, resolve, run_members
from comp.engine.config.schema import Config
from comp.engine.ensemble import average
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths
from comp.engine.store import secrets as credentials

Entry = dict[str, Any]
STATUS = ("status", "public", "private", "error")


def file() -> Path:
    return paths.path("submissions", "ledger.jsonl")


def add(event: str, **fields: Any) -> Entry:
    """On the disk when it returns. An incomplete last line (power cut) is removed first, as if it had never
    been written."""
    line = without_credentials(
        {"event": event, **fields, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    )
    file().parent.mkdir(parents=True, exist_ok=True)
    with file().open("a+b") as ledger:
        ledger.seek(0)
        whole = ledger.read()
        ledger.truncate(whole.rfind(b"\n") + 1)
        ledger.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        ledger.flush()
        os.fsync(ledger.fileno())
    return line


def without_credentials(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_credentials(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_credentials(inner) for inner in value]
    return credentials.redact(value) if isinstance(value, str) else value


def lines() -> list[Entry]:
    if not file().exists():
        return []
    found = []
    for number, line in enumerate(file().read_bytes().split(b"\n")[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise UserError(
                "file-damaged",
                where=f"{paths.relative(file())}:{number}",
                what="not JSON",
                remedy="restore an older version from git",
            ) from None
    return found


def intend(kind: str, **fields: Any) -> Entry:
    """kind: file or kernel (submissions), dataset, notebook."""
    return add("intent", token=secrets.token_hex(4), kind=kind, **fields)


def entries(kinds: Sequence[str], competition: str) -> list[Entry]:
    """Intents with their outcome, oldest first. `number`: the ref of a submission, the version of a dataset or
    notebook; None if Kaggle has not confirmed it."""
    found: dict[str, Entry] = {}
    status: dict[int, Entry] = {}
    for line in lines():
        if line["event"] == "intent" and line["kind"] in kinds and line["competition"] == competition:
            found[line["token"]] = {**line, "number": None}
        elif line["event"] == "sent" and line["token"] in found:
            found[line["token"]]["number"] = line["number"]
        elif line["event"] == "status" and line["competition"] == competition:
            status[line["ref"]] = line
    for entry in found.values():
        entry.update({key: status.get(entry["number"], {}).get(key) for key in STATUS})
    return list(found.values())


def submissions(competition: str) -> list[Entry]:
    """Every submission that Kaggle has a ref for, in the order of the refs."""
    found = {entry["number"]: entry for entry in entries(("file", "kernel"), competition) if entry["number"]}
    for ref, line in _latest_status(competition).items():
        if ref not in found:
            found[ref] = {"kind": "foreign", "number": ref, "name": "", "cv": None}
            found[ref] |= {"message": line["description"], "at": line["date"]}
            found[ref] |= {key: line[key] for key in STATUS}
    return [found[ref] for ref in sorted(found)]


def pending_intents(kinds: Sequence[str], competition: str) -> list[Entry]:
    """Intents of which it is not known whether they were sent."""
    return [entry for entry in entries(kinds, competition) if entry["number"] is None]


def update(listed: Sequence[Entry], competition: str) -> None:
    """Append what Kaggle's list of submissions adds: refs of intents, found by their token, and every change
    of a status."""
    known = {entry["number"] for entry in entries(("file", "kernel"), competition)}
    for intent in pending_intents(("file", "kernel"), competition):
        match = [
            entry
            for entry in listed
            if entry["description"].endswith(intent["token"]) and entry["ref"] not in known
        ]
        if match:
            add("sent", token=intent["token"], number=match[0]["ref"])
    latest = _latest_status(competition)
    for entry in listed:
        old = latest.get(entry["ref"])
        if old is None or any(old[key] != entry[key] for key in STATUS):
            fields = {key: entry[key] for key in ("ref", *STATUS, "description")}
            add("status", competition=competition, **fields, date=entry["at"])


def _latest_status(competition: str) -> dict[int, Entry]:
    """ref -> the last status line of it."""
    return {
        line["ref"]: line
        for line in lines()
        if line["event"] == "status" and line["competition"] == competition
    }


# --- what a submission is made from, and its CV score -------------------------------------------------------


def describe(cfg: Config, name: str) -> Entry:
    """Member runs, hashes of their configs and of the predictions, and the CV score."""
    meta = bank.read_meta(bank.find(name, "test"))
    recipe = bank.folder(name) / "apply.json"
    members = average.leaves(artifacts.read_json(artifacts.verified(recipe))) if recipe.exists() else [name]
    runs = sorted({weights.split("/")[0] for weights in meta["weights"]})
    record = score_record(name)
    keys = ("metric", "direction", "mean", "std", "oof")
    return {
        "competition": cfg.competition.slug,
        "name": name,
        "members": members,
        "configs": {
            run: artifacts.digest(resolve.result_knobs(experiments.stored_config(run))) for run in runs
        },
        "predictions": artifacts.sha256(bank.find(name, "test")),
        "cv": {key: record.get(key) for key in keys} if record else None,
    }


def score_record(name: str) -> Entry | None:
    """score.json. A refit on all rows has no score of its own: that of the same member of the CV run is
    taken, if there is one."""
    score_file = bank.folder(run_members.cv_address(name)) / "score.json"
    return dict(artifacts.read_json(artifacts.verified(score_file))) if score_file.exists() else None


def cv_score(entry: Entry) -> float | None:
    """Of an ensemble this is the nested score: no row is predicted with weights that it was fitted on."""
    return entry["cv"]["oof"] if entry.get("cv") else None
