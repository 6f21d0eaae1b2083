"""Segmented operations: each acts on the rows of a packed batch that belong to adapters.

    reference   row by row in float64: what the others are tested against
    grouped     torch, one operation a segment: all primitives, on any device
    cpu         C++: low-rank updates, scales and biases of a whole batch at a module, in one
                launch with the base's map
    triton      the same updates, scales and biases on a GPU, in two launches for all modules that
                share an input
    trained     updates and scales with gradients, by whichever of these there is
    bottleneck  bottlenecks by torch; where no gradient is wanted, by Triton on a GPU

`grouped` has the signatures of `reference`. `cpu` and `triton` share those of `Kernels`; `select`
is the one place that chooses between them, and what neither knows `grouped` computes after them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from peftcore.ops.segments import BlocksPart, LowRankPart, MapPart, RowsPart, VectorPart

#: Forces one implementation: "cpu", "triton" (on a CPU by TRITON_INTERPRET=1) or "torch".
VARIABLE = "POLYPEFT_OPS"
#: Of the GPUs that Triton compiles the kernels for.
_CAPABILITY = (8, 0)


class Kernels(Protocol):
    """What computes a batch's low-rank updates, scales and biases at linear modules.

    Attributes:
        Adapter: `Adapter()`, then for each module
            `set(id, in_, out, *, a, b, scale, in_scale, out_scale, bias)`: a `[rank, in]`, b in
            tiles `[tiles, rank, 16]`, vectors `[in]` or `[out]`, each or None. The CPU's also takes
            int8 factors and their `scales`, as `LowRankFactors` has them. Many at once:
            `set_low_rank(buffer, [(id, in_, out, rank, dtype, scale, a, b, scales)])`, the last
            three being where they begin in the buffer of bytes; −1 for none.
        Batch: `Batch([(start, end, adapter, weight)])`; `touches(id)`: does it act at a module?
    """

    Adapter: Any
    Batch: Any

    def linear(
        self, x: Tensor, weights: Sequence[Any], ids: Sequence[int], batch: Any
    ) -> list[Tensor]:
        """The bases' maps of x `[..., in]` with what the batch does at each; new tensors."""
        ...

    def scale_input(self, x: Tensor, id: int, batch: Any) -> Tensor:
        """x ⊙ the input scales in a copy; x itself where there are none."""
        ...

    def add_adapters_(self, y: Tensor, x: Tensor, id: int, batch: Any) -> None:
        """Updates, then output scales, then biases, on y `[..., out]`; x is scaled already."""
        ...

    def adapt_(
        self,
        y: Tensor,
        x: Tensor,
        width: int,
        spans: Sequence[tuple[int, int, float]],
        given: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """What `trained.TrainedPart`s do to y `[rows, out]` of x `[rows, width]`, in place.

        Args:
            spans: start, end and scale of each part; in order, without rows in common.
            given: a, b, v and own of each part; contiguous, x's dtype or float32.

        Returns: what `adapt_back_` needs; its own affair.
        """
        ...

    def adapt_back_(
        self,
        grad: Tensor,
        x: Tensor | None,
        width: int,
        spans: Sequence[tuple[int, int, float]],
        given: Sequence[Tensor | None],
        kept: Sequence[Tensor | None],
        wanted: Sequence[bool],
        grad_x: Tensor | None,
    ) -> list[Tensor | None]:
        """The gradients of `given` that are wanted; those of x are added to `grad_x`.

        Args:
            grad: y's, `[rows, out]`; multiplied with the parts' v in place.
            x: None where every update has inputs of its own.
            kept: what `adapt_` returned.
        """
        ...


def uses_triton(device: torch.device) -> bool:
    """Are Triton's kernels the ones for this device?

    Raises:
        ValueError: the environment forces what is not known.
        RuntimeError: it forces Triton, which cannot be.
    """
    forced = _forced()
    if forced != "triton":
        return forced is None and _compiles_for(device)
    if not _has_triton():
        raise RuntimeError(f"{VARIABLE}=triton: the package triton is not installed")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"{VARIABLE}=triton: on a CPU it needs TRITON_INTERPRET=1")
    return True


def select(device: torch.device) -> Kernels | None:
    """The kernels for what lies on `device`; None where torch alone computes.

    Raises as `uses_triton`.
    """
    if uses_triton(device):
        from peftcore.ops import triton

        return cast(Kernels, triton)
    if _forced() == "torch" or device.type != "cpu":
        return None
    from peftcore.ops.cpu import kernels

    return cast("Kernels | None", kernels())


def status(device: torch.device) -> str:
    """What `select` gives, in words: for the log and for /health."""
    from peftcore.ops.cpu import kernels_status

    if uses_triton(device):
        return "triton"
    return "torch" if _forced() == "torch" or device.type != "cpu" else kernels_status()


def _forced() -> str | None:
    forced = os.environ.get(VARIABLE)
    if forced not in (None, "cpu", "triton", "torch"):
        raise ValueError(f"{VARIABLE}={forced}: not cpu, triton or torch")
    return forced


@cache
def _compiles_for(device: torch.device) -> bool:
    if device.type != "cuda" or not _has_triton():
        return False
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


__all__ = [
    "VARIABLE",
    "BlocksPart",
    "Kernels",
    "LowRankPart",
    "MapPart",
    "RowsPart",
    "VectorPart",
    "select",
    "status",
    "uses_triton",
]
