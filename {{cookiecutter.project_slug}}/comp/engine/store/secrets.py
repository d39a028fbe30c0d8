"""Finds API keys, tokens and passwords, and keeps them out of logs, artifacts, messages and commits.

validate_arguments(arguments)    raises before a command line with a secret is parsed
find_in_config(tree, lines)      errors for the values of a config file
redact(text)                     for everything that is printed, logged, stored as a diff or sent to W&B
python -m comp.engine.store.secrets    the pre-commit hook: exit code 1 if a staged file contains a secret

All four use one scanner, `find_secrets`. It finds
1. known formats: prefixes that services use, private keys, logins in URLs, 32 or 40 hexadecimal digits;
2. a name that contains key, token, secret or password and a random value, in the syntax of any language;
3. a quoted string of 24 or more letters and digits in random order, whatever its name;
4. the values of environment variables with such a name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from comp.engine.errors import UserError

REDACTED = "(removed)"
_NAME = r"(?:[\w.-]*(?:api[_-]?key|access[_-]?key|token|secret|passw(?:or)?d|credentials?)|(?:[\w.-]*_)?key)"
NAME = re.compile(_NAME, re.IGNORECASE)
ARGUMENT = re.compile(rf"(?<![\w.-])(--?{_NAME}[= ]|{_NAME}=)\S+", re.IGNORECASE)

# In each of these the group `key` is the secret.
_PREFIXED = (
    r"wandb_v\d_\w{16,}", r"KGAT_\w{16,}", r"hf_\w{16,}", r"gh[opsur]_\w{16,}", r"github_pat_\w{16,}", r"gl[a-z]{2,5}-[\w-]{16,}",
    r"sk-[\w-]{16,}", r"[sr]k_(?:live|test)_\w{16,}", r"A[KS]IA[A-Z0-9]{16}", r"xox[a-z]-[\w-]{10,}", r"AIza[\w-]{30,}", r"ya29\.[\w-]{16,}",
    r"npm_\w{30,}", r"pypi-[\w-]{16,}", r"SG\.[\w-]{16,}\.[\w-]{16,}", r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",
)  # fmt: skip
_PEM = "PRIVATE " + "KEY-----"
_SHAPES = [
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        rf"(?<![\w-])(?P<key>{'|'.join(_PREFIXED)})",
        rf"-----BEGIN [A-Z ]*{_PEM}(?:\\?\r?\n[+ -]?)?(?P<key>(?:(?!-----)[\s\S])+)",
        # A short user name alone is no secret (postgresql://comp@host/database).
        r"://(?P<key>[^/\s:@{}$<]*:[^/\s@{}$<]+|[^/\s:@{}$<]{20,})@",
        r"hooks\.slack\.com/services/(?P<key>[\w/]{20,})",
        r"\bpassword[ \t]+(?P<key>(?=\S*\d)[^\s\"'`{}]{8,})",  # .netrc
        # Old keys of Kaggle and keys of W&B. Not the hash of a commit: actions/checkout@…, /commit/…,
        # `commit …`, and `index …..…` in a diff.
        r"(?<![0-9a-zA-Z@/])(?<!commit )(?<!index )(?<![0-9a-f]\.\.)"
        r"(?P<key>[0-9a-f]{40}|[0-9a-f]{32}|[0-9A-F]{40}|[0-9A-F]{32})(?![0-9a-zA-Z])",
        # A shell variable with any value that is not another variable or command.
        r"^[+ -]?\s*(?:export\s+|ENV\s+|%env\s+)?[A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD)[A-Z0-9_]*="
        r"(?P<key>[^\s$({\"'`<]\S{7,})",
    )
]
_STRONG = r"api[_-]?key|access[_-]?key|private[_-]?key|auth[_-]?key|token|secret|passw(?:or)?d|pwd|credential"
_WEAK = r"bearer|basic|login|(?<![a-z])key|authori[sz]ation"
# Between a name and its value: quotes, brackets, a type annotation, a keyword. The value may be on the
# next line, and lines of a diff begin with + or -.
_MARKS = r"""(?:[ \t"'`\[\](){}:=,>|-]|\\["']|\\?\r?\n[+ -]?)"""
_TYPE = r"[\w.]{1,12}(?:\[[\w\[\], .]{1,30}\])?(?:[ \t]*\|[ \t]*\w{1,8})?"
_BETWEEN = rf"\w{{0,20}}{_MARKS}{{1,40}}?(?:{_TYPE}[ \t]*(?:=>?|:){_MARKS}{{0,40}}?)?"
_PAIRS = [
    re.compile(rf"(?:(?P<strong>{_STRONG})|{_WEAK}){_BETWEEN}{value}", re.IGNORECASE)
    for value in (
        r"""[rbfu]{0,2}\\?(?P<quote>["'`])(?P<key>[^"'`\s{}<>$()\\]{12,})\\?(?P=quote)""",
        r"""(?<![\w.-])(?P<key>[\w+/=~-]{16,})(?![\w(\[.])""",
    )
]
# Without a name: letters of both cases and digits in random order, as services issue them.
_LITERAL = re.compile(
    r"""["'`](?P<key>(?=[^"'`]*[a-z])(?=[^"'`]*[A-Z])(?=[^"'`]*\d)[A-Za-z0-9_-]{24,128})["'`]"""
)
_FILES = re.compile(
    r"kaggle\.json|access_token(\.txt)?|\.?_?netrc|\.env(\..*)?|credentials(\.json)?|.*\.pem"
    r"|id_(rsa|ed25519|ecdsa)"
)
REMEDY = "keys belong into the environment or ~/.kaggle and ~/.netrc, never into a command or a config"


def find_secrets(text: str) -> list[tuple[int, int]]:
    """(start, end) of every secret, from left to right."""
    found = [match.span("key") for shape in _SHAPES for match in shape.finditer(text)]
    for pair in _PAIRS:
        position = 0
        # Continue at the next character: a matched value may be the name of the next pair, as in
        # {"token": token, "key": "…"}.
        while match := pair.search(text, position):
            position = match.start() + 1
            if _is_random(match["key"], sure=bool(match["strong"]) and "quote" in pair.groupindex):
                found.append(match.span("key"))
    found += [match.span("key") for match in _LITERAL.finditer(text) if _is_random(match["key"], sure=False)]
    for secret in environment_secrets():
        found += [match.span() for match in re.finditer(re.escape(secret), text)]
    joined: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def redact(text: str) -> str:
    """Replaces every secret by "(removed)". The number of lines and the +/- marks of a diff stay the same,
    since git apply needs them."""
    parts, last = [], 0
    for start, end in find_secrets(text):
        first, *rest = text[start:end].split("\n")
        lines = [REDACTED * bool(first), *(line[: line[:1] in ("+", "-", " ")] + REDACTED for line in rest)]
        parts += [text[last:start], "\n".join(lines)]
        last = end
    return "".join([*parts, text[last:]])


def _is_random(value: str, sure: bool) -> bool:
    """Whether a value looks random, unlike a word, name, path or version. `sure`: a quoted string whose name
    (token, password) is used for secrets only; one digit is enough then."""
    if not re.search(r"\d", value) or len(set(value)) < 6:
        return False
    if re.search(r"\.[a-zA-Z]|^[./~]|/.*[./]", value) or ("/" in value and value == value.lower()):
        return False  # dotted names, paths
    if sure:
        return True
    kinds = [0 if char.isdigit() else 1 if char.islower() else 2 for char in value if char.isalnum()]
    changes = sum(a != b for a, b in pairwise(kinds))
    return len(kinds) >= 16 and changes >= 0.3 * len(kinds)


def environment_secrets() -> list[str]:
    """Longest first, so that a secret that contains another one is replaced as a whole."""
    return _secret_values(tuple(os.environ.items()))


@lru_cache(maxsize=4)  # called for every line of a log, and the environment hardly ever changes
def _secret_values(variables: tuple[tuple[str, str], ...]) -> list[str]:
    secrets = [value for name, value in variables if len(value) >= 8 and NAME.fullmatch(name)]
    return sorted(secrets, key=len, reverse=True)


def is_secret(text: str, name: str = "") -> bool:
    """Whether a text contains a secret. `name`: its key; all values of api_key, token … are secrets."""
    if len(text) >= 8 and NAME.fullmatch(name):
        return True
    return bool(find_secrets(text))


def validate_arguments(arguments: Sequence[str]) -> None:
    """Raises UserError if an argument is a secret. Call it first: argparse prints unknown arguments."""
    for place, text in enumerate(arguments, 1):
        before = arguments[place - 2] if place > 1 else ""
        name, equals, value = text.lstrip("-").partition("=")
        named = (equals and NAME.fullmatch(name) and len(value) >= 8) or (
            before.startswith("-") and NAME.fullmatch(before.lstrip("-")) and len(text) >= 8
        )
        if named or is_secret(text):
            raise UserError(
                "secret-found",
                where=f"argument {place}",
                what="looks like a key, so nothing was done",
                remedy=f"{REMEDY}. It is in your shell's history now: revoke it",
            )


def find_in_config(tree: Any, lines: Mapping[str, str], file: str, key: str = "") -> Iterator[UserError]:
    """Yields an error for each value or key of a config that looks like a secret. The secret is not in the
    message. `lines`: dotted key -> file:line."""
    if isinstance(tree, Mapping):
        for name, inner in tree.items():
            yield from find_in_config(inner, lines, file, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for i, inner in enumerate(tree):
            yield from find_in_config(inner, lines, file, f"{key}.{i}")
    elif isinstance(tree, str) and is_secret(tree, key.rpartition(".")[2]):
        yield UserError(
            "secret-found", where=lines.get(key, file), key=key, what="looks like a key", remedy=REMEDY
        )
    elif is_secret(key):
        what = "the name of a key looks like an API key"
        yield UserError("secret-found", where=lines.get(key, file), what=what, remedy=REMEDY)


# --- before a commit ----------------------------------------------------------------------------------------


def find_in_staged_files() -> list[str]:
    """A line for each place that must not be committed: file and line number, never the text."""
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
            continue  # images and archives
        lines = sorted({1 + text.count("\n", 0, start) for start, _ in find_secrets(text)})
        found += [f"{name}:{number}: looks like a key; take it out, {REMEDY}" for number in lines]
    return found


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout


if __name__ == "__main__":
    places = find_in_staged_files()
    print(*places, sep="\n", file=sys.stderr, end="\n" if places else "")
    sys.exit(1 if places else 0)
