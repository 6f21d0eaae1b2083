"""What pools take and what is left for them, of a CPU and of a GPU that is not there."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import ops
from server.build import SetupError, build_runtime
from server.memory import (
    MemoryPlan,
    TooLittleMemory,
    base_bytes,
    graph_bytes,
    make_memory_plan,
    workspace_bytes,
)
from server.plan import make_plan
from server.settings import Settings
from tests import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MIB = 1 << 20


@pytest.fixture
def free_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that tells of 1,000 MiB free of 2,000."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * MIB, 2000 * MIB))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield
    ops._compiles_for.cache_clear()


def gpu_plan(*, is_loaded: bool, kv_memory: int | None, adapters: int = 200 * MIB) -> MemoryPlan:
    return make_memory_plan(
        GPU, base=300 * MIB, adapters=adapters, workspace=100 * MIB, kv_memory=kv_memory,
        is_loaded=is_loaded,
    )  # fmt: skip


@pytest.mark.usefixtures("free_gpu")
def test_auto_is_what_a_gpu_has_left() -> None:
    """Nine tenths of what is free beside the base, without adapters and workspace."""
    before = gpu_plan(is_loaded=False, kv_memory=None)
    assert before.kv_cache == int(700 * MIB * 0.9) - 300 * MIB
    assert before.total == before.available
    after = gpu_plan(is_loaded=True, kv_memory=None)
    assert after.kv_cache == int(1000 * MIB * 0.9) - 300 * MIB
    assert after.fits


@pytest.mark.usefixtures("free_gpu")
def test_pools_that_a_gpu_has_no_room_for_are_refused() -> None:
    assert gpu_plan(is_loaded=True, kv_memory=600 * MIB).kv_cache == 600 * MIB
    with pytest.raises(TooLittleMemory, match=r"--kv-memory 601 MiB: .*which leaves 600 MiB"):
        gpu_plan(is_loaded=True, kv_memory=601 * MIB)
    with pytest.raises(TooLittleMemory, match=r"--kv-memory auto: .*--adapter-memory 900 MiB"):
        gpu_plan(is_loaded=True, kv_memory=None, adapters=900 * MIB)


@pytest.mark.usefixtures("free_gpu")
def test_graphs_are_a_part_of_the_plan() -> None:
    plan = make_memory_plan(
        GPU, base=300 * MIB, adapters=200 * MIB, workspace=100 * MIB, kv_memory=None,
        is_loaded=True, graphs=50 * MIB,
    )  # fmt: skip
    assert plan.kv_cache == int(1000 * MIB * 0.9) - 350 * MIB
    assert plan.total == plan.available
    assert "workspace 100 MiB, graphs 50 MiB: " in str(plan)
    assert "graphs" not in str(gpu_plan(is_loaded=True, kv_memory=None))
    with pytest.raises(TooLittleMemory, match="--cuda-graphs 600 MiB, which leaves 0 MiB"):
        make_memory_plan(
            GPU, base=300 * MIB, adapters=200 * MIB, workspace=100 * MIB, kv_memory=None,
            is_loaded=True, graphs=600 * MIB,
        )  # fmt: skip


@pytest.mark.usefixtures("free_gpu")
def test_check_reckons_with_the_gpu(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given: dict[str, Any] = {
        "model": str(model_folder), "data_dir": tmp_path, "device": "cuda",
        "adapter_memory": "100MiB",
    }  # fmt: skip
    plan = make_plan(Settings(**given))
    assert int(plan.facts["KV cache"].split()[0]) in range(790, 800)
    assert "on cuda when all pools are full, of 900 MiB" in plan.facts["memory"]
    with pytest.raises(SetupError, match="--kv-memory 900 MiB"):
        make_plan(Settings(**given, kv_memory="900MiB"))


def test_a_cpus_cache_has_a_default_and_may_be_too_large() -> None:
    def plan(kv_memory: int | None) -> MemoryPlan:
        return make_memory_plan(
            CPU, base=0, adapters=0, workspace=0, kv_memory=kv_memory, is_loaded=True
        )

    assert plan(None).kv_cache == 1024 * MIB
    assert not plan(1 << 50).fits


def test_auto_is_written_out() -> None:
    assert Settings().kv_memory is None
    assert Settings(kv_memory="auto").kv_memory is None  # type: ignore[arg-type]
    assert Settings(kv_memory="2MiB").kv_memory == 2 * MIB  # type: ignore[arg-type]


def test_the_start_tells_what_was_loaded(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"kv_memory": "3MiB", "adapter_memory": "2MiB", "quantization": "none", "device": "cpu"}
    with caplog.at_level(logging.INFO, "server.build"):
        runtime = build_runtime(Settings(model=str(model_folder), data_dir=tmp_path, **given))  # type: ignore[arg-type]
    pool = runtime.engine.runner.pool
    blocks = sum(t.nbytes for t in (*pool.keys, *pool.values))
    runtime.close()
    [line] = [r.getMessage() for r in caplog.records if r.getMessage().startswith("memory: ")]
    assert f"KV cache {blocks / MIB:,.0f} MiB, adapters 2 MiB" in line
    tied = {p.data_ptr(): p.nbytes for p in tiny.llama().parameters()}
    assert f"base {sum(tied.values()) / MIB:,.0f} MiB" in line
    assert base_bytes(tiny.llama()) >= sum(tied.values())


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were made within and lived at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if _is(tensor) else None
            if storage is not None and storage._cdata not in known | set(self.live):
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.live.values()))
        return result


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("vocab_size", [64, 20000])
def test_graphs_keep_about_what_transformers_takes(vocab_size: int) -> None:
    """Of a step of single rows, whose context is short: attention is not in parts."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=vocab_size,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (512, 1))
    with torch.inference_mode(), Peak() as peak:
        model(tokens, use_cache=False)
    found = graph_bytes(config, max_rows=512, max_model_len=256, dtype=torch.float32)
    weight = 256 * 1024 * 4  # that a quantized layer would make, and this one does not
    assert 0.7 < (found - (weight if vocab_size == 64 else 0)) / peak.most < 1.6
    longer = graph_bytes(config, max_rows=512, max_model_len=512, dtype=torch.float32)
    assert longer - found == 512 * 8 * 32 * (32 + 2) * 4


@pytest.mark.parametrize("vocab_size", [64, 20000])
def test_the_workspace_is_about_what_transformers_takes(vocab_size: int) -> None:
    """A step of a model that is mostly layers, and of one that is mostly logits."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=vocab_size,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (1, 512))
    with torch.inference_mode(), Peak() as peak:
        model(tokens, use_cache=False)
    reckoned = workspace_bytes(
        config, max_num_batched_tokens=512, max_num_seqs=0, max_model_len=512,
        dtype=torch.float32, dequantizes=False,
    )  # fmt: skip
    assert 0.7 < reckoned / peak.most < 1.6
