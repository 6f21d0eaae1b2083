"""The command: flags that disagree, the plan, and a run against a tiny server."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from loadtests import peft_baseline, serving
from loadtests.adapters import RandomAdapters
from loadtests.peft_baseline import Batch
from tests.serving import serve


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare", "base,best"], "'best' is not one of base, distinct"),
        (["--compare", "base,base"], "a name is given twice"),
        (["--rounds", "0"], "0 is not over 0"),
        (["--streams", "few"], "invalid int value"),
        (["--registered", "8"], "fewer than --adapters"),
        (["--rate", "1", "--trace", "x"], "not allowed with"),
        (["--trace", "no-such-file"], "No such file"),
        (["--trace", __file__], "the columns TIMESTAMP"),
        (["--upload"], "only with --url"),
        (["--url", "http://x"], "name its adapters by --models"),
        (["--url", "http://x", "--upload", "--models", "a"], "not both"),
        (["--url", "http://x", "--models", "a", "--compare", "mixed"], "mixed needs adapters"),
        (["--url", "http://x", "--models", "a", "--quantization", "nf4"], "--quantization: not"),
        (["--against", "peft", "--methods", "lora,dora"], "takes LoRA only"),
        (["--against", "peft", "--compare", "mixed"], "takes LoRA only"),
        (["--against", "peft", "--rate", "1"], "a closed loop"),
        (["--against", "peft", "--rounds", "1"], "at least 2"),
    ],
)
def test_flags_that_disagree(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        serving.parse(flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_plan_is_the_same_each_time_and_shares_no_prefix() -> None:
    cases_flag = f"--compare={','.join(serving.CASES)}"
    flags = "--streams 4 --adapters 3 --registered 9 --rounds 2 --requests 10 --prompt-tokens 5"
    args = serving.parse([cases_flag, *flags.split()])
    cases = serving.make_cases(args, "the-base")
    assert [case.name for case in cases] == args.compare
    models = {case.name: list(case.models) for case in cases}
    assert models["base"] == ["the-base"]
    assert models["distinct"] == ["adapter-0", "adapter-1", "adapter-2"]
    assert models["zipf"] == [f"adapter-{i}" for i in range(9)]
    assert models["mixed"] == ["mixed-0", "mixed-1", "mixed-2"]
    plan = serving.make_plan(args, cases, range(1000), None)
    assert plan == serving.make_plan(args, cases, range(1000), None)
    assert [{len(r) for r in by_case.values()} for by_case in plan] == [{4}, {10}, {10}]
    requests = [r for by_case in plan for rs in by_case.values() for r in rs]
    assert len({r.prompt[0] for r in requests}) == len(requests)
    assert {(r.slot.arrival, len(r.prompt)) for r in requests} == {(None, 5)}
    assert {r.slot.num_output for r in plan[0]["base"]} == {8}  # the warm-up


def test_a_run_against_a_tiny_server(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every case; tokens are counted by the server, errors by their status."""
    path = tmp_path / "result.json"
    load = ["--streams", "5", "--adapters", "5", "--requests", "5", "--rounds", "1"]
    lengths = ["--prompt-tokens", "20", "--output-tokens", "4", "--rank", "2"]
    every_case = f"--compare={','.join(serving.CASES)}"
    with serve(tmp_path) as served:
        url = ["--url", served.url, "--model", str(model_folder)]
        serving.main([*url, "--upload", *load, *lengths, every_case, "--json", str(path)])
        served.wait_idle()
        with pytest.raises(SystemExit, match=r"nobody: 404 .*nobody"):
            serving.main([*url, "--models=nobody", "--compare=uniform", *lengths])
        own = ["--models=adapter-0,mixed-3", "--compare=distinct", "--rate=50"]
        serving.main([*url, *own, *load, *lengths])
    shown = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert [case["case"] for case in result["cases"]] == list(serving.CASES)
    for case in result["cases"]:
        assert (case["num_requests"], case["errors"]) == (5, {})
        assert case["output_tokens"] == 20
        assert 0 < case["ttft_p50_s"] <= case["e2e_p50_s"]
        assert 0 < case["fairness"]["jain_index"] <= 1
        assert f"\n{case['case']}" in shown
    by_name = {case["case"]: case for case in result["cases"]}
    assert by_name["base"]["ratio"] == 1
    assert by_name["distinct"]["fairness"]["num_adapters"] == 5
    assert by_name["distinct"]["num_prefix_hit_tokens"] == 0
    assert result["server"]["status"] == "ok"


def test_peft_generates_rows_with_and_without_adapters(model_folder: Path, tmp_path: Path) -> None:
    adapters = RandomAdapters(model_folder, ["lora"], rank=2)
    folders = {f"adapter-{i}": str(adapters.write(tmp_path / str(i), i)) for i in range(2)}
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_baseline.load(str(model_folder), folders)
        for names in (["adapter-1", "adapter-0", "adapter-1"], None):
            assert peft_baseline.generate(model, Batch(prompts, names), 3) > 0
        bare = peft_baseline.load(str(model_folder), {})
        assert peft_baseline.generate(bare, Batch(prompts, None), 3) > 0
