"""Everything that can be refused before images are decoded, by checks that need torch: the network, its
weights, the optimizer, views, distillation, consistency loss, mixup and pooling. See validate.py."""

from __future__ import annotations

from functools import partial

import torch

from comp import models, optim
from comp.engine.config.schema import Config
from comp.engine.data.samples import Samples
from comp.engine.run import consistency, distillation, mixup, pretrained, validate, views


def network(cfg: Config, samples: Samples) -> None:
    heads = samples.heads
    multi_image = samples.multi_image and cfg.data.max_images > 1
    validate.run_all(
        partial(views.views, cfg.predict.tta),
        partial(models.output_sizes, cfg, heads),
        partial(models.validate, cfg),
        partial(models.validate_pool, cfg, multi_image),
        partial(optim.validate, cfg),
        partial(distillation.validate, cfg, heads),
        partial(consistency.validate, cfg, heads),
        partial(mixup.validate, cfg, heads, multi_image),
    )
    with torch.device("meta"):  # costs no memory
        module = models.build(cfg, heads, pretrained=False)
    if file := pretrained.weights_file(cfg):
        pretrained.matching_weights(module, cfg, file)
