"""The verbs of training, as cli.py shows them."""

from __future__ import annotations

from comp.engine import hardware
from comp.engine.command import DEBUG, EXPERIMENT, ON, OVERRIDES, Args, Verb, argument, flag


def train(args: Args) -> None:
    from comp.engine.run import runner

    runner.train(
        args.experiment,
        args.overrides,
        fold=args.fold,
        seed=args.seed,
        name=args.name,
        fresh=args.fresh,
        debug=args.debug,
        profile=args.profile,
        on=args.on,
        stop=hardware.Stop(hardware.seconds("--time-limit", args.time_limit)) if args.time_limit else None,
    )


def augment(args: Args) -> None:
    from comp.engine.run import runner

    runner.augmentation_sheet(args.experiment, args.overrides)


def schedule(args: Args) -> None:
    from comp.engine.run import runner

    runner.draw_schedule(args.experiment, args.overrides, debug=args.debug)


def lr_range(args: Args) -> None:
    from comp.engine.run import runner

    runner.lr_range(
        args.experiment, args.overrides, low=args.low, high=args.high, steps=args.steps, linear=args.linear
    )


def pseudo(args: Args) -> None:
    from comp.engine.extras import pseudo_labels

    wish = pseudo_labels.Wish(args.confidence, args.share, args.soft, args.weight)
    pseudo_labels.write(args.name, args.table or args.name, wish)


def noise(args: Args) -> None:
    from comp.engine.extras import compare

    compare.noise(args.experiment, args.seeds)


def compare(args: Args) -> None:
    from comp.engine.extras import compare

    compare.compare(args.experiments, args.seeds)


VERBS = {
    "train": Verb("training", train, "train every fold of an experiment, and predict OOF and test rows", (
        EXPERIMENT, OVERRIDES,
        argument("--fold", help="only this fold; full trains on all rows, and makes the member NAME:full, which can be submitted alone"),
        argument("--seed", type=int, help="only this seed, instead of train.seeds"),
        argument("--as", dest="name", help="name of the run, when key=value makes it another one"),
        flag("--fresh", "move the old run to runs/.trash and start again"), DEBUG,
        ON,
        argument("--time-limit", metavar="8h30m", help="end in time, with everything saved; the same command goes on"),
        flag("--profile", "say at the end where the time went"))),
    "schedule": Verb("training", schedule, "the curve of an experiment's learning rate, before anything runs", (EXPERIMENT, OVERRIDES, DEBUG), locks=False),
    "lr-range": Verb("training", lr_range, "which learning rate? The loss while the rate climbs, as picture, table and suggestion", (
        EXPERIMENT, OVERRIDES,
        argument("--low", type=float, default=1e-6, help="first rate; 1e-6 unless told"),
        argument("--high", type=float, default=10.0, help="last rate; 10 unless told, and it stops when the loss flies away"),
        argument("--steps", type=int, default=200, help="200 unless told"),
        flag("--linear", "equal steps instead of equal ratios"))),
    "augment": Verb("training", augment, "a contact sheet of what an experiment's recipe does to its images", (EXPERIMENT, OVERRIDES)),
    "pseudo": Verb("training", pseudo, "test rows that a run is sure of, as labels that teach others: each fold by its own models", (
        argument("name", help="a run, a member, or an ensemble that is a plain average"),
        argument("--confidence", type=float, help="how sure it must be; 0.9 unless told, or unless --share is"),
        argument("--share", type=float, help="of the rows that get a class at most this share, the surest"),
        flag("--soft", "what it says of each class, instead of the class alone"),
        argument("--weight", type=float, default=1.0, help="how much such a row teaches; 1, as much as a true one, unless told"),
        argument("--as", dest="table", help="name of the table; that of the run unless told"))),
    "seed-noise": Verb("training", noise, "what the seed alone does to a score: the yardstick of comp runs", (
        EXPERIMENT, argument("--seeds", type=int, default=5, help="trainings of all folds; 5 unless told"))),
    "compare": Verb("training", compare, "recipes side by side, paired by seed and fold", (
        argument("experiments", nargs="+", help="two or more, like exp001 exp002"),
        argument("--seeds", type=int, default=3, help="trainings of each; 3 unless told"))),
}  # fmt: skip
