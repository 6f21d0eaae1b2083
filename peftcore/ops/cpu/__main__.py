"""Compile the kernels ahead: `python -m peftcore.ops.cpu FOLDER`

For every kind of CPU of this architecture, so that no machine needs a compiler that runs the same
torch and the same interpreter with POLYPEFT_KERNELS=FOLDER. Each takes about half a minute.

    python -m peftcore.ops.cpu /opt/kernels --for AVX2,PORTABLE
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from peftcore.ops.cpu.build import KernelsUnavailable, build_ahead, capabilities


def main() -> None:
    """Parse the flags and compile."""
    parser = argparse.ArgumentParser(
        prog="python -m peftcore.ops.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = capabilities()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--for", dest="names", default=",".join(known), help="default: %(default)s")
    arguments = parser.parse_args()
    names = arguments.names.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"--for {','.join(sorted(unknown))}: expected some of {','.join(known)}")
    try:
        build_ahead(arguments.folder, names)
    except KernelsUnavailable as exc:
        sys.exit(f"{parser.prog}: {exc}")


if __name__ == "__main__":
    main()
