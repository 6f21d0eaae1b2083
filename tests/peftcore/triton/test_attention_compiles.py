"""The attention's kernels compile for GPUs, which the interpreter does not show: types, PTX."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_COMPILE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peftcore.ops.triton import attention

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
POINTERS = {"slots": "*i64", "items": "*i32", "blocks": "*i32", "parts": "*fp32", "stats": "*fp32"}
LIKE = ("keys", "values", "queries", "key_cache", "value_cache", "sinks", "out")
WRITE = {"KV_HEADS": 8, "DIM": 80, "V_DIM": 80, "DIM_P": 128, "V_P": 128, "BLOCK_SIZE": 16,
         "ROWS": attention.WRITE_ROWS, "MOST": 65504.0}

def compiled(kernel, dtype, capability, constants):
    constants = {name: constants[name] for name in kernel.arg_names if name.isupper()}
    signature = {}
    for name in kernel.arg_names:
        given = "constexpr" if name in constants else POINTERS.get(name)
        plain = f"*{dtype}" if name in LIKE else "fp32" if name == "scale" else "i32"
        signature[name] = given or plain
    source = ASTSource(kernel, signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "cubin" in made.asm
    print(kernel.__name__, capability, dtype, made.metadata.shared)
    return made

capabilities, dtypes = (argument.split(",") for argument in sys.argv[1:])
for capability in map(int, capabilities):
    for dtype in dtypes:
        compiled(attention._write_kernel, dtype, capability, WRITE)
        for single, dim in ((False, 64), (True, 64), (False, 256), (True, 80)):
            options = {
                "HAS_SINKS": single, "WINDOW": 33 if single else 0, "CAUSAL": True,
                "SOFTCAP": 2.0 if single else 0.0, "HEADS": 32, "KV_HEADS": 8,
                "DIM": dim, "V_DIM": dim, "DIM_P": triton.next_power_of_2(dim),
                "V_P": triton.next_power_of_2(dim), "BLOCK_SIZE": 16,
                "QUERIES": 16 if single else attention.BLOCK_QUERIES,
                "POSITIONS": attention.BLOCK_POSITIONS // (2 if dim > 128 else 1),
                "LEAST": attention.SPLIT_POSITIONS, "MOST": attention.MAX_SPLITS if single else 1,
                "COMPUTE": TYPES[dtype],
            }
            made = compiled(attention._attend_kernel, dtype, capability, options)
            assert dtype == "fp32" or "mma" in made.asm["ptx"], "no matrix unit"
            assert made.metadata.shared <= (163 << 10)  # what an A100's block may have
            if single:
                compiled(attention._combine_kernel, dtype, capability, options)
"""


@pytest.mark.parametrize(
    ("capabilities", "dtypes"),
    [("90", "bf16"), pytest.param("80,90", "bf16,fp16,fp32", marks=pytest.mark.slow)],
)
def test_every_kernel_compiles_for_gpus(capabilities: str, dtypes: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    if torch.version.hip:
        pytest.skip("compiled for CUDA's capabilities")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", _COMPILE, capabilities, dtypes],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert ended.returncode == 0, ended.stderr
    num_variants = len(capabilities.split(",")) * len(dtypes.split(","))
    assert len(ended.stdout.splitlines()) == num_variants * (1 + 4 + 2)
