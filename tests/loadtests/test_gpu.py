"""The GPU's benchmark at tiny sizes on the CPU, and the account of a step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from loadtests import gpu, gpu_account
from loadtests.gpu_account import H100, MODELS, Case, Launches, account, table


def test_a_smoke_test_runs_every_contender_and_claims_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("POLYPEFT_OPS", "triton")
    files = tmp_path / "k.json", tmp_path / "k.png"
    gpu.main(["--smoke", "--json", str(files[0]), "--plot", str(files[1])])
    assert "no measurement" in capsys.readouterr().out
    result = json.loads(files[0].read_text())
    assert result["smoke"]
    assert {row["contender"] for row in result["rows"]} >= {
        gpu.OURS,
        gpu.LOOP,
        gpu.GATHERED,
        gpu.GROUPED,
    }
    for row in result["rows"]:
        assert row.get("error", 0) < 0.05, "bfloat16"
    assert sum("error" in row for row in result["rows"]) >= 6
    assert files[1].stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "nothing was measured" in capsys.readouterr().err


def test_a_wrong_result_shows_as_an_error() -> None:
    case = gpu.SMOKE.cases[0]
    layer = gpu.make_layer(gpu.SMOKE.model, case, torch.device("cpu"), 0)
    segments = gpu.segments_of(case)
    right = gpu.contenders(torch.device("cpu"))[gpu.LOOP]
    assert gpu.error_of(layer, segments, right(layer, segments)) < 0.05
    assert gpu.error_of(layer, segments, right(layer, segments[1:])) > 0.1


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        (MODELS[0], Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                                num_attention_heads=28, num_key_value_heads=4, vocab_size=152064)),
        (MODELS[1], LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                                num_attention_heads=32, vocab_size=32000)),
    ],
)  # fmt: skip
def test_the_account_has_transformers_weights(
    shapes: gpu_account.Shapes, config: LlamaConfig
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [
        m for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    ]  # fmt: skip
    assert shapes.num_weights == sum(m.weight.numel() for m in linears)
    assert shapes.low_rank_width == sum(sum(m.weight.shape) for m in linears)
    rows = {row.part: row for row in account(shapes, Case(batch=64))}
    assert rows["base: codes and scales"].flop == 2 * 64 * shapes.num_weights
    assert rows["adapters"].num_bytes == 64 * 16 * shapes.low_rank_width * 2
    assert rows["adapters"].seconds(H100) == rows["adapters"].num_bytes / 3.35e12


def test_docs_have_the_accounts_tables() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    for model in MODELS:
        assert table(model, Case(), H100) in text


def test_the_loop_launches_twice_for_each_adapter_and_module(model_folder: Path) -> None:
    """In a process of its own, which has no kernels of the CPU."""
    ended = subprocess.run(
        [sys.executable, "-m", "loadtests.gpu_account", "--count", "--model", str(model_folder),
         "--batch", "4", "--adapters", "4", "--rank", "4"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    modules = 7 * found["layers"]
    assert found["launches"]["adapters"] - found["launches"]["base"] == 2 * 4 * modules
    assert found["most"]["adapters"]["addmm_"] == 4 * modules


def test_what_launches_nothing_is_not_counted() -> None:
    with Launches() as mode:
        x = torch.ones(4, 4)
        (x.view(2, 8).t() + 1).detach().mul_(2)
    assert mode.counts == {"ones": 1, "add": 1, "mul_": 1}
