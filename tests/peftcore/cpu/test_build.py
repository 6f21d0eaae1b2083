"""Other instruction sets compute the same; without a compiler torch computes in their place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths

from peftcore.ops.cpu import build
from peftcore.ops.cpu.build import CAPABILITY_VARIABLE, KernelsUnavailable, capability, load

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]

#: Without kernels: why, and a quantized layer's result next to its own dequantized weight's.
ASK = """
import torch
from peftcore.ops.cpu import kernels, kernels_status
from peftcore.quant import QuantLinear
assert kernels() is None
assert kernels() is None
for quantization in ("nf4", "int8"):
    layer = QuantLinear(torch.randn(40, 64), torch.randn(40), quantization)
    assert not layer.packed
    x = torch.randn(3, 64)
    expected = x @ layer.dequantize().T + layer.bias
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
print(kernels_status())
"""


def python(*arguments: str, seconds: float, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, timeout=seconds,
        capture_output=True, text=True,
    )  # fmt: skip


def test_an_unknown_capability() -> None:
    done = python("-c", ASK, seconds=100, **{CAPABILITY_VARIABLE: "MMX"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        f"torch: {CAPABILITY_VARIABLE}=MMX: expected one of "
        "AVX512_AMX, AVX512_VNNI, AVX512, AVX2_VNNI, AVX2, PORTABLE"
    )
    assert "torch computes in the kernels' place" in done.stderr


def test_no_cpu_gets_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    avx2 = {"avx2": True, "fma3": True, "f16c": True}
    avx512 = avx2 | {f"avx512_{part}": True for part in ("f", "bw", "dq", "vl")}
    vnni = avx512 | {"avx512_vnni": True}
    for level, has, best in (
        ("AVX512", vnni | {"amx_tile": True, "amx_int8": True}, "AVX512_AMX"),
        ("AVX512", vnni | {"amx_tile": True}, "AVX512_VNNI"),
        ("AVX512", vnni, "AVX512_VNNI"),
        ("AVX512", avx512, "AVX512"),
        ("AVX2", avx2 | {"avx_vnni": True}, "AVX2_VNNI"),
        ("AVX2", avx2, "AVX2"),
        ("AVX2", {"avx2": True, "fma3": True}, "PORTABLE"),
        ("DEFAULT", {}, "PORTABLE"),
    ):
        monkeypatch.delenv(CAPABILITY_VARIABLE, raising=False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda level=level: level)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert capability() == best
        if "avx512_f" not in has:
            monkeypatch.setenv(CAPABILITY_VARIABLE, "AVX512")
            with pytest.raises(KernelsUnavailable, match=r"this CPU has no .*avx512_f"):
                capability()


def test_a_compiler_older_than_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it does not know is not asked of it; kernels that are built already are used."""
    has = {"avx2": True, "fma3": True, "f16c": True, "amx_tile": True, "amx_int8": True}
    has |= {f"avx512_{part}": True for part in ("f", "bw", "dq", "vl", "vnni")}
    monkeypatch.delenv(CAPABILITY_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-mamx-*) exit 1;; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert capability() == "AVX512_VNNI"
    library = build._place(build._flags("AVX512_AMX"))
    library.parent.mkdir(parents=True)
    library.touch()
    assert capability() == "AVX512_AMX"
    library.unlink()
    monkeypatch.setenv("CXX", "/nonexistent")
    assert capability() == "AVX512_AMX"


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(KernelsUnavailable, match=r"cannot be kept: .*Not a directory"):
        load()


def test_no_compiler(tmp_path: Path) -> None:
    """Nothing is left behind that a later start would take for kernels."""
    done = python(
        "-c", ASK, seconds=100, PATH=str(tmp_path / "bin"), CXX="/nonexistent",
        XDG_CACHE_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch: the CPU kernels cannot be compiled: ")
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.rglob("*.so")]


@pytest.mark.parametrize("name", build.capabilities())
def test_the_vectors_are_known_to_the_compiler(name: str, tmp_path: Path) -> None:
    """What all kernels are written against, for CPUs that this one need not be."""
    compiler = get_cxx_compiler()
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    source = tmp_path / "vectors.cpp"
    source.write_text('#include "tiles.h"\n')
    folders = [f"-I{folder}" for folder in (build._FOLDER, *include_paths())]
    command = [compiler, *build._flags(name), "-std=c++20", "-fsyntax-only", *folders, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["AVX512_VNNI", "AVX512", "AVX2_VNNI", "AVX2", "PORTABLE"])
def test_another_capability(capability: str) -> None:
    """All tests of this folder; the first time this compiles for a minute."""
    flags = {"AVX512_VNNI": "avx512_vnni", "AVX512": "avx512bw", "AVX2_VNNI": "avx_vnni"}
    needed = flags.get(capability, "avx2" if capability == "AVX2" else "")
    if needed not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this machine has no {capability}")
    files = [str(p) for p in sorted(FOLDER.glob("test_*.py")) if p.name != Path(__file__).name]
    done = python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files,
        seconds=900, **{CAPABILITY_VARIABLE: capability},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
