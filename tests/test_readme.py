"""READMEs and docs agree with the code: trees, links, commands, and the messages that docs/3am.md quotes."""

import ast
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from bake import CHECKOUT, PROJECT

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"{PROJECT}/{name}" for name in ("README.md", "AGENTS.md", "docs/opinions.md", "docs/3am.md")),
]


def listed(page: Path) -> set[str]:
    """The paths of the tree in a README: two blanks of indent a level, a comment on every line."""
    block = re.search(r"```text\n(.+?)```", page.read_text("utf-8"), re.DOTALL)
    assert block
    paths, folders = set(), [""]
    for line in block[1].splitlines():
        match = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line)
        assert match, f"{page.name}: {line!r} is no line of a tree"
        depth = len(match[1]) // 2
        folders = folders[: depth + 1]
        paths.add(folders[-1] + match[2].rstrip("/"))
        assert match[3], f"{page.name}: {line!r} lacks its comment"
        if match[2].endswith("/"):
            folders.append(folders[-1] + match[2])
    return paths


def wanted(files: set[str]) -> set[str]:
    """Every file, except that tests, benchmarks and the engine stand there as folders, and package markers go
    without saying."""
    folders = {match[1] for name in files if (match := re.match(r"(.*comp/engine/\w+)/", name))}
    inside = r"(^|/)((tests|benchmarks|comp/engine)/.+|__init__\.py)$"
    return {name for name in files if not re.search(inside, name)} | folders | {"tests"}


def test_tree_of_the_project(template):
    lies = template / PROJECT
    there = {path.relative_to(lies).as_posix() for path in lies.rglob("*")}
    files = {name for name in there if (lies / name).is_file()}
    tree = listed(lies / "README.md")
    assert wanted(files) - tree == set(), (
        f"give each a line in the trees of README.md and {PROJECT}/README.md"
    )
    assert tree - there == set(), "in the tree, but not there"


def test_tree_of_the_template(template):
    there = {path.relative_to(template).as_posix() for path in template.rglob("*")}
    files = {name for name in there if (template / name).is_file()}
    tree = listed(template / "README.md")
    assert wanted({name for name in files if f"{PROJECT}/tests/" not in name}) - tree == set(), (
        "give each a line in the tree of README.md"
    )
    assert tree - there == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    file = CHECKOUT / page
    for link in re.findall(r"\]\(([^)]+)\)", file.read_text("utf-8")):
        if not link.startswith("https://"):
            assert (file.parent / unquote(link)).exists(), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    sys.path.insert(0, str(CHECKOUT / PROJECT))
    try:
        from comp.engine.cli import VERBS
    finally:
        sys.path.pop(0)
    text = (CHECKOUT / page).read_text("utf-8")
    for verb, rest in re.findall(r"[`\n]comp ([a-z][a-z-]*)([^`\n#]*)", text):
        assert verb in VERBS, f"{page}: comp {verb}"
        known = {name for argument in VERBS[verb].arguments for name in argument.names}
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in known, f"{page}: comp {verb} {option}"
    makefile = (file_of(page) / "Makefile").read_text()
    for target in re.findall(r"[`\n]make ([a-z]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"
    for script in re.findall(r"scripts/[a-z_]+\.sh", text):
        assert (CHECKOUT / PROJECT / script).exists(), f"{page}: {script}"


def file_of(page: str) -> Path:
    return CHECKOUT / PROJECT if page.startswith(PROJECT) else CHECKOUT


def test_two_commands():
    assert re.search(r"```bash\nmake demo .*\nmake test .*\n```", (CHECKOUT / "README.md").read_text("utf-8"))


def quoted_messages() -> list[str]:
    """The code spans in the first column of the tables of docs/3am.md."""
    text = (CHECKOUT / PROJECT / "docs/3am.md").read_text("utf-8")
    symptoms = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return [span for symptom in symptoms for span in re.findall(r"`([^`]+)`", symptom)]


def printed_texts() -> list[str]:
    """The strings of comp/ except docstrings. A field of an f-string becomes …"""
    texts = []
    for file in (CHECKOUT / PROJECT / "comp").rglob("*.py"):
        tree = ast.parse(file.read_text("utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = node.values
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in parts))
            elif (
                isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
            ):
                texts.append(node.value)
    return texts


def test_quoted_messages_are_printed():
    """A message that is reworded in comp/ has to be reworded in docs/3am.md. The constant parts of a quote,
    those between …, stand in this order in one string of comp/."""
    messages, texts = quoted_messages(), printed_texts()
    assert len(messages) >= 15, "docs/3am.md quotes messages as code spans in the first column"
    for message in messages:
        parts = [part.strip() for part in message.split("…")]
        assert len("".join(parts)) >= 10, f"docs/3am.md: `{message}` is too short to be recognized"
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in texts), f"docs/3am.md: comp prints no `{message}`"
