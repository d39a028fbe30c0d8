"""The verbs. Each is a few lines that import what they need, so that --help answers at once."""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys
from typing import TYPE_CHECKING

from comp.engine import command, hardware, train_commands
from comp.engine import model_commands as models
from comp.engine import tune_commands as search
from comp.engine.command import DEBUG, EXPERIMENT, ON, OVERRIDES, Args, Verb, argument, flag
from comp.engine.errors import Refused, UserError
from comp.engine.store import secrets

if TYPE_CHECKING:
    from comp.engine.config.schema import Config

# --- data ----------------------------------------------------------------------------------------------------------------


def practice(args: Args) -> None:
    from comp.engine.extras import practice
    from comp.engine.store import paths

    if args.score:
        practice.score(args.score)
    else:
        practice.make(paths.path("data", "raw"))


def download(args: Args) -> None:
    from comp.engine.deliver import download

    download.download(_competition_config(), ceiling=args.ceiling)


def inspect(args: Args) -> None:
    from comp.engine.extras import inspect

    inspect.inspect()


def prepare(args: Args) -> None:
    from comp.engine.data import prepare

    prepare.prepare(_competition_config())


def check(args: Args) -> int:
    from comp.engine.data import check
    from comp.engine.deliver import dummy

    if not args.experiment:
        return 2 if check.check(_competition_config(), dummy.written) else 0
    cfg = _config(args)
    hardware.settle(cfg.train.threads)
    from comp import models

    return 2 if check.check(cfg, dummy.written, exact=True, network=models.check_report) else 0


def folds(args: Args) -> None:
    from comp.engine.data import duplicates, make_folds, samples

    if args.duplicates:
        duplicates.report(_competition_config(), samples.load())
        return
    make_folds.make(_competition_config(), samples.load(), remake=args.remake)


def cache(args: Args) -> None:
    from comp.engine import hardware
    from comp.engine.data import cache, samples

    cfg = _config(args)
    hardware.settle(cfg.train.threads)
    names = sorted({path for images in samples.load().frame["images"] for path in images})
    cache.open_images(cfg, names, cfg.machine.progress, must_fit=True)
    print(f"next: comp train {args.experiment}")


# --- predictions ---------------------------------------------------------------------------------------------------------


def predict(args: Args) -> None:
    from comp.engine.run import runner

    if args.kernel:
        from comp.engine.deliver import kernel_predict

        kernel_predict.predict()
    elif args.experiment is None:
        raise Refused("predict what? comp predict exp001")
    else:
        runner.predict(args.experiment, tta=args.tta, space=args.space, last_look=args.last_look)


def bank(args: Args) -> None:
    from comp.engine.extras import listings

    listings.bank(csv=args.csv, only=" ".join(args.filter))


def ensemble(args: Args) -> None:
    from comp.engine.ensemble import blend

    blend.blend(args.name)
    if args.plots:
        from comp.engine.ensemble import plots

        plots.draw(args.name)


def tta(args: Args) -> None:
    from comp.engine.extras import tta_search

    tta_search.tta(args.experiment, args.max_ms, args.views)


def slices(args: Args) -> None:
    from comp.engine.extras import slices

    slices.slices(args.name)


def contradicted(args: Args) -> None:
    from comp.engine.extras import label_errors

    label_errors.contradicted(args.names)


def audit(args: Args) -> int:
    from comp.engine.extras import adversarial_validation, leak_audit

    if args.drift:
        adversarial_validation.drift(args.drift)
        return 0
    return 1 if leak_audit.audit(args.seeds) else 0


# --- overview and delivery -----------------------------------------------------------------------------------------------


def runs(args: Args) -> None:
    from comp.engine.extras import listings

    listings.runs()


def config(args: Args) -> None:
    from comp.engine.extras import listings

    listings.config(args.experiment, args.overrides, debug=args.debug, against=args.diff)


def clean(args: Args) -> None:
    from comp.engine.extras import clean

    clean.clean(trash=args.trash, cache=args.cache, state=args.state, steal=args.steal_lock)


def submit(args: Args) -> None:
    from comp import submission
    from comp.engine.deliver import submit, verify

    if args.dry_run:
        verify.verify(args.name)
        submission.dry_run(args.name)
    elif args.message is None:
        raise Refused(
            'what is new in it? comp submit NAME -m "larger images"; or --dry-run, which sends nothing'
        )
    else:
        submit.submit(args.name, args.message, force=args.force, anyway=args.anyway, wait=not args.no_wait)


def kernel(args: Args) -> None:
    from comp.engine.deliver import kernel, push, rehearse

    if args.budget:
        from comp.engine.deliver import budget

        args.name = budget.fit(args.name, args.budget)
    if args.push:
        push.push(args.name, args.message, wait=not args.no_wait, anyway=args.anyway)
        return
    kernel.build(args.name)
    if args.rehearse:
        rehearse.rehearse(args.name)


def scores(args: Args) -> int:
    from comp.engine.deliver import scores

    return scores.scores()


def _config(args: Args) -> Config:
    from comp.engine.config import experiments

    return experiments.load(args.experiment, args.overrides).config


def _competition_config() -> Config:
    """The data verbs read nothing but the section `competition`."""
    from comp.engine.config import resolve
    from comp.engine.store import paths

    return resolve.load(paths.root(), "base").config


VERBS = {
    "download": Verb("data", download, "the competition's files from Kaggle into data/raw, once", (
        argument("--ceiling", type=int, metavar="GB", help="unpack up to this much without asking; 100 otherwise"),)),
    "practice": Verb("data", practice, "fill data/raw with a competition to practise on", (
        argument("--score", metavar="NAME", help="what submissions/NAME.csv scores on the hidden answers"),), locks=False),
    "inspect": Verb("data", inspect, "look at data/raw and write a first configs/competition.yaml"),
    "prepare": Verb("data", prepare, "data/raw, as competition.yaml declares it, into data/samples.parquet"),
    "check": Verb("data", check, "look for faults in tables, images, declaration and the form of the submission before they cost a run", (
        argument("experiment", nargs="?", help="open the images as configs/EXPERIMENT.yaml says (size, fit, channels, depth); otherwise small, and as base.yaml says"),
        OVERRIDES)),
    "folds": Verb("data", folds, "make data/folds.parquet, once, and audit it", (
        flag("--remake", "new folds on purpose: runs on the old ones can no longer be mixed with new ones"),
        flag("--duplicates", "list copies by bytes and by pixels, those between train and test apart"))),
    "cache": Verb("data", cache, "decode all images once, to the size of an experiment", (EXPERIMENT, OVERRIDES)),
    **train_commands.VERBS,
    **models.VERBS,
    "predict": Verb("predictions", predict, "merge folds and seeds of a run; with --tta, predict again under other views", (
        argument("experiment", nargs="?", help="name of a run"),
        argument("--tta", help="views, separated by commas: makes the member <run>:tta-<views>"),
        argument("--space", choices=("probability", "logit", "geometric"), help="where the views are averaged"),
        flag("--last-look", "the score on the rows that folds.holdout locked away; every look is counted"),
        flag("--kernel", "on Kaggle: predict the test set that lies there, from the bundle of comp kernel"))),
    "tta": Verb("predictions", tta, "the views that gain most for their time, scored on folds that did not choose them", (
        argument("experiment", help="name of a finished run"),
        argument("--views", metavar="LIST", help="only these, by commas; default: flips, zooms, crops and three draws of the run's recipe, "
                 "each a pass over all out-of-fold rows"),
        argument("--max-ms", type=float, help="ceiling of an image and checkpoint, all views together"))),
    "bank": Verb("predictions", bank, "list all predictions with their scores", (
        argument("filter", nargs="*", help="like score>0.9 model~convnext task=binary name~exp0; quote it for the shell"),
        argument("--csv", metavar="NAME", help="print one, like exp001 or exp001:seed1, as csv"),), locks=False),
    "ensemble": Verb("predictions", ensemble, "blend what configs/ensembles/NAME.yaml lists", (
        argument("name", help="name of a file in configs/ensembles/"),
        flag("--plots", "draw correlation, waterfall, weights and honest against in-sample; costs some refits"))),
    "slices": Verb("predictions", slices, "where it is wrong: scores by class, group and metadata, with n and interval", (
        argument("name", help="a run, a member or an ensemble"),), locks=False),
    "label-errors": Verb("predictions", contradicted, "rows whose label several models deny with one voice, as a table with pictures", (
        argument("names", nargs="*", help="runs, members or ensembles; all runs unless told"),)),
    "audit": Verb("predictions", audit, "look for leaks: in files, runs, ensembles, and in the pipeline on coin flips", (
        argument("--seeds", type=int, default=1, help="worlds of coin flips; about 10 s each"),
        argument("--drift", metavar="RUN", help="instead: train against test, by the features of a finished run"),)),
    "tune": Verb("search", search.tune, "search the knobs of configs/tune/SPACE.yaml; typed again, or elsewhere too, it joins in", (
        EXPERIMENT, OVERRIDES, ON, *(argument(name, **options) for name, options in search.TUNE.items()))),
    "studies": Verb("search", search.studies, "the table of studies", tuple(
        argument(name, **options) for name, options in search.STUDIES.items()), locks=False),
    "runs": Verb("overview", runs, "the table of runs and ensembles", locks=False),
    "config": Verb("overview", config, "an experiment's resolved config, with where each value comes from", (
        EXPERIMENT, OVERRIDES, DEBUG, argument("--diff", metavar="OTHER", help="only what differs from another experiment")), locks=False),
    "clean": Verb("overview", clean, "what lies on the disk, and what can go", (
        flag("--trash", "delete replaced runs"), flag("--cache", "delete decoded images; they are made again when missing"),
        flag("--state", "delete optimizer states of finished folds"))),
    "submit": Verb("delivery", submit, "write and validate submissions/NAME.csv, and send it to Kaggle", (
        argument("name", help="a run, a member or an ensemble"),
        argument("-m", "--message", help="what is new in it; sends the file and waits for its score"),
        flag("--dry-run", "write and validate, send nothing"),
        flag("--force", "send bytes again that were sent before"),
        argument("--anyway", metavar="WHY", help="send it although its CV is worse than the best one sent"),
        flag("--no-wait", "do not wait for the score; comp ledger picks it up"))),
    "kernel": Verb("delivery", kernel, "a code competition: one folder that predicts without internet", (
        argument("name", help="a run, a member or an ensemble"),
        flag("--rehearse", "run it as Kaggle will: no network, read-only inputs, a hidden test set"),
        argument("--budget", metavar="9h", help="drop views or members by their gain per second until it fits"),
        flag("--push", "upload it, run it, submit that very version and wait for the score"),
        argument("-m", "--message", help="with --push: what is new in it"),
        argument("--anyway", metavar="WHY", help="submit it although its CV is worse than the best one sent"),
        flag("--no-wait", "do not wait for the score; comp ledger picks it up"))),
    "ledger": Verb("delivery", scores, "the book of submissions: CV against leaderboard, luck, and which two to keep", locks=False),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    with hardware.stoppable():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    try:
        status = answer((sys.argv[1:] if arguments is None else arguments) or ["--help"])
        sys.stdout.flush()
        return status
    except UserError as refused:
        print(*refused.lines, sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        number = hardware.received()
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        print(
            f"stopped{by}: {interrupt or 'nothing that was finished is lost'}; the same command goes on",
            file=sys.stderr,
        )
        return hardware.exit_code()
    except BrokenPipeError:  # comp runs | head: what is left in the buffer has nowhere to go either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"the disk is full{where}; make room, and the same command goes on: comp clean says what can go",
            file=sys.stderr,
        )
        return 2


def answer(arguments: list[str]) -> int:
    secrets.refuse(arguments)
    name, *rest = arguments
    if name in ("-h", "--help", "help"):
        print(command.overview(VERBS))
        return 0
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, 1, cutoff=0.0)[0]
        raise Refused(f"comp: there is no verb {name!r}; the nearest is {close}, and comp --help lists them")
    given = command.parsed(name, VERBS[name], rest)
    if getattr(given, "steal_lock", False):
        from comp.engine.store import locks

        with locks.steal():
            return _run(name, given)
    return _run(name, given)


def _run(name: str, given: Args) -> int:
    command.refuse_older(f"comp {name}", command.needs(name, VERBS[name]))
    if hardware.processes() > 1:  # torchrun -m comp train exp001
        from comp.engine.run import torchrun

        return torchrun.run_command(name, lambda: VERBS[name].run(given)) or 0
    return VERBS[name].run(given) or 0


if __name__ == "__main__":
    sys.exit(main())
