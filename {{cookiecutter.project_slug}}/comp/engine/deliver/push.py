"""comp kernel NAME --push -m "…": upload the dataset, push the notebook, wait for its run, submit it, wait
for the score.

Each step is written into the ledger before and after, so the same command continues wherever it was killed,
and nothing is uploaded, run or submitted twice.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.deliver import kaggle, kaggle_datasets, kernel, ledger, rehearse, submit
from comp.engine.errors import UserError
from comp.engine.store import artifacts, locks, paths

POLL, TIMEOUT = 20.0, 12 * 3600.0  # seconds between two requests for a status, and until waiting ends
FAILED = ("ERROR", "CANCEL_REQUESTED", "CANCEL_ACKNOWLEDGED")


def push(name: str, message: str | None, *, wait: bool = True, anyway: str | None = None) -> None:
    if message is None:
        raise UserError(
            "message-missing",
            where="--push",
            what="a submission needs a message that says what is new",
            remedy=f'comp kernel {name} --push -m "larger images"',
        )
    message = submit.checked_message(message)
    cfg = resolve.load(paths.root(), "base").config
    owner = kaggle.user()
    folder = kernel.build(name, owner)
    bundle = kernel.bundle_hash(folder)
    rehearsal = artifacts.read_json(rehearse.file_of(name)) if rehearse.file_of(name).exists() else {}
    if rehearsal.get("bundle") != bundle:
        print(
            f"not rehearsed: comp kernel {name} --rehearse finds errors here that a run on Kaggle "
            "finds after hours"
        )
    slug = f"{owner}/{kernel.slug(name)}"
    with locks.lock(paths.path("submissions"), "submitting"):
        notebook = artifacts.digest(
            [bundle, artifacts.sha256(folder / "notebook" / f"{kernel.slug(name)}.ipynb")]
        )
        sent = submit.find_sent(cfg, name, notebook, message, force=False, anyway=anyway)
        if sent is not None:
            ref = int(sent["number"])
        else:
            upload_dataset(cfg, slug, folder, bundle)
            version = push_notebook(cfg, slug, folder, notebook)
            wait_for_run(cfg, slug, version)
            intent = ledger.intend(
                "kernel",
                file=notebook,
                kernel=slug,
                version=version,
                message=message,
                anyway=anyway,
                **ledger.describe(cfg, name),
            )
            text = f"{message} {intent['token']}"
            ref = submit.send_once(
                cfg,
                intent,
                lambda: kaggle.submit_kernel(slug, version, text, cfg.competition.slug, "submission.csv"),
            )
        print(f"sent: {slug} is submission {ref}", flush=True)
    submit.finish(cfg, ref, wait)


def upload_dataset(cfg: Config, slug: str, folder: Path, bundle: str) -> int:
    """The version of the dataset that holds this bundle; uploaded if there is none."""
    competition = cfg.competition.slug
    on_kaggle = kaggle_datasets.dataset(slug)
    for intent in ledger.pending_intents(("dataset",), competition):
        if on_kaggle and intent["slug"] == slug:  # a process died after sending and before writing `sent`
            notes = on_kaggle["notes"] | {1: f"{on_kaggle['notes'].get(1, '')} {on_kaggle['description']}"}
            match = [version for version, note in notes.items() if intent["token"] in note]
            if match:
                # The description is that of the newest version, so a token in it may be found at version 1
                # too.
                ledger.add("sent", token=intent["token"], number=max(match))
    usable = _usable("dataset", competition, slug, bundle)
    if usable and on_kaggle and usable[-1]["number"] == on_kaggle["version"]:
        version = int(usable[-1]["number"])
    else:
        intent = ledger.intend("dataset", competition=competition, slug=slug, file=bundle)
        note = f"{bundle} {intent['token']}"
        title = slug.partition("/")[2]
        kaggle_datasets.send_dataset(
            slug, folder / "bundle", title, note, on_kaggle is None, cfg.machine.progress
        )
        version = int(kaggle_datasets.dataset(slug)["version"]) if on_kaggle else 1  # type: ignore[index]
        ledger.add("sent", token=intent["token"], number=version)
    _wait(cfg, f"dataset {slug} version {version}", lambda: _dataset_state(slug, version))
    print(f"dataset: {slug} version {version}", flush=True)
    return version


def _dataset_state(slug: str, version: int) -> str:
    """The status that Kaggle is still processing the dataset in; empty once it is ready."""
    status = kaggle_datasets.dataset_status(slug)
    if status in ("failed", "deleted"):
        ledger.add("failed", kind="dataset", slug=slug, number=version, reason=status)
        raise UserError(
            "kaggle-dataset",
            where=f"dataset {slug} version {version}",
            what=f"Kaggle could not process it ({status})",
            remedy=f"the same command uploads it again; {kaggle.SITE}/datasets/{slug} may show the reason",
        )
    return "" if status == "ready" else status


def push_notebook(cfg: Config, slug: str, folder: Path, notebook: str) -> int:
    """The version of the notebook that runs this bundle. Every push starts a run, so the same one is pushed
    once."""
    competition = cfg.competition.slug
    for intent in ledger.pending_intents(("notebook",), competition):
        on_kaggle = kaggle_datasets.kernel(slug) if intent["slug"] == slug else None  # (version, source)
        if on_kaggle and intent["token"] in on_kaggle[1]:
            ledger.add("sent", token=intent["token"], number=on_kaggle[0])
    usable = _usable("notebook", competition, slug, notebook)
    if usable:
        return int(usable[-1]["number"])
    intent = ledger.intend("notebook", competition=competition, slug=slug, file=notebook)
    temporary = folder / ".pushing"
    if temporary.exists():
        shutil.rmtree(temporary)
    shutil.copytree(folder / "notebook", temporary)
    file = next(temporary.glob("*.ipynb"))
    content = artifacts.read_json(file)
    content["cells"][0]["source"] += f"\n\n{intent['token']}"  # a later look-up finds the notebook by it
    artifacts.write_json(file, content)
    version = kaggle_datasets.send_kernel(temporary, slug)
    ledger.add("sent", token=intent["token"], number=version)
    shutil.rmtree(temporary)
    print(f"notebook: {slug} version {version}, {kaggle.SITE}/code/{slug}", flush=True)
    return version


def _usable(kind: str, competition: str, slug: str, sha256: str) -> list[ledger.Entry]:
    """Versions on Kaggle with this content that did not fail; `number` is the version."""
    failed = [line for line in ledger.lines() if line["event"] == "failed"]
    keys = ("kind", "slug", "number")
    return [
        entry
        for entry in ledger.entries((kind,), competition)
        if entry["slug"] == slug
        and entry["file"] == sha256
        and entry["number"]
        and not any(all(line[key] == entry[key] for key in keys) for line in failed)
    ]


def wait_for_run(cfg: Config, slug: str, version: int) -> None:
    """Until the notebook has run on Kaggle. If it fails, its log is saved and its last lines are printed."""

    def state() -> str:
        status, reason = kaggle_datasets.kernel_status(slug)
        if status in FAILED:
            ledger.add("failed", kind="notebook", slug=slug, number=version, reason=reason)
            log = kaggle_datasets.kernel_log(slug)
            name = slug.partition("/")[2]
            file = kernel.folder(name).parent / f"{name}-version{version}.log"
            artifacts.write_text(file, ledger.without_credentials(log))
            raise UserError(
                "kaggle-notebook",
                where=f"{slug} version {version}",
                what=f"{reason or status}; {paths.relative(file)} has its log, which ends:",
                others=[UserError("kaggle-notebook", what=line) for line in _tail(log)],
            )
        return "" if status == "COMPLETE" else status

    _wait(cfg, f"{slug} version {version} runs on Kaggle", state)


def _tail(log: str) -> list[str]:
    """Kaggle's log is JSON, a list of records of stdout and stderr."""
    try:
        text = "".join(record.get("data", "") for record in json.loads(log))
    except (ValueError, TypeError, AttributeError):
        text = log
    return ["  " + line for line in ledger.without_credentials(text).strip().splitlines()[-10:]]


def _wait(cfg: Config, doing: str, state: Callable[[], Any]) -> None:
    """Wait until `state` returns an empty status."""
    waited = 0.0
    with tqdm(
        desc=doing, unit=" requests", leave=False, disable=None if cfg.machine.progress else True
    ) as bar:
        while current := state():
            if waited >= TIMEOUT:
                raise UserError(
                    "kaggle-pending",
                    where=doing,
                    what=f"still {current} after {waited / 3600:.0f} h",
                    remedy="the same command goes on waiting",
                )
            bar.set_postfix_str(current.lower())
            time.sleep(POLL)
            waited += POLL
            bar.update()
