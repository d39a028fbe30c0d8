"""Copying to the device and the dtypes of mixed precision."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

# train.amp -> dtype of torch.autocast; None: no autocast
AMP_DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def to_device(values: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that does not block: a plain `.to(device)` waits until the GPU has finished everything queued
    before it."""
    return torch.from_numpy(values).to(device, dtype, non_blocking=True)
