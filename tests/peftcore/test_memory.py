"""Memory that is not there before it is used, or after: in this process, by Linux's own count."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcore.memory import MappedFiles, lazy_zeros
from peftcore.ops.cpu import kernels

_STATM = Path("/proc/self/statm")
on_linux = pytest.mark.skipif(
    not _STATM.exists(), reason="resident pages are read from Linux's /proc"
)


def resident_mib() -> float:
    return int(_STATM.read_text().split()[1]) * 4096 / (1 << 20)


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


@on_linux
@pytest.mark.parametrize("huge_pages", [False, True])
def test_only_what_is_written_to_takes_up_ram(huge_pages: bool) -> None:
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


@on_linux
def test_released_pages_of_a_file_come_back_when_they_are_read(tmp_path: Path) -> None:
    kept, other = tmp_path / "kept", tmp_path / "other"
    for folder in (kept, other):
        folder.mkdir()
        save_file({"w": torch.arange(16 << 20, dtype=torch.float32)}, folder / "w.safetensors")
    gc.collect()
    tensors = [load_file(folder / "w.safetensors")["w"] for folder in (kept, other)]
    mapped = MappedFiles(other)
    sums = [float(w.sum()) for w in tensors]
    before = resident_mib()
    mapped.release()
    assert 60 < before - resident_mib() < 68  # of one file, and nothing of the other
    assert [float(w.sum()) for w in tensors] == sums
    assert resident_mib() > before - 4


def test_a_folder_that_is_not_mapped_has_nothing_to_release(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 8192)
    MappedFiles(tmp_path).release()


_THREADS = """
import ctypes, sys, threading
from peftcore.memory import bound_malloc
if sys.argv[1] == "bounded":
    bound_malloc()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def use(num_blocks, num_bytes):
    blocks = [libc.malloc(ctypes.c_size_t(num_bytes)) for _ in range(num_blocks)]
    for block in blocks:
        ctypes.memset(block, 1, num_bytes)
    for block in blocks:
        libc.free(ctypes.c_void_p(block))
use(1, 30 << 20)
done, turns = threading.Event(), [threading.Event() for _ in range(8)]
def work(turn):
    use(300, 100_000)
    turn.set()
    done.wait()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before = resident()
for turn in turns:
    threading.Thread(target=work, args=[turn]).start()
    turn.wait()
print(resident() - before)
done.set()
"""


@on_linux
def test_bounded_malloc_keeps_little_of_what_threads_freed() -> None:
    def kept_mib(how: str) -> float:
        command = [sys.executable, "-c", _THREADS, how]
        return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    assert kept_mib("bounded") < 40
    if "glibc" in platform.libc_ver()[0]:
        assert kept_mib("as it is") > 100  # else the test shows nothing


_HOLES = """
import ctypes
from peftcore.memory import bound_malloc, trim_malloc
bound_malloc()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [libc.malloc(ctypes.c_size_t(100_000)) for _ in range(2000)]
for block in blocks[::2]:  # the others stay, and what lies between them is no longer in use
    ctypes.memset(block, 1, 100_000)
    libc.free(ctypes.c_void_p(block))
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before = resident()
trim_malloc()
print(before - resident())
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver()[0], reason="another C library")
def test_trimmed_malloc_gives_back_what_lies_between_blocks() -> None:
    command = [sys.executable, "-c", _HOLES]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert float(done.stdout) > 60


_TENSORS = """
import sys
import torch
from peftcore.memory import align_by_malloc, bound_malloc
bound_malloc()
if sys.argv[1] == "by malloc":
    align_by_malloc()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
kept = []
before = resident()
for step in range(60):  # layer after layer, of ever other numbers of rows; a little stays of each
    rows = 16 + step * 37 % 600
    x = torch.ones(rows, 576)
    for layer in range(30):
        q, k, v = torch.ones(rows, 576), torch.ones(rows, 192), torch.ones(rows, 192)
        kept += [torch.ones(8) for _ in range(4)]
        gate, up = torch.ones(rows, 1536), torch.ones(rows, 1536)
        x = torch.ones(rows, 576) + q
print(resident() - before)
assert all(tensor.data_ptr() % 64 == 0 for tensor in [x, q, gate, *kept])
assert all(tensor.eq(1).all() for tensor in kept)
resized = torch.empty(0)
resized.resize_(1000).fill_(2)
assert resized.data_ptr() % 64 == 0 and resized.eq(2).all()
try:
    torch.empty(1 << 60, dtype=torch.uint8)
    raise AssertionError("it cannot have been there")
except torch.OutOfMemoryError as exc:
    assert str(1 << 60) in str(exc)
except RuntimeError:
    assert sys.argv[1] != "by malloc"
"""


@on_linux
def test_tensors_that_come_and_go_find_the_holes_they_left() -> None:
    def grown_mib(how: str) -> float:
        command = [sys.executable, "-c", _TENSORS, how]
        return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    assert kernels() is not None
    assert grown_mib("by malloc") < 80
    library, version = platform.libc_ver()
    if library == "glibc" and tuple(map(int, version.split("."))) < (2, 38):
        assert grown_mib("as it is") > 200  # else the test shows nothing
