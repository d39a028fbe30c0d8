"""Provenance of a run: code with uncommitted changes, command, machine and versions; without secrets."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from comp.engine.store import secrets

# The id of the empty tree, known in every repository: the base of a diff before the first commit
EMPTY_TREE = hashlib.sha1(b"tree 0\0", usedforsecurity=False).hexdigest()
CODE = (
    "*.py",
    "*.yaml",
    "*.toml",
    "*.sh",
    "Makefile",
    "requirements.txt",
)  # without notebooks, which contain outputs
LARGEST_DIFF = 2_000_000


def code(root: Path) -> tuple[dict[str, Any], str]:
    """(commit, whether the tree differs from it, a hash of comp/) and the diff, new files included.

    `git apply` of the diff to the commit restores the code that ran.
    """
    hashed = hashlib.sha256()
    for file in sorted((root / "comp").rglob("*.py")):
        hashed.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    inside = _git(root, "rev-parse", "--is-inside-work-tree") == "true\n"
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD").strip() if inside else ""
    diff = ""
    if inside:
        diff = _git(
            root, "diff", "--relative", "--no-color", "--no-ext-diff", commit or EMPTY_TREE, "--", *CODE
        )
        for name in _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *CODE).split("\0")[
            :-1
        ]:
            diff += _as_new(name, root / name)
    if len(diff) > LARGEST_DIFF:
        diff = diff[:LARGEST_DIFF] + f"\n(cut here: {len(diff)} characters in all)\n"
    facts = {
        "commit": commit or None,
        "changed": bool(diff) if inside else None,
        "comp": hashed.hexdigest()[:16],
    }
    return facts, secrets.redact(diff)


def hardware() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "gpus": [],
        "python": platform.python_version(),
    }
    for package in ("torch", "timm", "albumentations", "numpy", "scikit-learn", "opencv-python-headless"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    torch = sys.modules.get(
        "torch"
    )  # None in processes that do not train, where importing it would cost a second
    if torch is not None and torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        facts["gpus"] = [f"{device.name}, {device.total_memory / 1e9:.0f} GB" for device in devices]
    return facts


def without_secrets(value: Any, name: str = "") -> Any:
    """The same tree, with keys removed: recognized by name, by form, or because the environment contains
    them."""
    if isinstance(value, Mapping):
        return {key: without_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(inner, name) for inner in value]
    if not isinstance(value, str) or name == "commit":  # 40 hexadecimal digits, the form of W&B's keys
        return value
    return (
        secrets.REDACTED
        if value and secrets.NAME.fullmatch(name)
        else secrets.ARGUMENT.sub(rf"\1{secrets.REDACTED}", secrets.redact(value))
    )


def _as_new(name: str, file: Path) -> str:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return f"# new file {name}: {error}\n"
    head = f"diff --git a/{name} b/{name}\nnew file mode 100644\n"
    body = "".join(f"+{line}\n" for line in lines)
    return head + (f"--- /dev/null\n+++ b/{name}\n@@ -0,0 +1,{len(lines)} @@\n{body}" if lines else "")


def _git(root: Path, *arguments: str) -> str:
    """The output of git; empty if it is not installed, fails, or takes longer than 10 s."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            timeout=10,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
