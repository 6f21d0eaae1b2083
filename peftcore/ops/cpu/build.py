"""Builds the kernels once for this machine, and loads them.

The library lies in the cache under a hash of all that it is made from: the sources, torch's
version, the interpreter, the flags. A second start loads it without asking the compiler. Where
there is none, `build_ahead` has made a folder of libraries elsewhere, for CPUs of every kind.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_NAME = "polypeft_kernels"
_SOURCES = (
    "bindings.cpp",
    "bindings_training.cpp",
    "linear.cpp",
    "adapters.cpp",
    "trained.cpp",
    "sequences.cpp",
    "optimizer.cpp",
    "matmul_float.cpp",
    "matmul_integer.cpp",
    "matmul_amx.cpp",
    "attention.cpp",
    "elementwise.cpp",
    "layer.cpp",
    "quantize.cpp",
    "allocator.cpp",
)
#: Chooses the instructions, a key of the flags; by default the best that torch finds.
CAPABILITY_VARIABLE = "POLYPEFT_CPU_CAPABILITY"
#: Names the folder of `build_ahead`, which is only read. What it lacks is built in the cache.
AHEAD_VARIABLE = "POLYPEFT_KERNELS"
#: Fused multiply-adds only where a kernel says so: the same sums whatever the compiler inlines.
#: OpenMP at compile time only: the runtime is the one that torch has loaded, never a second.
_COMMON = ("-O3", "-fopenmp", "-Wno-psabi", "-Wno-maybe-uninitialized")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-ffp-contract=off")
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    *("-mprefer-vector-width=512", "-ffp-contract=off"),
)
_AVX512_VNNI = (*_AVX512, "-mavx512vnni")
_FLAGS = {
    "AVX512_AMX": (*_AVX512_VNNI, "-mamx-tile", "-mamx-int8"),
    "AVX512_VNNI": _AVX512_VNNI,
    "AVX512": _AVX512,
    "AVX2_VNNI": (*_AVX2, "-mavxvnni"),
    "AVX2": _AVX2,
    "PORTABLE": (),
}
#: What a CPU must have to run what each was compiled to, by torch's names.
_AVX2_NEEDS = ("avx2", "fma3", "f16c")
_AVX512_NEEDS = (*_AVX2_NEEDS, "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
_AVX512_VNNI_NEEDS = (*_AVX512_NEEDS, "avx512_vnni")
_NEEDS = {
    "AVX512_AMX": (*_AVX512_VNNI_NEEDS, "amx_tile", "amx_int8"),
    "AVX512_VNNI": _AVX512_VNNI_NEEDS,
    "AVX512": _AVX512_NEEDS,
    "AVX2_VNNI": (*_AVX2_NEEDS, "avx_vnni"),
    "AVX2": _AVX2_NEEDS,
    "PORTABLE": (),
}


class KernelsUnavailable(Exception):
    """The kernels cannot be built or loaded here; the message says why."""


def capability() -> str:
    """What the kernels are compiled for: a key of the flags, which this CPU can run.

    Raises:
        KernelsUnavailable: the environment asks for something unknown, or that this CPU has not.
    """
    asked = os.environ.get(CAPABILITY_VARIABLE)
    if asked is not None:
        if asked not in _FLAGS:
            raise KernelsUnavailable(
                f"{CAPABILITY_VARIABLE}={asked}: expected one of {', '.join(_FLAGS)}"
            )
        if missing := _missing(asked):
            raise KernelsUnavailable(
                f"{CAPABILITY_VARIABLE}={asked}: this CPU has no {', '.join(missing)}"
            )
        return asked
    found = torch.backends.cpu.get_cpu_capability()
    for name in (f"{found}_AMX", f"{found}_VNNI", found):
        if name in _FLAGS and not _missing(name):
            flags = _flags(name)
            if _built(flags) is not None or not _refused(flags):
                return name
    return "PORTABLE"


def capabilities() -> Sequence[str]:
    """All that the compiler knows on this architecture, whatever this CPU can run."""
    return tuple(_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ("PORTABLE",)


def _missing(name: str) -> list[str]:
    """Which of the instructions that kernels for `name` use this CPU has not."""
    has = torch.cpu.get_capabilities()
    return [need for need in _NEEDS[name] if not has.get(need)]


def load() -> ModuleType:
    """The compiled module, built first where neither `$POLYPEFT_KERNELS` nor the cache has it.

    Raises:
        KernelsUnavailable: there is no compiler, or it fails, or the cache cannot be written.
    """
    flags = _flags(capability())
    library = _built(flags) or _compiled(flags)
    try:
        return _import(library)
    except ImportError as exc:
        raise KernelsUnavailable(f"{library}: {exc}") from exc


def build_ahead(folder: Path, names: Sequence[str]) -> None:
    """Put kernels for each of `names`, keys of the flags, into `folder`; none of them is called.

    Raises:
        KernelsUnavailable: there is no compiler, or it fails.
    """
    flags = [_flags(name) for name in names]
    missing = [of_one for of_one in flags if not _place(of_one).is_file()]
    # torch compiles a library of one name once in a process, and loads it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for _ in pool.map(_compiled, missing):
            pass  # raises what was raised there
    for of_one in flags:
        target = folder / _key(of_one)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(_place(of_one), target)


def _flags(name: str) -> tuple[str, ...]:
    return (*_COMMON, *_FLAGS[name])


def _built(flags: tuple[str, ...]) -> Path | None:
    """The library, where it is there already."""
    ahead = os.environ.get(AHEAD_VARIABLE)
    places = [_place(flags)]
    if ahead:
        places.insert(0, Path(ahead) / _key(flags) / f"{_NAME}.so")
    return next((place for place in places if place.is_file()), None)


def _refused(flags: tuple[str, ...]) -> bool:
    """Is there a compiler that does not know the flags, being older than the CPU?"""
    from torch.utils.cpp_extension import get_cxx_compiler

    command = [get_cxx_compiler(), *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _compiled(flags: tuple[str, ...]) -> Path:
    """The library in the cache. Raises KernelsUnavailable."""
    library = _place(flags)
    folder = library.parent
    if not library.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "build.lock"):
                if not library.is_file():
                    # torch's own lock, left by a process that was killed: it would be waited for.
                    (folder / "lock").unlink(missing_ok=True)
                    _build(folder, flags)
        except OSError as exc:
            raise KernelsUnavailable(f"the CPU kernels cannot be kept: {exc}") from exc
    return library


def _place(flags: tuple[str, ...]) -> Path:
    """Where the cache has the library, or would have it."""
    return _cache_folder() / _key(flags) / f"{_NAME}.so"


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "polypeft" / "kernels"


def _key(flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(_FOLDER.glob("*.h")) + [_FOLDER / name for name in _SOURCES]:
        digest.update(path.name.encode() + path.read_bytes())
    facts = (torch.__version__, sys.version, sysconfig.get_config_var("SOABI"), platform.machine())
    digest.update(repr((facts, flags)).encode())
    return digest.hexdigest()[:16]


def _build(folder: Path, flags: tuple[str, ...]) -> None:
    from torch.utils import cpp_extension

    logger.warning("compiling the CPU kernels for this machine, once (about half a minute)")
    # ninja stands beside the interpreter, in a virtual environment that may not be activated.
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    try:
        cpp_extension.load(
            name=_NAME,
            sources=[str(_FOLDER / source) for source in _SOURCES],
            extra_cflags=list(flags),
            build_directory=str(folder),
            is_python_module=False,
            verbose=False,
        )
    except (RuntimeError, OSError, ImportError) as exc:
        raise KernelsUnavailable(f"the CPU kernels cannot be compiled: {_reason(exc)}") from exc
    finally:
        os.environ["PATH"] = path


def _reason(error: Exception) -> str:
    """The compiler's first complaint out of its pages."""
    lines = str(error).splitlines()
    return next((line for line in lines if " error: " in line), lines[0])


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
