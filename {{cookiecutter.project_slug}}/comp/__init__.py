"""From raw files to a submitted ensemble with nested scores. Start reading at train.py."""

import sys

if sys.platform == "win32":  # locks, signals and forked loader processes are those of Linux and macOS
    print(
        "comp: Windows is not supported; it runs in WSL (wsl --install), on Linux and on macOS",
        file=sys.stderr,
    )
    sys.exit(2)
