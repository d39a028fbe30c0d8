"""Kaggle's API, called through Kaggle's own client in this process; its failures become one-line errors.

The client is imported only when it is needed: importing it prints help if there are no credentials, and sends
requests if there are. It also prints where it should raise, so its output is captured and used for error
messages. Reading is retried after a transient failure; sending never is, because it is not known whether the
request arrived.
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
from comp.engine.errors import UserError
from comp.engine.store import artifacts, paths, secrets

T = TypeVar("T")
RETRY_PAUSES = [2.0, 8.0, 20.0]  # seconds before each retry of a read
REQUIREMENTS = ("kaggle==2.2.4",)
SITE = "https://www.kaggle.com"
PAGE = 100  # submissions a page
CREDENTIALS = (
    "KAGGLE_API_TOKEN, ~/.kaggle/access_token, KAGGLE_USERNAME with KAGGLE_KEY, ~/.kaggle/kaggle.json"
)
CONTINUE = "the same command continues where it stopped"
NEW_TOKEN = f"make a token at {SITE}/settings and put it into one of {CREDENTIALS}"


class NoAnswer(UserError):
    """A request was sent and no answer came, so it is not known whether it arrived."""


@cache
def client() -> Any:
    """An authenticated KaggleApi."""
    check_versions("talking to Kaggle", REQUIREMENTS)  # calls and answers are those of this version
    import requests

    printed = io.StringIO()
    where = "signing in to Kaggle"
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            from kaggle.api.kaggle_api_extended import KaggleApi

            api = KaggleApi()
            api.authenticate()
    except SystemExit:
        given = [name for name in ("KAGGLE_API_TOKEN", "KAGGLE_KEY") if os.environ.get(name)]
        what = f"{given[0]} is set, but Kaggle does not accept it" if given else "no Kaggle credentials"
        raise UserError("kaggle-credentials", what=what, remedy=NEW_TOKEN) from None
    except requests.HTTPError as error:
        raise _http_error(error, where, "") from None
    except requests.RequestException as error:
        raise UserError(
            "kaggle-network", where=where, what=_innermost(error), remedy="is there a network?"
        ) from None
    except ValueError as error:  # a kaggle.json that is not JSON; the error's text would contain it
        raise UserError(
            "kaggle-credentials",
            where=where,
            what=f"the credentials cannot be read ({type(error).__name__})",
            remedy=f"write one of these again: {CREDENTIALS}",
        ) from None
    return api


def user() -> str:
    """The account that will own datasets and notebooks."""
    return str(client().config_values["username"])


# --- competitions -------------------------------------------------------------------------------------------


def submissions(competition: str) -> list[dict[str, Any]]:
    """All submissions of the team, newest first, also those that were made elsewhere."""
    found: list[dict[str, Any]] = []
    page = ""
    with sdk() as api:
        while True:
            body = request(
                "competitions", "ApiListSubmissionsRequest", competition_name=competition, page_size=PAGE
            )
            if page:
                body.page_token = page
            fetch = partial(api.competitions.competition_api_client.list_submissions, body)
            answer = read(fetch, "reading the submissions", competition)
            found += [_submission(item) for item in answer.submissions]
            page = answer.next_page_token
            if not page:
                return found


def _submission(item: Any) -> dict[str, Any]:
    return {
        "ref": item.ref,
        "at": item.date.isoformat() if item.date else None,
        "description": item.description or "",
        "status": item.status.name,
        "error": item.error_description or "",
        "public": _score(item.public_score),
        "private": _score(item.private_score),
        "file": item.file_name or "",
    }


def _score(text: str) -> float | None:
    """Kaggle sends scores as text, empty while there is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def limits(competition: str) -> tuple[int, bool]:
    """(how many submissions are allowed now, whether the total of the competition is the limit)."""
    answer = read(
        lambda: client().competition_get_submission_limits(competition), "reading the limits", competition
    )
    return answer.num_allowed_now, bool(answer.limited_by_total)


def submit_file(file: Path, message: str, competition: str) -> int:
    """The ref of the submission."""
    answer, printed = send(
        lambda: client().competition_submit(str(file), message, competition, quiet=True),
        f"sending {file.name}",
        competition,
    )
    return _ref(answer, printed, f"sending {file.name}")


def submit_kernel(kernel: str, version: int, message: str, competition: str, file: str) -> int:
    where = f"submitting {kernel} version {version}"
    answer, printed = send(
        lambda: client().competition_submit_code(file, message, competition, kernel, version, quiet=True),
        where,
        competition,
    )
    return _ref(answer, printed, where)


def _ref(answer: Any, printed: str, where: str) -> int:
    """Without a ref nothing was submitted, whatever the client says: it exits with 0 even when an upload
    failed."""
    if not answer.ref:
        reason = clean(answer.message or printed or "no reason given")
        what = f"Kaggle returned no ref, so it was not submitted ({reason})"
        raise UserError("kaggle-no-ref", where=where, what=what)
    return int(answer.ref)


def download(competition: str, folder: Path, progress: bool) -> Path:
    """folder/<competition>.zip, of the complete length. Continues the download of an earlier call that was
    killed."""

    def fetch() -> Path:
        with sdk() as api:
            body = request("competitions", "ApiDownloadDataFilesRequest", competition_name=competition)
            answer = api.competitions.competition_api_client.download_data_files(
                body
            )  # only the headers so far
            file = folder / f"{competition}.{answer.url.partition('?')[0].rpartition('.')[2]}"
            if client().download_needed(answer, str(file)):
                here = file.stat().st_size if file.exists() else 0
                size = int(answer.headers.get("Content-Length") or 0)
                artifacts.require_space(size - here, f"downloading {competition}")
                client().download_file(answer, str(file), api.http_client(), not progress, resume=True)
            return file

    try:
        return send(fetch, "downloading", competition, quiet=not progress)[0]
    except NoAnswer as error:
        raise UserError(error.code, where=error.where, what=error.what, remedy=CONTINUE) from None
    except OSError as error:
        what = f"could not be written ({error.strerror or error})"
        raise UserError("disk-write", where=paths.relative(folder), what=what, remedy=CONTINUE) from None


# --- calls and their failures -------------------------------------------------------------------------------


def sdk() -> Any:
    return client().build_kaggle_client()


def request(service: str, name: str, **fields: Any) -> Any:
    """A request object of kagglesdk."""
    import importlib

    module = {"competitions": "competition", "kernels": "kernels"}.get(service, service.removesuffix("s"))
    types = importlib.import_module(f"kagglesdk.{service}.types.{module}_api_service")
    body = getattr(types, name)()
    for field, value in fields.items():
        setattr(body, field, value)
    return body


def read(call: Callable[[], T], doing: str, competition: str, absent: tuple[int, ...] = ()) -> T | Any:
    """The answer; None for the status codes `absent`. Retried after a transient failure."""
    import requests

    for pause in [*RETRY_PAUSES, None]:
        try:
            with _captured():
                return call()
        except requests.HTTPError as error:
            code = _code(error)
            if code in absent:
                return None
            if pause is None or not (code == 429 or code >= 500):
                raise _http_error(error, doing, competition) from None
            wait = error.response.headers.get("Retry-After", "") if error.response is not None else ""
            time.sleep(max(pause, min(float(wait), 120)) if pause and wait.isdigit() else pause)
        except requests.RequestException as error:
            if pause is None:
                raise UserError(
                    "kaggle-network",
                    where=doing,
                    what=f"no answer from Kaggle ({_innermost(error)})",
                    remedy="is there a network?",
                ) from None
            time.sleep(pause)
        except ValueError as error:  # how the client reports some errors of the server
            raise UserError("kaggle-error", where=doing, what=clean(str(error))) from None
    raise AssertionError("unreachable")


def send(call: Callable[[], T], doing: str, competition: str, quiet: bool = True) -> tuple[T, str]:
    """Once: (answer, what the client printed). NoAnswer if it is not known whether the request arrived."""
    import requests

    printed = io.StringIO()
    try:
        with _captured(printed) if quiet else contextlib.redirect_stdout(printed):
            return call(), printed.getvalue()
    except requests.HTTPError as error:
        kind = NoAnswer if _code(error) >= 500 else UserError
        raise _http_error(error, doing, competition, kind) from None
    except requests.RequestException as error:
        what = f"no answer from Kaggle ({_innermost(error)})"
        raise NoAnswer("kaggle-network", where=doing, what=what) from None
    except ValueError as error:
        raise UserError("kaggle-error", where=doing, what=clean(str(error))) from None


@contextlib.contextmanager
def _captured(printed: io.StringIO | None = None) -> Iterator[None]:
    printed = printed or io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        yield


def _code(error: Any) -> int:
    return 0 if error.response is None else int(error.response.status_code)


def _http_error(error: Any, doing: str, competition: str, kind: type[UserError] = UserError) -> UserError:
    """HTTP status codes that have a known remedy, then the others. The code of the error is
    kaggle-<status>."""
    code, message = _code(error), clean(_message(error))
    again = "type the same command again"
    if code in (401, 403, 404) and "ApiService" not in str(getattr(error.response, "url", "ApiService")):
        what, remedy = f"the storage server of Kaggle rejects the upload or download ({code})", again
    elif code == 401:
        what, remedy = "Kaggle does not accept the credentials (401)", NEW_TOKEN
    elif code == 403 and competition:
        rules = f"{SITE}/competitions/{competition}/rules"
        what, remedy = f"forbidden (403: {message})", f"accept the rules at {rules}, then {again}"
    elif code == 404 and competition:
        what = f"there is no competition {competition!r} on Kaggle (404)"
        remedy = "competition.slug is the last part of its address"
    elif code == 429:
        what, remedy = "too many requests (429)", f"{again} in some minutes"
    elif code >= 500:
        what, remedy = f"Kaggle has a server error ({code})", f"{again} later"
    else:
        what, remedy = f"Kaggle rejects the request ({code or 'no status code'}: {message})", ""
    return kind(f"kaggle-{code}", where=doing, what=what, remedy=remedy)


def _message(error: Any) -> str:
    try:
        return str(error.response.json().get("message") or error)
    except (AttributeError, ValueError):
        return str(error)


def _innermost(error: Exception) -> str:
    """Errors of requests nest their causes; the innermost one is the reason."""
    text = re.sub(r"0x[0-9a-f]+", "", str(error))
    inner = re.findall(r"(?:Error|Exception)\(?[:\"', ]+([^\"'()<>]{5,80})", text)
    return clean(inner[-1] if inner else type(error).__name__)


def clean(text: str) -> str:
    """One line without credentials: an answer of a server may repeat what it was sent."""
    return secrets.redact(" ".join(text.split()))[:300] or "no reason given"
