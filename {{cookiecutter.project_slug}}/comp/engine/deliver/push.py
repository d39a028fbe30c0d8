"""comp kernel NAME --push -m "…": dataset, notebook, run, submission, score. Each step is written into the ledger before and
after, so the same command goes on wherever it was killed, and nothing is uploaded, run or submitted twice."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from comp.engine.config import resolve
from comp.engine.config.schema import Config
from comp.engine.deliver import kaggle, kaggle_datasets, kernel, ledger, rehearse, submit
from comp.engine.errors import Refused
from comp.engine.store import artifacts, locks, paths

POLL, PATIENCE = 20.0, 12 * 3600.0  # seconds between two looks at a run, and before it is left alone
FAILED = ("ERROR", "CANCEL_REQUESTED", "CANCEL_ACKNOWLEDGED")


def push(name: str, message: str | None, *, wait: bool = True, anyway: str | None = None) -> None:
    if message is None:
        raise Refused('what is new in it? comp kernel NAME --push -m "larger images"')
    message = submit.checked_message(message)
    cfg = resolve.load(paths.root(), "base").config
    owner = kaggle.user()
    made = kernel.build(name, owner)
    content = kernel.content(made)
    rehearsed = artifacts.read_json(rehearse.file_of(name)) if rehearse.file_of(name).exists() else {}
    if rehearsed.get("bundle") != content:
        print(f"not rehearsed: comp kernel {name} --rehearse finds here what a run on Kaggle finds in hours")
    slug = f"{owner}/{kernel.slug(name)}"
    with locks.lock(paths.path("submissions"), "submitting"):
        notebook = artifacts.digest(
            [content, artifacts.sha256(made / "notebook" / f"{kernel.slug(name)}.ipynb")]
        )
        before = submit.ready(cfg, name, notebook, message, force=False, anyway=anyway)
        if before is not None:
            ref = int(before["number"])
        else:
            dataset(cfg, slug, made, content)
            version = pushed(cfg, slug, made, notebook)
            run(cfg, slug, version)
            intent = ledger.intend(
                "kernel",
                file=notebook,
                kernel=slug,
                version=version,
                message=message,
                anyway=anyway,
                **submit.facts(cfg, name),
            )
            text = f"{message} {intent['token']}"
            ref = submit.once(
                cfg,
                intent,
                lambda: kaggle.submit_kernel(slug, version, text, cfg.competition.slug, "submission.csv"),
            )
        print(f"sent: {slug} is submission {ref}", flush=True)
    submit.finish(cfg, ref, wait)


def dataset(cfg: Config, slug: str, made: Path, content: str) -> int:
    """The version of the dataset that holds this bundle; uploaded where there is none."""
    competition = cfg.competition.slug
    there = kaggle_datasets.dataset(slug)
    for intent in ledger.unsettled(("dataset",), competition):
        if there and intent["slug"] == slug:  # a process died between sending and writing down
            notes = there["notes"] | {1: f"{there['notes'].get(1, '')} {there['description']}"}
            match = [version for version, note in notes.items() if intent["token"] in note]
            if match:
                # The description is always that of the newest version, so a token in it may stand at the first one too.
                ledger.add("sent", token=intent["token"], number=max(match))
    known = [
        each
        for each in ledger.things(("dataset",), competition)
        if each["slug"] == slug and each["file"] == content and each["number"] and not _failed(each)
    ]
    if known and there and known[-1]["number"] == there["version"]:
        number = int(known[-1]["number"])
    else:
        intent = ledger.intend("dataset", competition=competition, slug=slug, file=content)
        note = f"{content} {intent['token']}"
        kaggle_datasets.send_dataset(
            slug, made / "bundle", slug.partition("/")[2], note, there is None, cfg.machine.progress
        )
        number = int(kaggle_datasets.dataset(slug)["version"]) if there else 1  # type: ignore[index]
        ledger.add("sent", token=intent["token"], number=number)
    _until(cfg, f"dataset {slug} version {number}", lambda: _dataset_state(slug, number))
    print(f"dataset: {slug} version {number}", flush=True)
    return number


def _dataset_state(slug: str, version: int) -> str:
    status = kaggle_datasets.dataset_status(slug)
    if status in ("failed", "deleted"):
        ledger.add("failed", kind="dataset", slug=slug, number=version, reason=status)
        raise Refused(
            f"dataset {slug} version {version}: Kaggle could not take it ({status}); the same command uploads it anew, "
            f"and {kaggle.SITE}/datasets/{slug} may say why"
        )
    return "" if status == "ready" else status


def pushed(cfg: Config, slug: str, made: Path, notebook: str) -> int:
    """The version of the notebook that runs this bundle. Every push is a run, so the same one is pushed once."""
    competition = cfg.competition.slug
    for intent in ledger.unsettled(("notebook",), competition):
        there = kaggle_datasets.kernel(slug) if intent["slug"] == slug else None
        if there and intent["token"] in there[1]:
            ledger.add("sent", token=intent["token"], number=there[0])
    known = [
        each
        for each in ledger.things(("notebook",), competition)
        if each["slug"] == slug and each["file"] == notebook and each["number"] and not _failed(each)
    ]
    if known:
        return int(known[-1]["number"])
    intent = ledger.intend("notebook", competition=competition, slug=slug, file=notebook)
    folder = made / ".pushing"
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(made / "notebook", folder)
    file = next(folder.glob("*.ipynb"))
    content = artifacts.read_json(file)
    content["cells"][0]["source"] += f"\n\n{intent['token']}"  # what a later look-up finds it by
    artifacts.write_json(file, content)
    version = kaggle_datasets.send_kernel(folder, slug)
    ledger.add("sent", token=intent["token"], number=version)
    shutil.rmtree(folder)
    print(f"notebook: {slug} version {version}, {kaggle.SITE}/code/{slug}", flush=True)
    return version


def run(cfg: Config, slug: str, version: int) -> None:
    """Wait for it; when it fails, its log says why."""

    def state() -> str:
        status, reason = kaggle_datasets.kernel_status(slug)
        if status in FAILED:
            ledger.add("failed", kind="notebook", slug=slug, number=version, reason=reason)
            log = kaggle_datasets.kernel_log(slug)
            file = (
                kernel.folder(slug.partition("/")[2]).parent
                / f"{slug.partition('/')[2]}-version{version}.log"
            )
            artifacts.write_text(file, ledger.secret_free(log))
            raise Refused(
                f"{slug} version {version}: {reason or status}; {paths.relative(file)} has its log, which ends:",
                *_tail(log),
            )
        return "" if status == "COMPLETE" else status

    _until(cfg, f"{slug} version {version} runs on Kaggle", state)


def _tail(log: str) -> list[str]:
    """Kaggle's log is JSON, one record of stdout or stderr a line."""
    import json

    try:
        text = "".join(record.get("data", "") for record in json.loads(log))
    except (ValueError, TypeError, AttributeError):
        text = log
    return ["  " + line for line in ledger.secret_free(text).strip().splitlines()[-10:]]


def _failed(thing: dict[str, Any]) -> bool:
    facts = ("kind", "slug", "number")
    return any(
        line["event"] == "failed" and all(line[fact] == thing[fact] for fact in facts)
        for line in ledger.lines()
    )


def _until(cfg: Config, doing: str, state: Any) -> None:
    waited = 0.0
    with tqdm(desc=doing, unit=" looks", leave=False, disable=None if cfg.machine.progress else True) as bar:
        while said := state():
            if waited >= PATIENCE:
                raise Refused(
                    f"{doing}: still {said} after {waited / 3600:.0f} h; type the same again, it goes on waiting"
                )
            bar.set_postfix_str(said.lower())
            time.sleep(POLL)
            waited += POLL
            bar.update()
