"""The kernels compile for GPUs, which the interpreter does not show: types, layouts, PTX."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

_COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peftcore.ops.triton import kernels

POINTERS = {"segments": "*i64", "blocks": "*i64", "entries": "*i64", "items": "*i64",
            "shrunk": "*fp32"}
CONSTANTS = {"SPLITS": 4, "SPLIT": 1024, "STEP": 128, "COLUMNS": 128, "ALIGNED": True}

def compiled(kernel, dtype, capability):
    names = kernel.arg_names
    constants = {n: CONSTANTS.get(n) for n in names if n.isupper()}
    if "PRECISION" in constants:
        constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = POINTERS[name]
        else:
            signature[name] = f"*{dtype}" if name[0] in "xy" else "i32"
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))

for capability in (80, 90):
    for dtype in ("bf16", "fp16", "fp32"):
        for name in ("shrink_kernel", "expand_kernel", "scale_kernel"):
            made = compiled(getattr(kernels, name), dtype, capability)
            assert "cubin" in made.asm
            print(capability, dtype, name, len(made.asm["cubin"]))
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_gpus(tmp_path: object) -> None:
    pytest.importorskip("triton", reason="there is no triton for this platform")
    if torch.version.hip:
        pytest.skip("compiled for CUDA's capabilities")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 18
