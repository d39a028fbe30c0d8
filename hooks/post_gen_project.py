"""Runs in the new project's folder: makes it a git repository and says how to go on. It deletes nothing.

It takes no answer into its code, so no answer can become code. Bad answers never come this far: cookiecutter.json
refuses them before a folder is made (`_why` there says how).
"""

import os
import subprocess
from pathlib import Path

name = Path.cwd().name

# A GIT_DIR left over from a git hook would make `git init` write into another repository.
clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

if not Path(".git").exists():
    try:
        subprocess.run(["git", "-c", "init.defaultBranch=main", "init", "--quiet"], env=clean, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"No git repository was made ({error}); run `git init` in {name} once git works.")

print(f"""
{name} is ready. Next:

    cd {name}
    git add -A && git commit -m "From the template"   # untouched first: later updates are merged against it
    make setup                                        # a virtual environment in .venv, a minute or two
    source .venv/bin/activate
    comp practice                                     # real digits to try the road on, or your data in data/raw
    comp --help                                       # the verbs, in the order you need them
""")
