"""`--check`: what it says is what a server then is; nothing is served, created or locked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftcore.sources.resolve import ModelSourceError
from server import plan as planning
from server.build import SetupError, build_runtime
from server.plan import make_plan
from server.settings import Settings
from tests import tiny


def settings(folder: Path, data: Path, **changes: object) -> Settings:
    given = {"kv_memory": "1MiB", "adapter_memory": "1MiB", "device": "cpu"} | changes
    return Settings(model=str(folder), data_dir=data, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_the_plan_is_what_a_server_then_is(
    model_folder: Path, tmp_path: Path, quantization: str, dtype: str
) -> None:
    given = settings(model_folder, tmp_path, quantization=quantization, kv_cache_dtype=dtype)
    plan = make_plan(given)
    assert list(tmp_path.iterdir()) == [], "it leaves nothing"
    runtime = build_runtime(given)
    tokens = int(runtime.stats()["kv_blocks"]) * given.block_size
    assert plan.facts["KV cache"] == f"1 MiB, {tokens} tokens"
    assert plan.facts["context"] == f"{runtime.max_model_len} tokens"
    assert plan.facts["kernels"] == runtime.facts["kernels"]
    runtime.close()


def test_an_encoders_cache_is_what_a_step_needs(tmp_path: Path) -> None:
    tiny.bert("FEATURE_EXTRACTION").save_pretrained(tmp_path / "model")
    tiny.hf_tokenizer().save_pretrained(tmp_path / "model")
    given = settings(tmp_path / "model", tmp_path / "data", kv_memory="900TiB")
    plan = make_plan(given)
    assert plan.fits
    runtime = build_runtime(given)
    tokens = int(runtime.stats()["kv_blocks"]) * given.block_size
    pool = runtime.engine.runner.pool
    num_bytes = sum(each.nbytes for each in [*pool.keys, *pool.values])
    assert plan.facts["KV cache"] == f"{num_bytes / (1 << 20):,.0f} MiB, {tokens} tokens"
    assert plan.facts["context"] == f"{runtime.max_model_len} tokens"
    runtime.close()


def test_the_bases_bytes_are_those_of_the_loaded_model(model_folder: Path) -> None:
    model = tiny.llama()
    loaded = sum(p.numel() * 4 for p in model.parameters())
    shapes = planning._weights(model_folder)
    assert planning._base_bytes(shapes, "none", torch.float32) == pytest.approx(loaded, rel=0.01)
    sizes = [planning._base_bytes(shapes, q, torch.float32) for q in ("nf4", "int8", "none")]
    assert sizes == sorted(sizes)
    assert planning._base_bytes(shapes, "none", torch.bfloat16) == sizes[-1] // 2


def test_what_the_data_directory_holds(model_folder: Path, tmp_path: Path) -> None:
    given = settings(model_folder, tmp_path)
    runtime = build_runtime(given)
    folder = tiny.save_random_adapter(
        tiny.llama(), tiny.peft_configs("llama")["lora-r4"], tmp_path / "adapter", 1
    )
    config = (folder / "adapter_config.json").read_bytes()
    for name in ("a", "b"):
        runtime.adapters.register(name, config, folder / "adapter_model.safetensors")
    assert "2 adapters registered" in make_plan(given).facts["data"], "also while it is served"
    runtime.close()
    assert "2 adapters registered" in make_plan(given).facts["data"]
    for database in tmp_path.glob("*/registry.sqlite"):
        database.write_bytes(b"no database")
    with pytest.raises(SetupError, match="--data-dir"):
        make_plan(given)


def test_what_is_preloaded(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    for name in ("b", "a"):
        tiny.save_random_adapter(
            tiny.llama(), tiny.peft_configs("llama")["lora-r4"], folder / name, 1
        )
    (folder / "other").mkdir()
    given = settings(model_folder, tmp_path / "data", preload=folder)
    assert make_plan(given).facts["preloaded"] == "a, b"
    runtime = build_runtime(given)
    assert [info.name for info in runtime.adapters.list()] == ["a", "b"]
    runtime.close()
    (folder / "b" / "adapter_model.safetensors").unlink()
    for start in (make_plan, build_runtime):
        with pytest.raises(SetupError, match=r"--preload .*/b: has no adapter_model\.safetensors"):
            start(given)


@pytest.mark.parametrize("name", ["preload", "lora_root"])
def test_folders_that_are_not_there_stop_the_start(
    model_folder: Path, tmp_path: Path, name: str
) -> None:
    given = settings(model_folder, tmp_path, **{name: tmp_path / "nowhere"})
    for start in (make_plan, build_runtime):
        with pytest.raises(SetupError, match=f"--{name.replace('_', '-')}: there is no folder"):
            start(given)


def test_what_does_not_fit(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not make_plan(settings(model_folder, tmp_path, kv_memory="900TiB")).fits
    assert make_plan(settings(model_folder, tmp_path)).fits
    monkeypatch.setattr(planning, "free_memory", lambda device: 100 << 20)
    plan = make_plan(settings(model_folder, tmp_path))
    assert plan.facts["fits"] == "no"
    monkeypatch.setattr(planning, "free_memory", lambda device: None)
    assert make_plan(settings(model_folder, tmp_path)).fits
    with pytest.raises(SetupError, match="--kv-memory"):
        make_plan(settings(model_folder, tmp_path, kv_memory=100))
    with pytest.raises(ModelSourceError):
        make_plan(settings(tmp_path / "nowhere", tmp_path))


def test_the_command(model_folder: Path, tmp_path: Path) -> None:
    flags = ["--check", "--model", str(model_folder), "--data-dir", str(tmp_path)]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "server", *flags, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    ended = run("--kv-memory", "1MiB", "--adapter-memory", "1MiB")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].split() == ["fits", "yes"]
    ended = run("--kv-memory", "900TiB")
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1].split() == ["fits", "no"]
    assert list(tmp_path.iterdir()) == []
