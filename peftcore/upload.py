"""Small host data onto a device: a GPU takes it in the order of its stream, and the host goes on.

`torch.tensor(..., device=gpu)` waits until all that is queued before it is done; a step that made
many tensors so would run in as many pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def staging(num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory `[num_elements]` to write into and give to `to_device`; not initialized.

    For a GPU it is pinned. Drop it after the copy: torch's allocator gives it out again when the
    copy is through. For a CPU it is what is computed with.
    """
    return torch.empty(num_elements, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, not waited for; `host` itself where that is where it lies."""
    if device.type == "cuda":  # a copy of other memory would wait
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def upload(values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.tensor(values, dtype=dtype, device=device)` without its waiting."""
    return to_device(torch.tensor(values, dtype=dtype), device)


__all__ = ["staging", "to_device", "upload"]
