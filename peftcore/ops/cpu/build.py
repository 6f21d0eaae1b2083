"""Builds the kernels once for this machine, and loads them.

The library lies in the cache under a hash of all that it is made from: the sources, torch's
version, the interpreter, the flags. A second start loads it without asking the compiler.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_NAME = "polypeft_kernels"
_SOURCES = (
    "bindings.cpp",
    "linear.cpp",
    "adapters.cpp",
    "trained.cpp",
    "sequences.cpp",
    "optimizer.cpp",
    "matmul_float.cpp",
    "matmul_integer.cpp",
    "attention.cpp",
    "elementwise.cpp",
)
#: Chooses the instructions, a key of the flags; by default the best that torch finds.
CAPABILITY_VARIABLE = "POLYPEFT_CPU_CAPABILITY"
#: Fused multiply-adds only where a kernel says so: the same sums whatever the compiler inlines.
#: OpenMP at compile time only: the runtime is the one that torch has loaded, never a second.
_COMMON = ("-O3", "-fopenmp", "-Wno-psabi", "-Wno-maybe-uninitialized")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-ffp-contract=off")
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    *("-mprefer-vector-width=512", "-ffp-contract=off"),
)
_FLAGS = {
    "AVX512_VNNI": (*_AVX512, "-mavx512vnni"),
    "AVX512": _AVX512,
    "AVX2_VNNI": (*_AVX2, "-mavxvnni"),
    "AVX2": _AVX2,
    "PORTABLE": (),
}


class KernelsUnavailable(Exception):
    """The kernels cannot be built or loaded here; the message says why."""


def capability() -> str:
    """What the kernels are compiled for: a key of the flags.

    Raises:
        KernelsUnavailable: the environment asks for something unknown.
    """
    asked = os.environ.get(CAPABILITY_VARIABLE)
    if asked is not None:
        if asked not in _FLAGS:
            raise KernelsUnavailable(
                f"{CAPABILITY_VARIABLE}={asked}: expected one of {', '.join(_FLAGS)}"
            )
        return asked
    found = torch.backends.cpu.get_cpu_capability()
    has = torch.cpu.get_capabilities()
    if has.get({"AVX512": "avx512_vnni", "AVX2": "avx_vnni"}.get(found, "")):
        found += "_VNNI"
    return found if found in _FLAGS else "PORTABLE"


def load() -> ModuleType:
    """The compiled module, built first where the cache has none.

    Raises:
        KernelsUnavailable: there is no compiler, or it fails.
    """
    flags = (*_COMMON, *_FLAGS[capability()])
    folder = _cache_folder() / _key(flags)
    library = folder / f"{_NAME}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "build.lock"):
            if not library.is_file():
                # torch's own lock, left by a process that was killed: it would be waited for.
                (folder / "lock").unlink(missing_ok=True)
                _build(folder, flags)
    try:
        return _import(library)
    except ImportError as exc:
        raise KernelsUnavailable(f"{library}: {exc}") from exc


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
