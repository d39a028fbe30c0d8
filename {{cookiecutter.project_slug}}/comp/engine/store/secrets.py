"""Keys: how they look, how they are kept out. Nothing here ever shows one.

refuse(arguments)        a command line that holds one is refused before anything is read or written
faults(tree, lines)      the same for config files
removed(text)            what an answer, a log, a diff or W&B may show
python -m comp.engine.store.secrets    refuses a commit that would bring one into the repository; .githooks/pre-commit runs it

All four ask one scanner, `spans`. It knows:
1. Shapes: what services begin their keys with, private keys, logins in URLs, 32 or 40 hexadecimal digits that stand alone.
2. A name that says key, token, secret or password, and behind it a value that looks random, whatever the language puts between.
3. A quoted text of 24 letters and digits or more, thoroughly mixed, whatever its name.
4. The values that the environment holds under such a name.
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

from comp.engine.errors import Refused

REDACTED = "(removed)"
_NAME = r"(?:[\w.-]*(?:api[_-]?key|access[_-]?key|token|secret|passw(?:or)?d|credentials?)|(?:[\w.-]*_)?key)"
NAME = re.compile(_NAME, re.IGNORECASE)
ARGUMENT = re.compile(rf"(?<![\w.-])(--?{_NAME}[= ]|{_NAME}=)\S+", re.IGNORECASE)

# In each of these the group `key` is what goes.
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
        # A user's name alone is no key (postgresql://comp@host/database), one as long as a token is.
        r"://(?P<key>[^/\s:@{}$<]*:[^/\s@{}$<]+|[^/\s:@{}$<]{20,})@",
        r"hooks\.slack\.com/services/(?P<key>[\w/]{20,})",
        r"\bpassword[ \t]+(?P<key>(?=\S*\d)[^\s\"'`{}]{8,})",  # .netrc
        # Kaggle's old keys and W&B's; not the name of a commit: actions/checkout@…, /commit/…, `commit …`, `index ….…` of a diff.
        r"(?<![0-9a-zA-Z@/])(?<!commit )(?<!index )(?<![0-9a-f]\.\.)(?P<key>[0-9a-f]{40}|[0-9a-f]{32}|[0-9A-F]{40}|[0-9A-F]{32})(?![0-9a-zA-Z])",
        # A variable of the shell keeps any value but that of another variable or command.
        r"^[+ -]?\s*(?:export\s+|ENV\s+|%env\s+)?[A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD)[A-Z0-9_]*=(?P<key>[^\s$({\"'`<]\S{7,})",
    )
]
_STRONG = r"api[_-]?key|access[_-]?key|private[_-]?key|auth[_-]?key|token|secret|passw(?:or)?d|pwd|credential"
_WEAK = r"bearer|basic|login|(?<![a-z])key|authori[sz]ation"
# What stands between a name and its value: quotes, brackets, a type, a keyword; the value may stand on the next line, and a line of a
# diff begins with a mark.
_MARKS = r"""(?:[ \t"'`\[\](){}:=,>|-]|\\["']|\\?\r?\n[+ -]?)"""
_BETWEEN = rf"\w{{0,20}}{_MARKS}{{1,40}}?(?:[\w.]{{1,12}}(?:\[[\w\[\], .]{{1,30}}\])?(?:[ \t]*\|[ \t]*\w{{1,8}})?[ \t]*(?:=>?|:){_MARKS}{{0,40}}?)?"
_PAIRS = [
    re.compile(rf"(?:(?P<strong>{_STRONG})|{_WEAK}){_BETWEEN}{value}", re.IGNORECASE)
    for value in (
        r"""[rbfu]{0,2}\\?(?P<quote>["'`])(?P<key>[^"'`\s{}<>$()\\]{12,})\\?(?P=quote)""",
        r"""(?<![\w.-])(?P<key>[\w+/=~-]{16,})(?![\w(\[.])""",
    )
]
# Without a name: letters of both cases and digits, all mixed, as services deal them and nobody names things.
_LITERAL = re.compile(
    r"""["'`](?P<key>(?=[^"'`]*[a-z])(?=[^"'`]*[A-Z])(?=[^"'`]*\d)[A-Za-z0-9_-]{24,128})["'`]"""
)
_FILES = re.compile(
    r"kaggle\.json|access_token(\.txt)?|\.?_?netrc|\.env(\..*)?|credentials(\.json)?|.*\.pem|id_(rsa|ed25519|ecdsa)"
)
REMEDY = "keys belong into the environment or ~/.kaggle and ~/.netrc, never into a command or a config"


def find_secrets(text: str) -> list[tuple[int, int]]:
    """Where keys stand, from left to right."""
    found = [match.span("key") for shape in _SHAPES for match in shape.finditer(text)]
    for pair in _PAIRS:
        position = 0
        # From the next letter on, because what a name leads to may be the name of what follows: {"token": token, "key": "…"}.
        while match := pair.search(text, position):
            position = match.start() + 1
            if _random(match["key"], sure=bool(match["strong"]) and "quote" in pair.groupindex):
                found.append(match.span("key"))
    found += [match.span("key") for match in _LITERAL.finditer(text) if _random(match["key"], sure=False)]
    for held in environment_secrets():
        found += [match.span() for match in re.finditer(re.escape(held), text)]
    joined: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def redact(text: str) -> str:
    """The text without its keys. Lines stay lines, and keep the mark of a diff: git apply counts them."""
    parts, last = [], 0
    for start, end in find_secrets(text):
        first, *rest = text[start:end].split("\n")
        gone = [REDACTED * bool(first), *(line[: line[:1] in ("+", "-", " ")] + REDACTED for line in rest)]
        parts += [text[last:start], "\n".join(gone)]
        last = end
    return "".join([*parts, text[last:]])


def _random(value: str, sure: bool) -> bool:
    """Rather than a word, a name, a path or a version. `sure`: a quoted text behind a name that only keys have."""
    if not re.search(r"\d", value) or len(set(value)) < 6:
        return False
    if re.search(r"\.[a-zA-Z]|^[./~]|/.*[./]", value) or ("/" in value and value == value.lower()):
        return False  # names with dots, paths
    if sure:
        return True
    kinds = [0 if each.isdigit() else 1 if each.islower() else 2 for each in value if each.isalnum()]
    changes = sum(a != b for a, b in pairwise(kinds))
    return len(kinds) >= 16 and changes >= 0.3 * len(kinds)


def environment_secrets() -> list[str]:
    """Longest first, so that a key that holds another one goes as a whole."""
    return _secret_values(tuple(os.environ.items()))


@lru_cache(maxsize=4)  # every line of a log asks, and the environment hardly ever changes
def _secret_values(variables: tuple[tuple[str, str], ...]) -> list[str]:
    found = [value for name, value in variables if len(value) >= 8 and NAME.fullmatch(name)]
    return sorted(found, key=len, reverse=True)


def is_secret(text: str, name: str = "") -> bool:
    """A text that a person would have to change if it became public."""
    if len(text) >= 8 and NAME.fullmatch(name):
        return True
    return bool(find_secrets(text))


def validate_arguments(arguments: Sequence[str]) -> None:
    """Before the arguments are parsed: a parser repeats what it does not know."""
    for place, text in enumerate(arguments, 1):
        before = arguments[place - 2] if place > 1 else ""
        name, equals, value = text.lstrip("-").partition("=")
        named = (equals and NAME.fullmatch(name) and len(value) >= 8) or (
            before.startswith("-") and NAME.fullmatch(before.lstrip("-")) and len(text) >= 8
        )
        if named or is_secret(text):
            raise Refused(
                f"argument {place} looks like a key, so nothing was done; {REMEDY}. It is in your shell's history now: change it"
            )


def find_in_config(tree: Any, lines: Mapping[str, str], file: str, key: str = "") -> Iterator[str]:
    """One line for each value of a config that looks like a key; the value is not in it."""
    if isinstance(tree, Mapping):
        for name, inner in tree.items():
            yield from find_in_config(inner, lines, file, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for i, inner in enumerate(tree):
            yield from find_in_config(inner, lines, file, f"{key}.{i}")
    elif isinstance(tree, str) and is_secret(tree, key.rpartition(".")[2]):
        yield f"{lines.get(key, file)}: {key}: looks like a key; {REMEDY}"
    elif is_secret(key):
        yield f"{lines.get(key, file)}: a name that looks like a key; {REMEDY}"


# --- before a commit -----------------------------------------------------------------------------------------------------


def find_in_staged_files() -> list[str]:
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
        lines = sorted({1 + text.count("\n", 0, start) for start, _ in find_secrets(text)})
        found += [f"{name}:{number}: looks like a key; take it out, {REMEDY}" for number in lines]
    return found


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout


if __name__ == "__main__":
    wrong = find_in_staged_files()
    print(*wrong, sep="\n", file=sys.stderr, end="\n" if wrong else "")
    sys.exit(1 if wrong else 0)
