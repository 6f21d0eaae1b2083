"""Compile Triton's binding to the CUDA driver ahead: `python -m peftcore.ops.triton_driver`

Triton compiles it at its first use, by the machine's C compiler, into its cache
($TRITON_CACHE_DIR). A machine with the same Triton, the same cache and the same
$TRITON_LIBCUDA_PATH needs no compiler then. Neither a GPU nor its driver is needed here: the
binding is linked against a library of the driver's name and functions that does nothing, put into
$TRITON_LIBCUDA_PATH for the time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def link_stub(source: str, folder: Path) -> Path:
    """A `libcuda.so.1` with every function `cu…` that the C text `source` names.

    Raises:
        OSError, subprocess.CalledProcessError: there is no compiler, or it fails.
    """
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*", source)))
    text = "".join(f"void {name}(void) {{}}\n" for name in names)
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", f"-Wl,-soname,{library.name}", "-o", str(library), "-x", "c", "-"]
    subprocess.run(command, input=text, text=True, check=True)
    return library


def compile_driver() -> str:
    """The path of the library, as `triton.backends.nvidia.driver.CudaUtils` looks for it."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_so_from_file

    path: str = compile_so_from_file(
        src_path=os.path.join(driver.dirname, "driver.c"),
        name="cuda_utils",
        library_dirs=driver.library_dirs(),
        include_dirs=driver.include_dirs,
        libraries=driver.libraries,
    )
    return path


def main() -> None:
    """Link the stub, compile, take the stub away."""
    if "TRITON_LIBCUDA_PATH" not in os.environ or "TRITON_CACHE_DIR" not in os.environ:
        sys.exit("peftcore.ops.triton_driver: set TRITON_LIBCUDA_PATH and TRITON_CACHE_DIR")
    from triton.backends.nvidia import driver

    folder = Path(os.environ["TRITON_LIBCUDA_PATH"])
    folder.mkdir(parents=True, exist_ok=True)
    stub = link_stub(Path(driver.dirname, "driver.c").read_text(), folder)
    try:
        print(compile_driver())
    finally:
        stub.unlink()


if __name__ == "__main__":
    main()
