"""The command line: one table of verbs, each with the function that it calls, imported when the verb runs."""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys

from comp.engine import command, hardware
from comp.engine.command import (
    DEBUG,
    EXPERIMENT,
    ON,
    OVERRIDES,
    TORCH,
    TRAINING,
    WITH_DEBUG,
    Verb,
    argument,
    flag,
)
from comp.engine.errors import UserError
from comp.engine.store import secrets

# chapter, "module:function" in comp.engine, help, arguments. The function gets the arguments by name
# (command.call); `instead` names another function for when an argument is given.
VERBS = {
    "download": Verb("data", "deliver.download:download", "download the competition's files from Kaggle into data/raw", (
        argument("--ceiling", type=int, metavar="GB", help="unpack at most this much without confirmation; default: 100"),)),
    "practice": Verb("data", "extras.practice:make", "fill data/raw with a small competition to practice on", (
        argument("--score", dest="name", metavar="NAME", help="score submissions/NAME.csv on the hidden labels"),),
        instead={"name": "extras.practice:score"}, locks=False),
    "inspect": Verb("data", "extras.inspect:inspect", "read data/raw and write a first configs/competition.yaml"),
    "prepare": Verb("data", "data.prepare:prepare", "read data/raw as competition.yaml declares it, and write data/samples.parquet"),
    "check": Verb("data", "extras.check:check", "check tables, images, competition.yaml and the submission format before training", (
        argument("experiment", nargs="?", help="decode the images as configs/EXPERIMENT.yaml says (size, resize, channels, depth), and run them "
                 "through its network; default: decode them small, as base.yaml says"),
        OVERRIDES)),
    "folds": Verb("data", "data.make_folds:make_for_table", "make data/folds.parquet and audit it", (
        flag("--remake", "replace existing folds: runs on the old folds cannot be combined with new ones"),
        flag("--duplicates", "only list duplicate images (same bytes, or nearly the same pixels), also between train and test")),
        instead={"duplicates": "data.duplicates:list_duplicates"}),
    "cache": Verb("data", "data.cache:fill", "decode and resize all images once, as an experiment needs them", (EXPERIMENT, OVERRIDES)),

    "train": Verb("training", "run.runner:train", "train every fold of an experiment, and predict out-of-fold and test rows", (
        EXPERIMENT, OVERRIDES,
        argument("--fold", help="train only this fold; full: train on all rows, which makes the member NAME:full (it can be submitted alone)"),
        argument("--seed", type=int, help="train only this seed; default: all of train.seeds"),
        argument("--as", dest="name", metavar="NAME", help="name of the run; needed when key=value changes its results"),
        flag("--fresh", "move an existing run to runs/.trash and start again"), DEBUG, ON,
        argument("--time-limit", metavar="8h30m", help="save everything and stop before this time is over; the same command continues"),
        flag("--profile", "print at the end how the time was spent")),
        needs=TRAINING),
    "schedule": Verb("training", "run.previews:schedule", "plot an experiment's learning rate schedule, without training", (
        EXPERIMENT, OVERRIDES, WITH_DEBUG), needs=TRAINING, locks=False),
    "lr-range": Verb("training", "run.previews:lr_range", "learning rate range test: train while the learning rate rises; plot, table and a suggestion", (
        EXPERIMENT, OVERRIDES,
        argument("--low", type=float, default=1e-6, help="first learning rate; default: 1e-6"),
        argument("--high", type=float, default=10.0, help="last learning rate, unless the loss diverges before; default: 10"),
        argument("--steps", type=int, default=200, help="training steps; default: 200"),
        flag("--linear", "raise the learning rate linearly; default: exponentially")),
        needs=TRAINING),
    "augment": Verb("training", "run.previews:augment", "draw a grid of augmented images of an experiment", (EXPERIMENT, OVERRIDES), needs=TRAINING),
    "pseudo": Verb("training", "extras.pseudo_labels:label", "write confident test predictions as pseudo-labels, for each fold from its own models only", (
        argument("source", metavar="name", help="a run, a member, or an ensemble that is a plain average"),
        argument("--confidence", type=float, help="lowest confidence of a pseudo-label; default: 0.9, or none with --share"),
        argument("--share", type=float, help="per class, at most this share of the rows predicted as it, the most confident first"),
        flag("--soft", "write class probabilities; default: the predicted class"),
        argument("--weight", type=float, default=1.0, help="sample weight of a pseudo-labeled row; default: 1, like a labeled one"),
        argument("--as", dest="table", help="name of the table; default: the name of the run")),
        needs=TRAINING),
    "seed-noise": Verb("training", "extras.seed_noise:seed_noise", "how much the seed alone changes the score; comp runs uses it as the yardstick", (
        EXPERIMENT, argument("--seeds", type=int, default=5, help="number of seeds, each trained on all folds; default: 5")),
        needs=TRAINING),
    "compare": Verb("training", "extras.compare:compare", "train experiments on the same seeds and folds (experiments x seeds x folds trainings), and compare them in pairs", (
        argument("names", metavar="experiments", nargs="+", help="two or more, like exp001 exp002"),
        argument("--seeds", type=int, default=3, help="number of seeds of each experiment; default: 3")),
        needs=TRAINING),
    "model": Verb("training", "extras.measure:measure", "parameters, multiply-adds, and measured time and memory of an experiment's network", (
        EXPERIMENT, OVERRIDES), needs=TRAINING),
    "features": Verb("training", "extras.features:features", "train heads on features of the frozen backbone, computed once: members of the run", (
        argument("run", metavar="experiment", help=EXPERIMENT.options["help"]), OVERRIDES,
        argument("--heads", default="linear,logistic,mlp,knn", metavar="LIST", help="which heads, separated by commas; default: linear,logistic,mlp,knn"),
        flag("--fresh", "compute the features again")),
        needs=TRAINING),
    "explain": Verb("training", "extras.explain:explain", "Grad-CAM and SmoothGrad of the worst predictions, or of chosen rows", (
        argument("run", help="name of a run"),
        argument("--ids", nargs="+", default=[], metavar="ID", help="these rows; default: the worst predictions"),
        argument("--count", type=int, default=8, help="how many of the worst predictions; default: 8")),
        needs=TRAINING),

    "predict": Verb("predictions", "run.predict_run:predict", "merge the predictions of a run's folds and seeds; with --tta, predict again with other views", (
        argument("experiment", nargs="?", help="name of a run"),
        argument("--tta", help="views, separated by commas: makes the member <run>:tta-<views>"),
        argument("--space", choices=("probability", "logit", "geometric"), help="where the views are averaged; default: predict.averaging_space"),
        flag("--last-look", "score the rows held out by folds.holdout; how often that was done is recorded"),
        flag("--kernel", "in a Kaggle notebook: predict its test set with the bundle of comp kernel")),
        instead={"kernel": "deliver.kernel_predict:predict"}, needs=TORCH),
    "tta": Verb("predictions", "extras.tta_search:tta", "search the test-time views with the best gain for their time; each fold is scored by a search without it", (
        argument("run", metavar="experiment", help="name of a finished run"),
        argument("--views", dest="names", metavar="LIST", help="search only these, separated by commas; default: flips, zooms, crops and three draws of "
                 "the run's recipe, each a pass over all out-of-fold rows"),
        argument("--max-ms", type=float, help="most milliseconds per image and checkpoint, all views together")),
        needs=TRAINING),
    "bank": Verb("predictions", "extras.list_bank:bank", "list all predictions with their scores", (
        argument("filters", metavar="filter", nargs="*", help="like score>0.9 model~convnext task=binary name~exp0; quote it for the shell"),
        argument("--csv", metavar="NAME", help="print one, like exp001 or exp001:seed1, as csv")), locks=False),
    "ensemble": Verb("predictions", "ensemble.blend:blend", "make the ensemble that configs/ensembles/NAME.yaml describes", (
        argument("name", help="name of a file in configs/ensembles/"),
        flag("--plots", "also plot correlation, waterfall, weights, and nested and in-sample scores; refits the ensemble some times")),
        instead={"plots": "ensemble.plots:blend_and_draw"}),
    "slices": Verb("predictions", "extras.slices:slices", "scores by class, group and metadata, each with n and a confidence interval", (
        argument("name", help="a run, a member or an ensemble"),), locks=False),
    "label-errors": Verb("predictions", "extras.label_errors:label_errors", "list likely label errors: rows where all models agree against the label", (
        argument("names", nargs="*", help="runs, members or ensembles; default: all runs"),)),
    "audit": Verb("predictions", "extras.audit:audit", "search for leaks in files, folds, runs and ensembles", (
        argument("--drift", dest="run", metavar="RUN", help="instead: adversarial validation, train against test, on the features of a finished run"),),
        instead={"run": "extras.adversarial_validation:adversarial_validation"}),

    "tune": Verb("search", "tune.tune:tune", "search the knobs of configs/tune/SPACE.yaml; typed again, here or on another machine, it joins the study", (
        EXPERIMENT, OVERRIDES, ON,
        argument("--space", default="quick", help="name of a file in configs/tune/; default: quick"),
        argument("--trials", type=int, help="trials of the whole study, over all processes; default: what the space says"),
        argument("--hours", type=float, help="stop after so many hours"),
        argument("--until", metavar="HH:MM", help="stop at this time of day"),
        argument("--storage", metavar="URL", help="postgresql://user@host/database, for several machines; default: SQLite in studies/"),
        argument("--confirm", type=int, metavar="N", help="train the best N trials and the experiment itself on three new seeds"),
        argument("--export", metavar="NAME", help="write the best trial as configs/NAME.yaml and runs/NAME"),
        argument("--trial", type=int, help="with --export: this trial instead of the best")),
        needs=(*TRAINING, "optuna>=5")),
    "studies": Verb("search", "tune.report:print_studies", "list the studies", (
        argument("--storage", metavar="URL", help="also list those of this PostgreSQL database"),), needs=("optuna>=5",), locks=False),

    "runs": Verb("overview", "extras.list_runs:runs", "list runs and ensembles", locks=False),
    "config": Verb("overview", "extras.show_config:config", "print an experiment's resolved config, with the origin of each value", (
        EXPERIMENT, OVERRIDES, WITH_DEBUG,
        argument("--diff", dest="against", metavar="OTHER", help="only what differs from another experiment")), locks=False),
    "clean": Verb("overview", "extras.clean:clean", "list what uses disk space, and delete it", (
        flag("--trash", "delete replaced runs"), flag("--cache", "delete decoded images; they are made again when needed"),
        flag("--state", "delete optimizer states of finished folds"))),

    "submit": Verb("delivery", "deliver.submit:submit", "write and validate submissions/NAME.csv, and submit it to Kaggle", (
        argument("name", help="a run, a member or an ensemble"),
        argument("-m", "--message", help="message of the submission, required to submit; waits for the score"),
        flag("--dry-run", "write and validate, submit nothing"),
        flag("--force", "submit even if the same bytes were submitted before"),
        argument("--anyway", metavar="WHY", help="submit although its CV is worse than the best one submitted"),
        argument("--no-wait", dest="wait", action="store_false", help="do not wait for the score; comp ledger fetches it later")),
        instead={"dry_run": "deliver.dry_run:dry_run"}),
    "kernel": Verb("delivery", "deliver.code_competition:kernel", "for code competitions: build one folder that predicts without internet; without --rehearse or --push only build it", (
        argument("name", help="a run, a member or an ensemble"),
        flag("--rehearse", "run it as Kaggle will: no network, read-only inputs, a hidden test set"),
        argument("--budget", metavar="9h", help="drop views or members, those with the least gain per second first, until it fits this time"),
        flag("--push", "upload it, run it there, submit exactly that version and wait for the score"),
        argument("-m", "--message", help="with --push: message of the submission"),
        argument("--anyway", metavar="WHY", help="submit although its CV is worse than the best one submitted"),
        argument("--no-wait", dest="wait", action="store_false", help="do not wait for the score; comp ledger fetches it later"))),
    "export": Verb("delivery", "extras.export:export", "export a trained fold (torch.export, ONNX, int8, pruned), and measure speed and score of each", (
        argument("run", help="name of a run"),
        argument("--fold", type=int, default=0, help="whose weights are exported and whose rows are scored; default: 0"),
        argument("--rows", type=int, default=1000, help="number of rows to score, predicted by every variant; default: 1000"),
        argument("--prune", default="0.3,0.5,0.7", metavar="SHARES", help="shares of the weights to prune, separated by commas, or none; default: 0.3,0.5,0.7"))),
    "ledger": Verb("delivery", "deliver.leaderboard:leaderboard", "list submissions: CV against leaderboard, expected shake-up, and which two to select", locks=False),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb; every way in which it may end becomes an exit code and at most a line on stderr."""
    with hardware.stop_on_signals():
        try:
            status = run((sys.argv[1:] if arguments is None else arguments) or ["--help"])
            sys.stdout.flush()
            return status
        except UserError as error:
            print(*error.lines, sep="\n", file=sys.stderr)
            return 2
        except KeyboardInterrupt as interrupt:
            return _interrupted(interrupt)
        except BrokenPipeError:  # comp runs | head: the rest of the buffer cannot be written either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f" ({error.filename})" if error.filename else ""
            remedy = "free some space (comp clean lists what can be deleted); the same command continues"
            print(f"the disk is full{where}; {remedy}", file=sys.stderr)
            return 2


def _interrupted(interrupt: KeyboardInterrupt) -> int:
    number = hardware.received_signal()
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    saved = interrupt or "finished work is saved"
    print(f"stopped{by}: {saved}; the same command continues", file=sys.stderr)
    return hardware.exit_code()


def run(arguments: list[str]) -> int:
    secrets.validate_arguments(arguments)
    name, *rest = arguments
    if name == "help" and rest:  # comp help train
        name, rest = rest[0], ["--help"]
    if name in ("-h", "--help", "help"):
        print(command.overview(VERBS))
        return 0
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, 1, cutoff=command.SIMILAR)
        remedy = f"did you mean {close[0]}?" if close else "comp --help lists all"
        raise UserError("verb-unknown", where=f"comp {name}", what="no such verb", remedy=remedy)
    verb = VERBS[name]
    args = vars(command.parse(name, verb, rest))
    command.check_versions(f"comp {name}", verb.needs)
    with command.lock_takeover(bool(args.get("steal_lock"))):
        if hardware.world_size() > 1:  # torchrun -m comp train exp001
            from comp.engine.run import torchrun

            return torchrun.run_command(name, lambda: command.call(verb, args)) or 0
        return command.call(verb, args)


if __name__ == "__main__":
    sys.exit(main())
