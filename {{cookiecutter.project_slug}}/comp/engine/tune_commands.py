"""The verbs of the search as the command line sees them; nothing heavy is imported before it is asked for."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from comp.engine.errors import Refused

TUNE: dict[str, dict[str, Any]] = {
    "--space": {"default": "quick", "help": "name of a file in configs/tune/ (default: quick)"},
    "--trials": {
        "type": int,
        "help": "of the study in all, however many processes join; otherwise what the space says",
    },
    "--hours": {"type": float, "help": "stop after so long"},
    "--until": {"metavar": "HH:MM", "help": "stop at this time of day"},
    "--storage": {
        "metavar": "URL",
        "help": "postgresql://user@host/database, for several machines; SQLite in studies/ otherwise",
    },
    "--confirm": {
        "type": int,
        "metavar": "N",
        "help": "the best N and the experiment itself on three fresh seeds",
    },
    "--export": {"metavar": "NAME", "help": "write the best trial as configs/NAME.yaml and runs/NAME"},
    "--trial": {"type": int, "help": "with --export: this one instead of the best"},
}
STUDIES: dict[str, dict[str, Any]] = {
    "--storage": TUNE["--storage"] | {"help": "those of this PostgreSQL too"}
}


def tune(args: Namespace) -> None:
    ends = next((flag for flag in ("export", "confirm") if getattr(args, flag) is not None), None)
    searching = [flag for flag in ("trials", "hours", "until", "on") if getattr(args, flag) is not None]
    if ends and searching:
        raise Refused(
            f"--{searching[0]} has no effect with --{ends}, which searches no further; leave it out"
        )
    if args.trial is not None and args.export is None:
        raise Refused("--trial has no effect without --export NAME")
    from comp.engine.tune import confirm, export, search

    if args.export is None and args.confirm is None:
        search.tune(
            args.experiment,
            args.overrides,
            space_name=args.space,
            trials=args.trials,
            hours=args.hours,
            until=args.until,
            storage=args.storage,
            on=args.on,
        )
        return
    joined = search.join(args.experiment, args.overrides, args.space, args.storage)
    if args.confirm is not None:
        confirm.confirm(joined, args.confirm)
    if args.export is not None:
        export.export(joined, args.export, args.trial)


def studies(args: Namespace) -> None:
    from comp.engine.tune import listing

    listing.studies(args.storage)
