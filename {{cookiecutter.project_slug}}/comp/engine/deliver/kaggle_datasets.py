"""Datasets and notebooks on Kaggle: what a code competition is sent as."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from comp.engine.deliver import kaggle
from comp.engine.errors import Refused


def dataset(slug: str) -> dict[str, Any] | None:
    """owner/name as Kaggle knows it, None when there is none (Kaggle says 403 or 404 of a new one)."""
    owner, name = slug.split("/")
    with kaggle.sdk() as api:
        request = kaggle.request("datasets", "ApiGetDatasetRequest", owner_slug=owner, dataset_slug=name)
        said = kaggle.read(
            lambda: api.datasets.dataset_api_client.get_dataset(request),
            f"looking for dataset {slug}",
            "",
            absent=(403, 404),
        )
    if said is None:
        return None
    notes = {each.version_number: each.version_notes or "" for each in said.versions}
    return {
        "version": said.current_version_number or 1,
        "description": said.description or "",
        "notes": notes,
    }


def dataset_status(slug: str) -> str:
    """ready, failed, or on the way."""
    return str(kaggle.read(lambda: kaggle.client().dataset_status(slug), f"looking for dataset {slug}", ""))


def send_dataset(slug: str, folder: Path, title: str, note: str, new: bool, progress: bool) -> None:
    """One new dataset or one new version; every file and folder of `folder` is in it, or nothing is made.

    The client leaves out what it failed to upload and goes on, and repeats a call that may have arrived: so the files are
    counted here, and the last call is made once.
    """
    from kaggle.api.kaggle_api_extended import ApiBlobType, ResumableUploadContext

    owner, name = slug.split("/")
    progress = progress and sys.stderr.isatty()
    if new:
        body = kaggle.request(
            "datasets",
            "ApiCreateDatasetRequest",
            owner_slug=owner,
            slug=name,
            title=title,
            license_name="CC0-1.0",
            is_private=True,
            description=note,
            files=[],
        )
    else:
        body = kaggle.request(
            "datasets", "ApiCreateDatasetVersionRequestBody", version_notes=note, description=note, files=[]
        )

    def upload() -> None:
        with ResumableUploadContext() as context:
            kaggle.client().upload_files(
                body, None, str(folder), ApiBlobType.DATASET, context, not progress, "zip"
            )

    _, said = kaggle.send(upload, f"uploading {slug}", "", quiet=not progress)
    wanted = sum(1 for _ in folder.iterdir())
    if len(body.files) != wanted:
        raise Refused(
            f"uploading {slug}: only {len(body.files)} of {wanted} parts arrived ({kaggle.clean(said)})"
        )
    with kaggle.sdk() as api:
        calls = api.datasets.dataset_api_client
        if new:
            answer, _ = kaggle.send(lambda: calls.create_dataset(body), f"making {slug}", "")
        else:
            version = kaggle.request(
                "datasets", "ApiCreateDatasetVersionRequest", owner_slug=owner, dataset_slug=name, body=body
            )
            answer, _ = kaggle.send(lambda: calls.create_dataset_version(version), f"making {slug}", "")
    if answer.error:
        raise Refused(f"making {slug}: {kaggle.clean(answer.error)}")


def kernel(slug: str) -> tuple[int, str] | None:
    """(version, text) of owner/name as it stands on Kaggle."""
    owner, name = slug.split("/")
    with kaggle.sdk() as api:
        request = kaggle.request("kernels", "ApiGetKernelRequest", user_name=owner, kernel_slug=name)
        said = kaggle.read(
            lambda: api.kernels.kernels_api_client.get_kernel(request),
            f"looking for {slug}",
            "",
            absent=(403, 404),
        )
    return None if said is None else (said.metadata.current_version_number or 1, said.blob.source or "")


def send_kernel(folder: Path, slug: str) -> int:
    """The version that was made: only this answer knows it."""
    answer, _ = kaggle.send(lambda: kaggle.client().kernels_push(str(folder)), f"pushing {slug}", "")
    kinds = ("dataset", "competition", "kernel", "model")
    wrong = [f"{kind} {each}" for kind in kinds for each in getattr(answer, f"invalid_{kind}_sources") or []]
    if answer.error or wrong:
        reason = kaggle.clean(answer.error or "") or "it cannot read its sources"
        raise Refused(f"pushing {slug}: {reason}" + (f"; not to be had: {', '.join(wrong)}" if wrong else ""))
    if not answer.version_number:
        raise Refused(
            f"pushing {slug}: Kaggle gave no version number; look at {kaggle.SITE}/code/{slug} before you push again"
        )
    return int(answer.version_number)


def kernel_status(slug: str) -> tuple[str, str]:
    """(QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_ACKNOWLEDGED …, what it says of its failure)."""
    owner, name = slug.split("/")
    with kaggle.sdk() as api:  # the client's own call takes every refusal for a wrong slug
        request = kaggle.request(
            "kernels", "ApiGetKernelSessionStatusRequest", user_name=owner, kernel_slug=name
        )
        ask = api.kernels.kernels_api_client.get_kernel_session_status
        said = kaggle.read(lambda: ask(request), f"looking how {slug} runs", "")
    return said.status.name, said.failure_message or ""


def kernel_log(slug: str) -> str:
    owner, name = slug.split("/")
    with kaggle.sdk() as api:
        request = kaggle.request(
            "kernels", "ApiListKernelSessionOutputRequest", user_name=owner, kernel_slug=name
        )
        said = kaggle.read(
            lambda: api.kernels.kernels_api_client.list_kernel_session_output(request),
            f"reading the log of {slug}",
            "",
        )
    return said.log or ""
