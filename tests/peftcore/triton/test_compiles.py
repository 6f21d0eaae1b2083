"""The kernels compile for GPUs, which the interpreter does not show: types, layouts, PTX."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_COMPILE = """
import importlib
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
LISTS = ("segments", "blocks", "entries", "items", "parts", "groups", "scaled", "sums")
FLOATS = ("shrunk", "low", "slots", "inner", "raw")
LIKE = ("before", "out", "branch", "stream", "normed")
CONSTANTS = {"SPLITS": 4, "SPLIT": 1024, "STEP": 128, "COLUMNS": 128, "ALIGNED": True}
KERNELS = {
    "kernels": [("shrink_kernel", {}), ("expand_kernel", {}), ("scale_kernel", {})],
    "trained_kernels": [
        *((name, {"BACK": back}) for name in ("shrink_kernel", "expand_kernel")
          for back in (False, True)),
        *((name, {"OF_B": of_b}) for name in ("outer_kernel", "outer_sum_kernel")
          for of_b in (False, True)),
        ("scale_back_kernel", {}), ("scale_sum_kernel", {}),
    ],
    "bottleneck_kernels": [("down_kernel", {}), ("up_kernel", {}), ("norm_kernel", {})],
}

def compiled(kernel, dtype, capability, own):
    precision = "ieee" if dtype == "fp32" else "tf32"
    given = CONSTANTS | own | {"PRECISION": precision, "TYPE": TYPES[dtype]}
    constants = {name: given[name] for name in kernel.arg_names if name.isupper()}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in LISTS:
            signature[name] = "*i64"
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name in LIKE or name[0] in "xy":
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "fp32" if name == "epsilon" else "i32"
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))

module = importlib.import_module(f"peftcore.ops.triton.{sys.argv[1]}")
for capability in map(int, sys.argv[2].split(",")):
    for dtype in sys.argv[3].split(","):
        for name, own in KERNELS[sys.argv[1]]:
            made = compiled(getattr(module, name), dtype, capability, own)
            assert "cubin" in made.asm
            assert made.metadata.shared <= (99 << 10)  # what a block may have on every such card
            print(capability, dtype, name, own, len(made.asm["cubin"]), made.metadata.shared)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "num_kernels"),
    [("kernels", 3), ("trained_kernels", 10), ("bottleneck_kernels", 3)],
)
def test_every_kernel_compiles_for_gpus(module: str, num_kernels: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="there is no triton for this platform")
    if torch.version.hip:
        pytest.skip("compiled for CUDA's capabilities")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", _COMPILE, module, "80,90", "bf16,fp16,fp32"],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 6 * num_kernels
