"""Datasets and notebooks on Kaggle, which a code competition is submitted with. `slug` is owner/name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from comp.engine.deliver import kaggle
from comp.engine.errors import UserError


def dataset(slug: str) -> dict[str, Any] | None:
    """version, description and the notes of each version; None if there is none (Kaggle answers 403 or 404
    then)."""
    owner, name = slug.split("/")
    with kaggle.sdk() as api:
        request = kaggle.request("datasets", "ApiGetDatasetRequest", owner_slug=owner, dataset_slug=name)
        answer = kaggle.read(
            lambda: api.datasets.dataset_api_client.get_dataset(request),
            f"looking for dataset {slug}",
            "",
            absent=(403, 404),
        )
    if answer is None:
        return None
    return {
        "version": answer.current_version_number or 1,
        "description": answer.description or "",
        "notes": {item.version_number: item.version_notes or "" for item in answer.versions},
    }


def dataset_status(slug: str) -> str:
    """ready, failed, deleted, or a state before those."""
    return str(kaggle.read(lambda: kaggle.client().dataset_status(slug), f"looking for dataset {slug}", ""))


def send_dataset(slug: str, folder: Path, title: str, note: str, new: bool, progress: bool) -> None:
    """A new dataset or a new version, with every file and folder of `folder`, or an error.

    The client skips files that it failed to upload, and retries a call that may have arrived. So the files
    are counted here, and the last call is made once.
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

    _, printed = kaggle.send(upload, f"uploading {slug}", "", quiet=not progress)
    count = sum(1 for _ in folder.iterdir())
    if len(body.files) != count:
        what = f"only {len(body.files)} of {count} files and folders arrived ({kaggle.clean(printed)})"
        raise UserError("kaggle-upload", where=f"uploading {slug}", what=what)
    with kaggle.sdk() as api:
        dataset_api = api.datasets.dataset_api_client
        if new:
            answer, _ = kaggle.send(lambda: dataset_api.create_dataset(body), f"creating {slug}", "")
        else:
            version = kaggle.request(
                "datasets", "ApiCreateDatasetVersionRequest", owner_slug=owner, dataset_slug=name, body=body
            )
            answer, _ = kaggle.send(
                lambda: dataset_api.create_dataset_version(version), f"creating {slug}", ""
            )
    if answer.error:
        raise UserError("kaggle-error", where=f"creating {slug}", what=kaggle.clean(answer.error))


def kernel(slug: str) -> tuple[int, str] | None:
    """(version, source text) of the notebook as it is on Kaggle."""
    owner, name = slug.split("/")
    with kaggle.sdk() as api:
        request = kaggle.request("kernels", "ApiGetKernelRequest", user_name=owner, kernel_slug=name)
        answer = kaggle.read(
            lambda: api.kernels.kernels_api_client.get_kernel(request),
            f"looking for {slug}",
            "",
            absent=(403, 404),
        )
    return None if answer is None else (answer.metadata.current_version_number or 1, answer.blob.source or "")


def send_kernel(folder: Path, slug: str) -> int:
    """The new version, which only this answer contains."""
    where = f"pushing {slug}"
    answer, _ = kaggle.send(lambda: kaggle.client().kernels_push(str(folder)), where, "")
    kinds = ("dataset", "competition", "kernel", "model")
    invalid = [
        f"{kind} {source}" for kind in kinds for source in getattr(answer, f"invalid_{kind}_sources") or []
    ]
    if answer.error or invalid:
        what = kaggle.clean(answer.error) if answer.error else "its sources cannot be read"
        if invalid:
            what += f" (not accessible: {', '.join(invalid)})"
        raise UserError("kaggle-error", where=where, what=what)
    if not answer.version_number:
        raise UserError(
            "kaggle-no-version",
            where=where,
            what="Kaggle returned no version number",
            remedy=f"look at {kaggle.SITE}/code/{slug} before you push again",
        )
    return int(answer.version_number)


def kernel_status(slug: str) -> tuple[str, str]:
    """(QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_ACKNOWLEDGED …, the failure message or "")."""
    owner, name = slug.split("/")
    with kaggle.sdk() as api:  # the client's own method reports every error as a wrong slug
        request = kaggle.request(
            "kernels", "ApiGetKernelSessionStatusRequest", user_name=owner, kernel_slug=name
        )
        status = api.kernels.kernels_api_client.get_kernel_session_status
        answer = kaggle.read(lambda: status(request), f"reading the status of {slug}", "")
    return answer.status.name, answer.failure_message or ""


def kernel_log(slug: str) -> str:
    owner, name = slug.split("/")
    with kaggle.sdk() as api:
        request = kaggle.request(
            "kernels", "ApiListKernelSessionOutputRequest", user_name=owner, kernel_slug=name
        )
        answer = kaggle.read(
            lambda: api.kernels.kernels_api_client.list_kernel_session_output(request),
            f"reading the log of {slug}",
            "",
        )
    return answer.log or ""
