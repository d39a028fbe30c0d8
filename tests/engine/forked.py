"""Runs functions in forked processes, which need not import again what the parent has imported."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def forked(work: Callable[[], object]) -> int:
    """Its exit status as waitpid gives it."""
    return all_forked(work)[0]


def all_forked(*works: Callable[[], object]) -> list[int]:
    """Side by side."""
    sys.stdout.flush()
    children = [_begun(work) for work in works]
    return [os.waitpid(child, 0)[1] for child in children]


def _begun(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child
