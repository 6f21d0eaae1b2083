"""What the kernels of training read of the parts at a module: tables of int64 on the device.

Parameters are ordinary tensors, wherever they lie: a launch reads their addresses from a small
table, one row a part. The lists of work depend on the parts' numbers of rows and on their ranks
alone, and are kept for the modules and steps that have the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from peftcore.ops.triton import trained_kernels as k
from peftcore.ops.triton.tables import RANKS, counted, cut, starts_of, to_device

Spans = Sequence[tuple[int, int, float]]
Given = Sequence[Tensor | None]


class Work(NamedTuple):
    """What the programs of launches compute, int64 on the device.

    What is summed over a part's rows is summed by chunks of `CHUNK`. A part of one chunk has no
    slot, -1; the sums of another's chunks lie in slots one after another, and are added.

    blocks, items: as `cut` gives them. groups: part, first of up to `RANKS` ranks, first row, slot;
    group_sums: part, first rank, first slot, number of slots. scaled: part, 0, first row, slot, of
    the parts with a v; scaled_sums: part, 0, first slot, number of slots.
    """

    blocks: Tensor
    items: Tensor
    groups: Tensor
    group_sums: Tensor
    scaled: Tensor
    scaled_sums: Tensor


@lru_cache(maxsize=64)
def _work(
    num_rows: tuple[int, ...],
    ranks: tuple[int, ...],
    scaled: tuple[bool, ...],
    device: torch.device,
) -> Work:
    rows, each = np.array(num_rows, np.int64), np.array(ranks, np.int64)
    acting = (each > 0) | np.array(scaled, bool)
    blocks, items = cut(rows * acting, each, k.ROWS.value)
    lists = [blocks, items]
    for num_groups in (-(-each // RANKS), np.array(scaled, np.int64)):
        part = np.repeat(np.arange(len(rows)), num_groups)
        lists += _chunks(part, RANKS * counted(num_groups), rows[part])
    return Work(*(to_device(list_, device) for list_ in lists))


def _chunks(part: np.ndarray, rank: np.ndarray, num_rows: np.ndarray) -> list[np.ndarray]:
    """Groups, each of a part's rows and the ranks from one on, cut along the rows; and the sums of
    those that are cut. At least one chunk each: what has no rows has zeros for its gradient."""
    num_chunks = np.maximum(1, -(-num_rows // k.CHUNK.value))
    is_cut = num_chunks > 1
    first_slot = starts_of(num_chunks * is_cut)
    group, chunk = np.repeat(np.arange(len(part)), num_chunks), counted(num_chunks)
    slot = np.where(is_cut[group], first_slot[group] + chunk, -1)
    chunks = np.column_stack((part[group], rank[group], k.CHUNK.value * chunk, slot))
    return [chunks, np.column_stack((part, rank, first_slot, num_chunks))[is_cut]]


class Parts:
    """The parts at a module.

    Attributes:
        width, out: features of x and of y.
        rows: `[parts, FIELDS]` int64 on the host.
        work: as `Work`.
        num_low: values of `low`: each part's rows times its rank.
        num_before: rows of `before`: of the parts with a v.
    """

    def __init__(self, y: Tensor, x: Tensor | None, width: int, spans: Spans, given: Given) -> None:
        """y: the result or its gradient, `[rows, out]`; the others as for `peftcore.ops.Kernels`.

        Raises:
            ValueError: for what the kernels would misread.
        """
        self.width, self.out = width, y.shape[1]
        self._like = y
        self._own = [own is not None for own in given[3::4]]
        self._starts = np.array([start for start, _, _ in spans], np.int64)
        self._check("y", y, (len(y), self.out), y.dtype)
        self._check("x", x, (len(y), width), y.dtype)
        rows = self.rows = np.zeros((len(spans), k.FIELDS), np.int64)
        rows[:, k.X], rows[:, k.Y] = self._addresses_in(x), self._addresses_in(y)
        done = 0
        for i, (row, (start, end, _)) in enumerate(zip(rows, spans, strict=True)):
            if not done <= start <= end <= len(y):
                raise ValueError(f"part [{start}, {end}) of {len(y)} rows")
            done = end
            a, b, v, own = given[4 * i : 4 * i + 4]
            rank = 0 if a is None else len(a)
            self._check("a", a, (rank, width), torch.float32)
            self._check("b", b, (self.out, rank), torch.float32)
            self._check("v", v, (self.out,), torch.float32)
            self._check("own", own, (end - start, width), y.dtype)
            if (a is None) != (b is None) or (a is not None and own is None and x is None):
                raise ValueError("a, b and x come together")
            row[k.NUM_ROWS], row[k.RANK] = end - start, rank
            row[k.A], row[k.B], row[k.V] = map(_address, (a, b, v))
            if own is not None:
                row[k.X] = _address(own)
        rows[:, k.SCALE] = np.array([scale for _, _, scale in spans], np.float32).view(np.int32)
        scaled = rows[:, k.V] != 0
        num_low, num_before = rows[:, k.NUM_ROWS] * rows[:, k.RANK], rows[:, k.NUM_ROWS] * scaled
        self.num_low, self.num_before = int(num_low.sum()), int(num_before.sum())
        rows[:, k.LOW], rows[:, k.BEFORE] = starts_of(num_low), starts_of(num_before) * self.out
        sizes = (tuple(rows[:, i].tolist()) for i in (k.NUM_ROWS, k.RANK))
        self.work = _work(*sizes, tuple(scaled.tolist()), y.device)

    def want(self, grads: Given, grad_x: Tensor | None) -> None:
        """Have gradients written to `grads`, in the order of `given`, and added to `grad_x`."""
        self._check("grad_x", grad_x, (len(self._like), self.width), self._like.dtype)
        for i, field in enumerate((k.GRAD_A, k.GRAD_B, k.GRAD_V, k.GRAD_X)):
            self.rows[:, field] = [_address(grad) for grad in grads[i::4]]
        self.rows[:, k.GRAD_X] = np.where(
            self._own, self.rows[:, k.GRAD_X], self._addresses_in(grad_x)
        ) * (self.rows[:, k.RANK] > 0)

    @property
    def reaches_x(self) -> bool:
        """Is a gradient of inputs wanted?"""
        return bool(self.rows[:, k.GRAD_X].any())

    @property
    def aligned(self) -> bool:
        """Do all rows of x and y, and all tensors, begin at multiples of 16 bytes?

        All rows, and not the parts' first ones alone: a batch does not decide how it is computed.
        """
        widths = self.width * self._like.itemsize, self.out * self._like.itemsize
        addresses = self.rows[:, k.A : k.GRAD_X + 1]
        return not any(width % 16 for width in widths) and not (addresses % 16).any()

    def on_device(self) -> Tensor:
        return to_device(self.rows, self._like.device)

    def _addresses_in(self, tensor: Tensor | None) -> np.ndarray:
        """Of each part's first row, or 0."""
        if tensor is None:
            return np.zeros_like(self._starts)
        return tensor.data_ptr() + self._starts * (tensor.shape[1] * tensor.itemsize)

    def _check(
        self, name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        if tensor is None:
            return
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name}: {tuple(tensor.shape)} is not contiguous {shape}")
        if tensor.dtype != dtype or tensor.device != self._like.device:
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, not {dtype}")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
