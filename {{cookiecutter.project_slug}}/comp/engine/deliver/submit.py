"""comp submit NAME -m "…": send the validated file to Kaggle once, wait for its score, and write both into
the ledger.

Every step is written before the next begins, so the same command continues wherever it was killed. A process
that died while sending left an intent: before anything is sent again, its token is looked up in Kaggle's list
of submissions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from tqdm import tqdm

from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.deliver import dry_run, kaggle, ledger
from comp.engine.errors import UserError
from comp.engine.run import tracking
from comp.engine.store import artifacts, locks, paths

POLL, TIMEOUT = 10.0, 3600.0  # seconds between requests for a score; until it is left to comp ledger
MAX_MESSAGE = 400  # characters: Kaggle truncates longer ones, and the token stands at the end


def submit(
    name: str,
    message: str | None = None,
    *,
    force: bool = False,
    anyway: str | None = None,
    wait: bool = True,
) -> None:
    if message is None:
        remedy = f'comp submit {name} -m "larger images"; or --dry-run, which submits nothing'
        raise UserError(
            "message-missing",
            where=f"comp submit {name}",
            key="-m",
            what="a submission needs a message",
            remedy=remedy,
        )
    message = checked_message(message)
    cfg = resolve.load(paths.root(), "base").config
    file = dry_run.dry_run(name)
    with locks.lock(paths.path("submissions"), "submitting"):
        sha256 = artifacts.sha256(file)
        sent = find_sent(cfg, name, sha256, message, force, anyway)
        if sent is not None:
            ref = int(sent["number"])  # by this very command, which was killed or typed again
        else:
            intent = ledger.intend(
                "file", file=sha256, message=message, anyway=anyway, **ledger.describe(cfg, name)
            )
            text = f"{message} {intent['token']}"
            ref = send_once(cfg, intent, lambda: kaggle.submit_file(file, text, cfg.competition.slug))
        print(f"sent: {paths.relative(file)} is submission {ref}", flush=True)
    finish(cfg, ref, wait)


def checked_message(message: str) -> str:
    message = " ".join(message.split())
    if not message or len(message) > MAX_MESSAGE:
        raise UserError(
            "message-length",
            where="-m",
            what=f"the message has {len(message)} characters; 1 to {MAX_MESSAGE} are allowed",
            remedy='say what is new, like -m "larger images"',
        )
    return message


# --- before anything is sent --------------------------------------------------------------------------------


def find_sent(
    cfg: Config, name: str, sha256: str, message: str, force: bool, anyway: str | None
) -> dict[str, Any] | None:
    """Synchronize with Kaggle, then raise for every reason not to send. The entry, if this command has sent
    it already."""
    slug = cfg.competition.slug
    sent = sync(cfg)
    same = [entry for entry in sent if entry.get("file") == sha256]
    if same and same[-1]["status"] == "ERROR" and not (force or anyway):
        raise UserError(
            "submission-failed-before",
            where=name,
            what=f"the same bytes are submission {same[-1]['number']} already, which Kaggle could not score "
            f"({same[-1]['error'] or 'no reason given'})",
            remedy='if the file was not the reason: --anyway "why"',
        )
    if same and same[-1]["status"] != "ERROR" and not force:
        if same[-1]["message"] != message:
            raise UserError(
                "submission-sent-before",
                where=name,
                what=f"the same bytes are submission {same[-1]['number']} already ({same[-1]['message']!r})",
                remedy="--force sends them again",
            )
        return same[-1]
    if not anyway:
        validate_score(name, sent)
    if (error := limit_reached(slug)) is not None:
        raise error
    return None


def limit_reached(slug: str) -> UserError | None:
    left, total = kaggle.limits(slug)
    if left > 0:
        return None
    if total:
        what = "all submissions of this competition are used up; it allows no more"
    else:
        what = "the daily limit is reached; the next submission is possible at 00:00 UTC, "
        what += f"in {_until_midnight()}"
    return UserError("submission-limit", where=slug, what=what)


def validate_score(name: str, sent: list[dict[str, Any]]) -> None:
    """A submission should have a better CV score than all before it, by the same metric."""
    record = ledger.score_record(name)
    if record is None or record["oof"] is None:
        return
    value = record["oof"]
    sign = 1 if record["direction"] == "max" else -1
    rivals = [
        (sign * rival, entry)
        for entry in sent
        if entry.get("cv")
        and entry["cv"]["metric"] == record["metric"]
        and entry["status"] != "ERROR"
        and (rival := ledger.cv_score(entry)) is not None
    ]
    best, entry = max(rivals, key=lambda rival: rival[0], default=(sign * value, {}))
    if sign * value < best:
        raise UserError(
            "submission-worse",
            where=name,
            what=f"CV score {value:.5g} is worse than the {sign * best:.5g} of {entry['name']}, "
            f"which was sent as submission {entry['number']}",
            remedy='to send it nevertheless: --anyway "why"',
        )


# --- sending and waiting ------------------------------------------------------------------------------------


def send_once(cfg: Config, intent: dict[str, Any], send: Callable[[], int]) -> int:
    """Send and write the ref into the ledger. Without an answer Kaggle's list decides, now or at the next
    start."""
    try:
        ref = int(send())
    except kaggle.NoAnswer as error:
        sync(cfg)
        found = [
            entry["number"]
            for entry in ledger.submissions(cfg.competition.slug)
            if entry.get("token") == intent["token"]
        ]
        if not found:
            raise UserError(
                error.code,
                where=error.where,
                what=f"{error.what}; it is not in Kaggle's list, so nothing was submitted",
                remedy="type the same command again",
            ) from None
        return int(found[0])
    except UserError:  # a team member may have used the last submission meanwhile
        if (limit := limit_reached(cfg.competition.slug)) is not None:
            raise limit from None
        raise
    ledger.add("sent", token=intent["token"], number=ref)
    return ref


def sync(cfg: Config) -> list[dict[str, Any]]:
    """Update the ledger from Kaggle's list and return its submissions; new scores go to W&B."""
    slug = cfg.competition.slug
    ledger.update(kaggle.submissions(slug), slug)
    entries = ledger.submissions(slug)
    for entry in entries:
        if entry["kind"] != "foreign" and entry["status"] in ("COMPLETE", "ERROR"):
            _log_to_wandb(cfg, entry)
    return entries


def finish(cfg: Config, ref: int, wait: bool) -> None:
    """Wait for the score and print it."""
    if not wait:
        print("next: comp ledger")
        return
    entry = wait_for_score(cfg, ref)
    score = ledger.cv_score(entry)
    cv = "" if score is None else f", CV {score:.5g}"
    private = "" if entry["private"] is None else f", private {entry['private']:.5g}"
    print(f"submission {ref}: public {entry['public']:.5g}{private}{cv}")
    print(f"written: {paths.relative(ledger.file())}\nnext: comp ledger")


def wait_for_score(cfg: Config, ref: int) -> dict[str, Any]:
    """Interrupting it loses nothing: comp ledger fetches the score later."""
    waited = 0.0
    try:
        with tqdm(
            desc=f"submission {ref} is being scored",
            unit=" requests",
            leave=False,
            disable=None if cfg.machine.progress else True,
        ) as bar:
            while True:
                entry = next((entry for entry in sync(cfg) if entry["number"] == ref), None)
                if entry and entry["status"] == "COMPLETE":
                    return entry
                if entry and entry["status"] == "ERROR":
                    raise UserError(
                        "submission-error",
                        where=f"submission {ref}",
                        what=f"Kaggle could not score it ({entry['error'] or 'no reason given'})",
                    )
                if waited >= TIMEOUT:
                    raise UserError(
                        "submission-pending",
                        where=f"submission {ref}",
                        what=f"sent, and still pending after {waited / 60:.0f} min",
                        remedy="comp ledger fetches its score later",
                    )
                time.sleep(POLL)
                waited += POLL
                bar.update()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"submission {ref} is sent; comp ledger fetches its score later") from None


def _until_midnight() -> str:
    now = datetime.now(UTC)
    left = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC) - now
    return f"{left.seconds // 3600} h {left.seconds // 60 % 60} min"


def _log_to_wandb(cfg: Config, entry: dict[str, Any]) -> None:
    """One W&B run a submission, logged again when the private score is published."""
    folder = paths.path("submissions", "tracked", entry["token"])
    keys = ("number", "name", "message", "status", "public", "private")
    logged = {key: entry[key] for key in keys}
    if (folder / "logged.json").exists() and artifacts.read_json(folder / "logged.json") == logged:
        return
    with tracking.open_log(
        folder,
        run_id=f"submission-{entry['token']}",
        name=f"submit/{entry['name']}",
        group=entry["name"],
        job_type="submit",
        config={key: entry.get(key) for key in ("name", "message", "members", "configs", "file", "kind")}
        | {"ref": entry["number"], "competition": {"slug": entry["competition"]}},
        settings=cfg.track,
    ) as log:
        scores = {key: entry[key] for key in ("public", "private", "status")}
        log.summary({"cv": ledger.cv_score(entry), **scores})
    artifacts.write_json(folder / "logged.json", logged)
