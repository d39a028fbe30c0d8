"""python -m comp.engine.worker FUNCTION JSON: one job of run/launcher.py, a function of FUNCTIONS with JSON's
keyword arguments.

It ends as soon as its standard input is closed, that is with the process that started it, however that one
ended: the job may then be started again elsewhere, and finds its folder free.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib import import_module

from comp.engine import hardware
from comp.engine.errors import UserError

FUNCTIONS = {  # job -> module:function in comp.engine
    "fold": "run.runner:run_part",
    "trials": "tune.search:worker",
}


def exit_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> int:
    job, arguments = sys.argv[1:]
    threading.Thread(target=exit_with_parent, daemon=True).start()
    module, _, name = FUNCTIONS[job].partition(":")
    with hardware.stop_on_signals():
        try:
            getattr(import_module(f"comp.engine.{module}"), name)(**json.loads(arguments))
        except UserError as error:
            print(*error.lines, sep="\n", flush=True)
            return 2
        except KeyboardInterrupt:
            return hardware.exit_code()
    return 0


if __name__ == "__main__":
    sys.exit(main())
