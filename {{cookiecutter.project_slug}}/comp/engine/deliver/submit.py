"""comp submit NAME -m "…": the validated file goes to Kaggle once, its score comes back, and both stand in the ledger.

Every step is written down before the next, so the same command goes on wherever it was killed. A process that died while
sending left an intent: the next one looks its token up in Kaggle's list before it sends anything.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from comp import submission
from comp.engine.bank import bank
from comp.engine.config import experiments, resolve, run_members
from comp.engine.config.schema import Config
from comp.engine.deliver import kaggle, ledger, verify
from comp.engine.ensemble import average
from comp.engine.errors import Refused, UserError
from comp.engine.run import tracking
from comp.engine.store import artifacts, locks, paths

POLL, PATIENCE = 10.0, 3600.0  # seconds between looks at a score, and before it is left to comp ledger
LONGEST = 400  # characters of a message: Kaggle cuts longer ones, and the token stands at the end
SENDING = ("file", "kernel")


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
        raise UserError("message-missing", where="-m", what="a submission needs a message", remedy=remedy)
    message = checked_message(message)
    cfg = resolve.load(paths.root(), "base").config
    file = dry_run(name)
    with locks.lock(paths.path("submissions"), "submitting"):
        sha, ref = artifacts.sha256(file), None
        before = ready(cfg, name, sha, message, force, anyway)
        if before is not None:
            ref = int(before["number"])  # by this very command, which was killed or is typed again
        else:
            intent = ledger.intend(
                "file", file=artifacts.sha256(file), message=message, anyway=anyway, **facts(cfg, name)
            )
            text = f"{message} {intent['token']}"
            ref = once(cfg, intent, lambda: kaggle.submit_file(file, text, cfg.competition.slug))
        print(f"sent: {paths.relative(file)} is submission {ref}", flush=True)
    finish(cfg, ref, wait)


def dry_run(name: str) -> Path:
    """Writes and validates the file, and submits nothing."""
    verify.verify(name)
    return submission.dry_run(name)


def checked_message(message: str) -> str:
    message = " ".join(message.split())
    if not message or len(message) > LONGEST:
        raise Refused(
            f'-m: a message of 1 to {LONGEST} characters says what is new in it, like -m "larger images"'
        )
    return message


def facts(cfg: Config, name: str) -> dict[str, Any]:
    """What it is made of: members, the configs of their runs, and what they score at home."""
    said = bank.read_meta(bank.find(name, "test"))
    recipe = bank.folder(name) / "apply.json"
    made_from = average.leaves(artifacts.read_json(artifacts.verified(recipe))) if recipe.exists() else [name]
    runs = sorted({weights.split("/")[0] for weights in said["weights"]})
    record = score_of(name)
    return {
        "competition": cfg.competition.slug,
        "name": name,
        "members": made_from,
        "configs": {
            run: artifacts.digest(resolve.result_knobs(experiments.stored_config(run))) for run in runs
        },
        "predictions": artifacts.sha256(bank.find(name, "test")),
        "cv": {key: record.get(key) for key in ("metric", "direction", "mean", "std", "oof")}
        if record
        else None,
        "honest": honest_of(record),
    }


def score_of(name: str) -> dict[str, Any] | None:
    """A refit on all rows has no score of its own: that of the same member of the CV stands for it, where there is one."""
    file = bank.folder(run_members.cv_address(name)) / "score.json"
    return dict(artifacts.read_json(artifacts.verified(file))) if file.exists() else None


def honest_of(record: dict[str, Any] | None) -> float | None:
    """A search over members reports beside its score what it is worth on rows that it did not see."""
    said = (record or {}).get("honest")
    return said.get("oof") if isinstance(said, dict) else said


def worth(entry: dict[str, Any]) -> float | None:
    """What a submission scores at home: the honest number where there is one."""
    if entry.get("honest") is not None:
        return float(entry["honest"])
    return entry["cv"]["oof"] if entry.get("cv") else None


def ready(
    cfg: Config, name: str, sha: str, message: str, force: bool, anyway: str | None
) -> dict[str, Any] | None:
    """Every reason not to send, before anything is sent; Kaggle's list is read first. What this command has sent already."""
    slug = cfg.competition.slug
    book = sync(cfg)
    same = [each for each in book if each.get("file") == sha]
    if same and same[-1]["status"] == "ERROR" and not (force or anyway):
        raise Refused(
            f"{name}: these very bytes are submission {same[-1]['number']} already, which Kaggle could not score "
            f'({same[-1]["error"] or "no reason given"}); if that was not their fault: --anyway "why"'
        )
    if same and same[-1]["status"] != "ERROR" and not force:
        if same[-1]["message"] != message:
            raise Refused(
                f"{name}: these very bytes are submission {same[-1]['number']} already ({same[-1]['message']!r}); send them again: --force"
            )
        return same[-1]
    if not anyway:
        refuse_worse(name, book)
    if (over := used_up(slug)) is not None:
        raise over
    return None


def used_up(slug: str) -> Refused | None:
    left, total = kaggle.limits(slug)
    if left > 0:
        return None
    if total:
        return Refused(f"{slug}: all submissions of this competition are used up; it allows no more")
    return Refused(
        f"{slug}: the daily limit is reached; the next one is free at 00:00 UTC, in {_until_midnight()}"
    )


def refuse_worse(name: str, book: list[dict[str, Any]]) -> None:
    record = score_of(name)
    value = worth({"cv": record, "honest": honest_of(record)})
    if record is None or value is None:
        return
    sign = 1 if record["direction"] == "max" else -1
    rivals = [
        (sign * number, each)
        for each in book
        if each.get("cv") and each["cv"]["metric"] == record["metric"] and each["status"] != "ERROR"
        and (number := worth(each)) is not None
    ]  # fmt: skip
    best, entry = max(rivals, key=lambda rival: rival[0], default=(sign * value, {}))
    if sign * value < best:
        raise Refused(
            f"{name}: scores {value:.5g} at home, worse than {entry['name']} ({sign * best:.5g}), which was sent as {entry['number']}; "
            'if you want to: --anyway "why"'
        )


def once(cfg: Config, intent: dict[str, Any], call: Any) -> int:
    """Send, and write down what came back. Without an answer the list decides, now or at the next start."""
    try:
        ref = int(call())
    except kaggle.Unsure as unsure:
        sync(cfg)
        found = [
            each["number"]
            for each in ledger.submissions(cfg.competition.slug)
            if each.get("token") == intent["token"]
        ]
        if not found:
            raise Refused(
                f"{unsure}; it is not in Kaggle's list, so nothing was submitted as far as anybody can see: type the same again"
            ) from None
        return int(found[0])
    except UserError:  # somebody of the team may have taken the last one meanwhile
        if (over := used_up(cfg.competition.slug)) is not None:
            raise over from None
        raise
    ledger.add("sent", token=intent["token"], number=ref)
    return ref


def sync(cfg: Config) -> list[dict[str, Any]]:
    """The ledger after a look at Kaggle's list; scores that changed go to W&B."""
    slug = cfg.competition.slug
    ledger.settle(kaggle.submissions(slug), slug)
    book = ledger.submissions(slug)
    for entry in book:
        if entry["kind"] != "foreign" and entry["status"] in ("COMPLETE", "ERROR"):
            _tell(cfg, entry)
    return book


def finish(cfg: Config, ref: int, wait: bool) -> None:
    if not wait:
        print("next: comp ledger")
        return
    entry = scored(cfg, ref)
    mine = worth(entry)
    home = "" if mine is None else f", at home {mine:.5g}"
    private = "" if entry["private"] is None else f", private {entry['private']:.5g}"
    print(f"submission {ref}: public {entry['public']:.5g}{private}{home}")
    print(f"written: {paths.relative(ledger.file())}\nnext: comp ledger")


def scored(cfg: Config, ref: int) -> dict[str, Any]:
    """Waits. The score is Kaggle's to give: whoever stops here loses nothing."""
    waited = 0.0
    try:
        with tqdm(
            desc=f"submission {ref} is being scored",
            unit=" looks",
            leave=False,
            disable=None if cfg.machine.progress else True,
        ) as bar:
            while True:
                entry = next((each for each in sync(cfg) if each["number"] == ref), None)
                if entry and entry["status"] == "COMPLETE":
                    return entry
                if entry and entry["status"] == "ERROR":
                    raise Refused(
                        f"submission {ref}: Kaggle could not score it ({entry['error'] or 'no reason given'})"
                    )
                if waited >= PATIENCE:
                    raise Refused(
                        f"submission {ref}: still pending after {waited / 60:.0f} min; it is sent, and comp ledger picks its score up"
                    )
                time.sleep(POLL)
                waited += POLL
                bar.update()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"submission {ref} is sent, and comp ledger picks its score up") from None


def _until_midnight() -> str:
    now = datetime.now(UTC)
    left = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC) - now
    return f"{left.seconds // 3600} h {left.seconds // 60 % 60} min"


def _tell(cfg: Config, entry: dict[str, Any]) -> None:
    """One W&B run a submission; told anew when the private score comes out."""
    folder = paths.path("submissions", "tracked", entry["token"])
    said = {key: entry[key] for key in ("number", "name", "message", "status", "public", "private", "honest")}
    if (folder / "told.json").exists() and artifacts.read_json(folder / "told.json") == said:
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
        cv = (entry["cv"] or {}).get("oof")
        log.summary(
            {
                "cv": cv,
                "honest": entry["honest"],
                "public": entry["public"],
                "private": entry["private"],
                "status": entry["status"],
            }
        )
    artifacts.write_json(folder / "told.json", said)
