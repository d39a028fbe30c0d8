"""python -m comp.engine.worker CALL JSON: one job of fan.py. It ends when its standard input does: with whoever started it, however
that one died, so that a job that begins elsewhere has its folder for itself."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from comp.engine import hardware
from comp.engine.errors import UserError


def fold(**given: Any) -> None:
    from comp.engine.run import runner

    runner.part(**given)


def trials(**given: Any) -> None:
    from comp.engine.tune import search

    search.part(**given)


CALLS: dict[str, Callable[..., None]] = {"fold": fold, "trials": trials}


def watch() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> int:
    call, given = sys.argv[1:]
    threading.Thread(target=watch, daemon=True).start()
    with hardware.stoppable():
        try:
            CALLS[call](**json.loads(given))
        except UserError as refused:
            print(*refused.lines, sep="\n", flush=True)
            return 2
        except KeyboardInterrupt:
            return hardware.exit_code()
    return 0


if __name__ == "__main__":
    sys.exit(main())
