"""Kaggle, through its own client in this process: every call that `comp` makes, and its failures in clear words.

The client is imported here and only when it is needed: importing it prints help without credentials, and goes to the
network with a token. It also prints where it should raise, so what it prints is caught and kept for the one line of a
refusal. Reading is tried again after a passing failure; sending never is, because nobody knows whether it arrived.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from comp.engine.command import check_versions
from comp.engine.errors import Refused
from comp.engine.store import artifacts, paths, secrets

T = TypeVar("T")
PAUSES = [2.0, 8.0, 20.0]  # seconds before a read is tried again; more of them than this is an outage
NEEDS = ("kaggle==2.2.4",)
SITE = "https://www.kaggle.com"
PAGE = 100  # submissions a page
WAYS = "KAGGLE_API_TOKEN, ~/.kaggle/access_token, KAGGLE_USERNAME with KAGGLE_KEY, ~/.kaggle/kaggle.json"


class Unsure(Refused):
    """Something was sent and no answer came: only looking can tell whether it arrived."""


@cache
def client() -> Any:
    """An authenticated KaggleApi."""
    check_versions("talking to Kaggle", NEEDS)  # calls and answers are those of this version
    import requests

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            from kaggle.api.kaggle_api_extended import KaggleApi

            api = KaggleApi()
            api.authenticate()
    except SystemExit:
        given = [name for name in ("KAGGLE_API_TOKEN", "KAGGLE_KEY") if os.environ.get(name)]
        fault = f"{given[0]} is set, but Kaggle does not take it" if given else "no Kaggle credentials"
        raise Refused(f"{fault}; make a token at {SITE}/settings and put it into one of {WAYS}") from None
    except requests.HTTPError as error:
        raise Refused(_words(error, "signing in", "")) from None
    except requests.RequestException as error:
        raise Refused(f"signing in to Kaggle: {_short(error)}; is there a network?") from None
    except ValueError as error:  # a kaggle.json that is no JSON; its text would stand in the message
        raise Refused(
            f"the Kaggle credentials cannot be read ({type(error).__name__}); write {WAYS} anew"
        ) from None
    return api


def user() -> str:
    """Whose datasets and notebooks they will be."""
    return str(client().config_values["username"])


# --- competitions --------------------------------------------------------------------------------------------------------


def submissions(competition: str) -> list[dict[str, Any]]:
    """All of the team's, newest first, whoever made them and wherever."""
    found: list[dict[str, Any]] = []
    page = ""
    with sdk() as api:
        while True:
            asked = request(
                "competitions", "ApiListSubmissionsRequest", competition_name=competition, page_size=PAGE
            )
            if page:
                asked.page_token = page
            list_them = partial(api.competitions.competition_api_client.list_submissions, asked)
            answer = read(list_them, "reading the submissions", competition)
            found += [_submission(each) for each in answer.submissions]
            page = answer.next_page_token
            if not page:
                return found


def _submission(said: Any) -> dict[str, Any]:
    return {
        "ref": said.ref,
        "at": said.date.isoformat() if said.date else None,
        "description": said.description or "",
        "status": said.status.name,
        "error": said.error_description or "",
        "public": _score(said.public_score),
        "private": _score(said.private_score),
        "file": said.file_name or "",
    }


def _score(text: str) -> float | None:
    """Scores come as text, empty while there is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def limits(competition: str) -> tuple[int, bool]:
    """(how many may be sent now, whether it is the total that is used up)."""
    said = read(
        lambda: client().competition_get_submission_limits(competition), "reading the limits", competition
    )
    return said.num_allowed_now, bool(said.limited_by_total)


def submit_file(file: Path, message: str, competition: str) -> int:
    """The ref. Without one nothing was submitted, whatever the client says: it even exits 0 when an upload fails."""
    answer, said = send(
        lambda: client().competition_submit(str(file), message, competition, quiet=True),
        f"sending {file.name}",
        competition,
    )
    if not answer.ref:
        reason = answer.message or said or "no reason given"
        raise Refused(f"sending {file.name}: Kaggle gave no ref, so it was not submitted ({clean(reason)})")
    return int(answer.ref)


def submit_kernel(kernel: str, version: int, message: str, competition: str, file: str) -> int:
    answer, said = send(
        lambda: client().competition_submit_code(file, message, competition, kernel, version, quiet=True),
        f"submitting {kernel} version {version}",
        competition,
    )
    if not answer.ref:
        reason = answer.message or said or "no reason given"
        raise Refused(f"submitting {kernel} version {version}: Kaggle gave no ref ({clean(reason)})")
    return int(answer.ref)


def download(competition: str, folder: Path, progress: bool) -> Path:
    """folder/<competition>.zip, complete in length. What an earlier, killed call has fetched of it is not fetched again."""

    def fetch() -> Path:
        with sdk() as api:
            asked = request("competitions", "ApiDownloadDataFilesRequest", competition_name=competition)
            answer = api.competitions.competition_api_client.download_data_files(
                asked
            )  # nothing of the body yet
            file = folder / f"{competition}.{answer.url.partition('?')[0].rpartition('.')[2]}"
            if client().download_needed(answer, str(file)):
                here = file.stat().st_size if file.exists() else 0
                size = int(answer.headers.get("Content-Length") or 0)
                artifacts.require_space(size - here, f"downloading {competition}")
                client().download_file(answer, str(file), api.http_client(), not progress, resume=True)
            return file

    try:
        return send(fetch, "downloading", competition, quiet=not progress)[0]
    except Unsure as error:
        raise Refused(f"{error}; the same command goes on where it stopped") from None
    except OSError as error:
        why = f"{paths.relative(folder)}: could not be written ({error.strerror or error})"
        raise Refused(f"{why}; what is there stays, and the same command goes on from it") from None


# --- calls and their failures --------------------------------------------------------------------------------------------


def sdk() -> Any:
    return client().build_kaggle_client()


def request(service: str, name: str, **fields: Any) -> Any:
    import importlib

    module = "competition" if service == "competitions" else service.removesuffix("s")
    if service == "kernels":
        module = "kernels"
    types = importlib.import_module(f"kagglesdk.{service}.types.{module}_api_service")
    request = getattr(types, name)()
    for field, value in fields.items():
        setattr(request, field, value)
    return request


def read(call: Callable[[], T], doing: str, competition: str, absent: tuple[int, ...] = ()) -> T | Any:
    import requests

    for pause in [*PAUSES, None]:
        try:
            with _caught():
                return call()
        except requests.HTTPError as error:
            code = _code(error)
            if code in absent:
                return None
            if pause is None or not (code == 429 or code >= 500):
                raise Refused(_words(error, doing, competition)) from None
            asked = error.response.headers.get("Retry-After", "") if error.response is not None else ""
            time.sleep(max(pause, min(float(asked), 120)) if pause and asked.isdigit() else pause)
        except requests.RequestException as error:
            if pause is None:
                raise Refused(
                    f"{doing}: no answer from Kaggle ({_short(error)}); is there a network?"
                ) from None
            time.sleep(pause)
        except ValueError as error:  # how the client words some refusals
            raise Refused(f"{doing}: {clean(str(error))}") from None
    raise AssertionError("unreachable")


def send(call: Callable[[], T], doing: str, competition: str, quiet: bool = True) -> tuple[T, str]:
    """Once. An answer that never came is Unsure; a refusal is Refused. Beside the answer what the client printed."""
    import requests

    said = io.StringIO()
    try:
        with _caught(said) if quiet else contextlib.redirect_stdout(said):
            return call(), said.getvalue()
    except requests.HTTPError as error:
        kind = Unsure if _code(error) >= 500 else Refused
        raise kind(_words(error, doing, competition)) from None
    except requests.RequestException as error:
        raise Unsure(f"{doing}: no answer from Kaggle ({_short(error)})") from None
    except ValueError as error:
        raise Refused(f"{doing}: {clean(str(error))}") from None


@contextlib.contextmanager
def _caught(said: io.StringIO | None = None) -> Iterator[None]:
    said = said or io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield


def _code(error: Any) -> int:
    return 0 if error.response is None else int(error.response.status_code)


def _words(error: Any, doing: str, competition: str) -> str:
    code, host = _code(error), clean(_told(error))
    if code in (401, 403, 404) and "ApiService" not in str(getattr(error.response, "url", "ApiService")):
        return f"{doing}: the storage that Kaggle named refuses ({code}); the same command asks for a fresh address"
    if code == 401:
        return f"{doing}: Kaggle does not accept the credentials (401); make a new token at {SITE}/settings and put it into one of {WAYS}"
    if code == 403 and competition:
        return f"{doing}: Kaggle says 403 ({host}); accept the rules at {SITE}/competitions/{competition}/rules, then type the same again"
    if code == 404 and competition:
        return f"{doing}: there is no competition {competition!r} on Kaggle (404); competition.slug is what stands in its address"
    if code == 429:
        return (
            f"{doing}: Kaggle asks for patience (429, too many requests); type the same again in some minutes"
        )
    if code >= 500:
        return f"{doing}: Kaggle is out of order ({code}); type the same again later"
    return f"{doing}: Kaggle refuses ({code or 'no code'}: {host})"


def _told(error: Any) -> str:
    try:
        return str(error.response.json().get("message") or error)
    except (AttributeError, ValueError):
        return str(error)


def _short(error: Exception) -> str:
    """Errors of requests nest their causes; the innermost says it."""
    text = re.sub(r"0x[0-9a-f]+", "", str(error))
    inner = re.findall(r"(?:Error|Exception)\(?[:\"', ]+([^\"'()<>]{5,80})", text)
    return clean(inner[-1] if inner else type(error).__name__)


def clean(text: str) -> str:
    """One line without keys: an answer of a server may repeat what it was sent."""
    return secrets.redact(" ".join(text.split()))[:300] or "no reason given"
