"""Lazy zeros against torch's: the same values, in memory that is not there before it is used."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from peftcore.memory import lazy_zeros

_STATM = Path("/proc/self/statm")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5, 2), (1 << 20, 3)])
@pytest.mark.parametrize("huge_pages", [False, True])
def test_they_are_zeros(shape: tuple[int, ...], dtype: torch.dtype, huge_pages: bool) -> None:
    made = lazy_zeros(shape, dtype, huge_pages=huge_pages)
    assert made.is_contiguous()
    assert made.device.type == "cpu"
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
    assert made.dtype == dtype
    made += 1
    assert torch.equal(made, torch.ones(shape, dtype=dtype))


def test_another_device_has_torch_s_own() -> None:
    made = lazy_zeros((2, 3), torch.float16, torch.device("meta"))
    assert (made.shape, made.dtype, made.device.type) == ((2, 3), torch.float16, "meta")


@pytest.mark.skipif(not _STATM.exists(), reason="resident pages are read from Linux's /proc")
@pytest.mark.parametrize("huge_pages", [False, True])
def test_only_what_is_written_to_takes_up_ram(huge_pages: bool) -> None:
    def resident_mib() -> float:
        return int(_STATM.read_text().split()[1]) * 4096 / (1 << 20)

    gc.collect()
    before = resident_mib()
    made = lazy_zeros([256 << 20], torch.uint8, huge_pages=huge_pages)
    assert not made.any()  # reading is not writing
    assert resident_mib() - before < 32
    made[: 64 << 20] = 1
    assert 60 < resident_mib() - before < 96
    view = made[100:]
    del made
    assert int(view[:100].sum()) == 100  # a view keeps the pages
    del view
    assert resident_mib() - before < 32
