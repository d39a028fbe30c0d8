"""What can be done with a network besides training it, as the command line sees it; nothing heavy is imported before it is
asked for."""

from __future__ import annotations

from comp.engine.command import EXPERIMENT, OVERRIDES, Args, Verb, argument, flag


def model(args: Args) -> None:
    from comp.engine.extras import measure

    measure.measure(args.experiment, args.overrides)


def export(args: Args) -> None:
    from comp.engine.extras import export

    export.export(args.experiment, args.fold, args.rows, args.prune)


def explain(args: Args) -> None:
    from comp.engine.extras import explain

    explain.explain(args.experiment, args.ids, args.count)


def features(args: Args) -> None:
    from comp.engine.extras import features

    features.features(args.experiment, args.overrides, args.heads, fresh=args.fresh)


RUN = argument("experiment", help="name of a run")
VERBS = {
    "model": Verb("training", model, "parameters, multiply-adds, and measured time and memory of an experiment's network",
        (EXPERIMENT, OVERRIDES)),
    "features": Verb("training", features, "a frozen backbone looks once, heads are trained in seconds: members of the run", (
        EXPERIMENT, OVERRIDES,
        argument("--heads", default="linear,logistic,mlp,knn", metavar="LIST", help="which, by commas; all four unless told"),
        flag("--fresh", "compute the features again"))),
    "explain": Verb("training", explain, "what made the network say it: Grad-CAM and SmoothGrad of the worst or of chosen rows", (
        RUN, argument("--ids", nargs="+", default=[], metavar="ID", help="these rows; the worst ones unless told"),
        argument("--count", type=int, default=8, help="how many of the worst; 8 unless told"))),
    "export": Verb("delivery", export, "a trained fold as torch.export, ONNX, int8 and pruned: what each costs and saves", (
        RUN, argument("--fold", type=int, default=0, help="whose weights, and whose rows are scored; 0 unless told"),
        argument("--rows", type=int, default=1000, help="score on so many; every variant predicts them all"),
        argument("--prune", default="0.3,0.5,0.7", metavar="SHARES", help="shares of the weights to cut, by commas; or none"))),
}  # fmt: skip
