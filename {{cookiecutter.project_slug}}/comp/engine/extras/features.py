"""comp features: features of a frozen backbone for every image, computed once, and heads fitted on them in
seconds.

    runs/<run>/features.npy         (samples, features) float32, with hashes of what they were made of;
                                    an error if weights, images, sizes or samples changed
    runs/<run>/frozen/              the backbone's weights
    runs/<run>/seed0/fold3/<head>/  those of a head (comp/engine/run/frozen_heads.py)
    runs/<run>/members/<head>/      each head as a member with OOF and test predictions, like exp001:logistic

Each head is fitted on the training part of a fold and predicts its validation rows, so its score is a CV like
any other.
"""

from __future__ import annotations

from comp.engine import hardware, pages
from comp.engine.config import experiments, resolve
from comp.engine.config.schema import Config
from comp.engine.errors import UserError
from comp.engine.extras import extract_features, fit_heads
from comp.engine.run import fingerprint, loading
from comp.engine.store import locks, paths


def features(run: str, overrides: list[str], heads: str, fresh: bool = False) -> None:
    names = [name.strip() for name in heads.split(",")]
    for name in names:
        if name not in fit_heads.HEADS:
            nearest = resolve.nearest(name, fit_heads.HEADS)[0]
            raise UserError(
                "head-unknown",
                where="--heads",
                what=f"no head {name!r}; there are {', '.join(fit_heads.HEADS)}",
                remedy=f"did you mean {nearest}?",
            )
    if changed := resolve.changes_results(overrides):
        raise UserError(
            "override-changes-results",
            where=" ".join(changed),
            what="changes results, and features are stored by the name of the experiment",
            remedy="write it into an experiment of its own",
        )
    loaded = experiments.load(run, overrides, claimed=run)
    cfg = loaded.config
    _validate(cfg)
    hardware.set_threads(cfg.train.threads)
    # With --fresh, heads on the old features are removed too.
    old = [paths.member_folder(run, name) for name in fit_heads.HEADS] if fresh else []
    fingerprint.validate_images(run, cfg, old)
    context = loading.load_context(cfg, loaded=loaded)
    fingerprint.claim(run, cfg, context.folds, fingerprint.resume_command(run), old)
    with locks.lock(paths.run_folder(run), "features"):
        extracted = extract_features.of_backbone(context, run, fresh)
    for name in names:
        fit_heads.fit_member(context, run, name, extracted)
    print(f"written: {paths.relative(paths.run_folder(run))}/members/{{{','.join(names)}}}")
    print(f"next: comp bank, or blend them: {', '.join(f'{run}:{name}' for name in names)}")


def _validate(cfg: Config) -> None:
    """Features are of images alone and the same for all folds, so nothing may be fitted on the training rows
    of a fold."""
    if pages.get("model") is not None:
        raise UserError(
            "features-unavailable",
            where="comp features",
            what="a model of your own (comp/competition.py) has no known features",
            remedy="choose a timm model",
        )
    for key, unsuitable, value in (
        ("data.normalize", cfg.data.normalize == "data", "model"),
        ("data.pseudo_labels", cfg.data.pseudo_labels is not None, "null"),
        ("distill.teacher", cfg.distill.teacher is not None, "null"),
        ("data.whiten", cfg.data.whiten != "none", "none"),
        ("model.pretrained", str(cfg.model.pretrained).startswith("run:"), "true, false or a file"),
        ("model.metadata", cfg.model.metadata, "false"),
        ("model.image_pool", cfg.model.image_pool == "attention", "mean"),
        ("model.global_pool", cfg.model.global_pool == "gem", "default"),
    ):
        if unsuitable:
            raise UserError(
                "features-unavailable",
                where="comp features",
                key=key,
                what="features of a frozen backbone are of images alone and the same for all folds",
                remedy=f"set it to {value}",
            )
