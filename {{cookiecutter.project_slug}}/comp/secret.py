"""Keys: how they look, how they are kept out. Nothing here ever shows one.

refuse(arguments)        a command line that holds one is refused before anything is read or written
faults(tree, lines)      the same for config files
removed(text)            what an answer, a diff or a log may show
python -m comp.secret    refuses a commit that would bring one into the repository; .githooks/pre-commit runs it
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from comp.refused import Refused

REMOVED = "(removed)"
_NAME = r"(?:[\w.-]*(?:api[_-]?key|access[_-]?key|token|secret|passw(?:or)?d|credentials?)|(?:[\w.-]*_)?key)"
NAME = re.compile(_NAME, re.IGNORECASE)
ARGUMENT = re.compile(rf"(?<![\w.-])(--?{_NAME}[= ]|{_NAME}=)\S+", re.IGNORECASE)
_LITERAL = re.compile(rf"(?<![\w.])({_NAME}[\"']?\s*[=:]\s*)([\"'])[^\"'\s]{{12,}}\2", re.IGNORECASE)
_VARIABLE = re.compile(
    r"^([+ -]?\s*(?:export\s+)?[A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD)[A-Z0-9_]*=)\S+", re.MULTILINE
)
_SHAPE = re.compile(
    r"(?<![\w-])(?:wandb_v\d_\w{16,}|KGAT_\w{16,}|hf_\w{16,}|gh[opsu]_\w{16,}|github_pat_\w{16,}|sk-[\w-]{16,}|AKIA[A-Z0-9]{16}|xox[a-z]-[\w-]{10,})"
)
_NETRC = re.compile(r"(\bpassword\s+)\S{8,}")
_HEX = re.compile(r"(?<![0-9a-zA-Z])(?:[0-9a-f]{32}|[0-9a-f]{40})(?![0-9a-zA-Z])")  # Kaggle's old keys, W&B's
# A user's name alone is no key (postgresql://comp@host/database), one as long as a token is.
_LOGIN = re.compile(r"(://)(?:[^/\s:@]+:[^/\s@]+|[^/\s:@]{20,})@")
_FILES = re.compile(
    r"kaggle\.json|access_token(\.txt)?|\.?_?netrc|\.env(\..*)?|credentials(\.json)?|.*\.pem|id_(rsa|ed25519|ecdsa)"
)
HOMES = "keys belong into the environment or ~/.kaggle and ~/.netrc, never into a command or a config"
MADE_UP = "0123456789"  # stands in the keys that tests plant


def removed(text: str) -> str:
    """Without what the environment holds under a key's name, and without what has the shape of one."""
    for held in held_by_environment():
        text = text.replace(held, REMOVED)
    return _LOGIN.sub(rf"\1{REMOVED}@", _SHAPE.sub(REMOVED, text))


def removed_from_code(text: str) -> str:
    """Code says `token = read()` and means no harm: here only literals and assignments of the shell count."""
    return _VARIABLE.sub(
        rf"\1{REMOVED}", _LITERAL.sub(rf"\1\2{REMOVED}\2", _NETRC.sub(rf"\1{REMOVED}", removed(text)))
    )


def held_by_environment() -> list[str]:
    """Longest first, so that a key that holds another one goes as a whole."""
    return _held(tuple(os.environ.items()))


@lru_cache(maxsize=4)  # every line of a log asks, and the environment hardly ever changes
def _held(variables: tuple[tuple[str, str], ...]) -> list[str]:
    found = [value for name, value in variables if len(value) >= 8 and NAME.fullmatch(name)]
    return sorted(found, key=len, reverse=True)


def looks(text: str, name: str = "") -> bool:
    """A text that a person would have to change if it became public."""
    if len(text) >= 8 and NAME.fullmatch(name):
        return True
    return removed(text) != text or bool(_HEX.search(text)) or bool(_LITERAL.search(text))


def refuse(arguments: Sequence[str]) -> None:
    """Before the arguments are parsed: a parser repeats what it does not know."""
    for place, text in enumerate(arguments, 1):
        before = arguments[place - 2] if place > 1 else ""
        name, equals, value = text.lstrip("-").partition("=")
        named = (equals and NAME.fullmatch(name) and len(value) >= 8) or (
            before.startswith("-") and NAME.fullmatch(before.lstrip("-")) and len(text) >= 8
        )
        if named or looks(text):
            raise Refused(
                f"argument {place} looks like a key, so nothing was done; {HOMES}. It is in your shell's history now: change it"
            )


def faults(tree: Any, lines: Mapping[str, str], file: str, key: str = "") -> Iterator[str]:
    """One line for each value of a config that looks like a key; the value is not in it."""
    if isinstance(tree, Mapping):
        for name, inner in tree.items():
            yield from faults(inner, lines, file, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for i, inner in enumerate(tree):
            yield from faults(inner, lines, file, f"{key}.{i}")
    elif isinstance(tree, str) and looks(tree, key.rpartition(".")[2]):
        yield f"{lines.get(key, file)}: {key}: looks like a key; {HOMES}"
    elif looks(key):
        yield f"{lines.get(key, file)}: a name that looks like a key; {HOMES}"


# --- before a commit -----------------------------------------------------------------------------------------------------


def staged() -> list[str]:
    """What must not be committed: file and line, never the text."""
    names = _git("diff", "--cached", "--name-only", "-z", "--diff-filter=ACMR").decode().split("\0")[:-1]
    found = []
    for name in names:
        if _FILES.fullmatch(PurePosixPath(name).name.lower()):
            found.append(
                f"{name}: a file of this name holds keys; git rm --cached {name}, and list it in .gitignore"
            )
            continue
        try:
            text = _git("show", f":{name}").decode("utf-8")
        except UnicodeDecodeError:
            continue  # pictures and archives
        for number, line in enumerate(text.splitlines(), 1):
            if MADE_UP not in line and removed_from_code(line) != line:
                found.append(f"{name}:{number}: looks like a key; take it out, {HOMES}")
    return found


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout


if __name__ == "__main__":
    wrong = staged()
    print(*wrong, sep="\n", file=sys.stderr, end="\n" if wrong else "")
    sys.exit(1 if wrong else 0)
