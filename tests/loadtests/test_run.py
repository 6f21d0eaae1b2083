"""The command: a run of locust against a tiny server, what it leaves, and thresholds that fail."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from clients.client import Client
from clients.metrics import Snapshot
from loadtests import run, run_flags
from loadtests.load import Load, Told, read_outcomes
from loadtests.monitor import Look, cache_figures, memory_growth
from loadtests.phase import Outcome
from loadtests.steps import summarize
from loadtests.thresholds import Threshold, check, saturation
from loadtests.traffic import Slot
from tests.serving import serve

PLOTS = {
    "latency_over_load.png",
    "ttft_by_popularity.png",
    "cache_hit_rate.png",
    "memory_over_time.png",
}
TINY = [
    *("--adapters", "4", "--rank", "2", "--prompt-tokens", "16", "--output-tokens", "6"),
    *("--upload-seconds", "0.3", "--flip-seconds", "0.2", "--interval", "0.1", "--warm-up", "0.2"),
]


def locusts_count(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["method"], row["name"]): row for row in json.loads(path.read_text())}


def test_a_run_of_its_own_server(model_folder: Path, tmp_path: Path) -> None:
    """Loads, a popularity and a trace, beside uploads and flips; locust's own counts agree."""
    out = tmp_path / "out"
    server = ["--model", str(model_folder), "--server-flag=--kv-memory=2MiB"]
    steps = ["--users", "1,3", "--popularities", "zipf,distinct", "--duration", "3"]
    steps += ["--mix", "chat=1,completion=1,classify=1"]
    trace = ["--trace", "sample", "--trace-requests", "8", "--trace-speed", "20"]
    lengths = ["--max-prompt-tokens", "20", "--max-output-tokens", "5"]
    memory = ["--adapter-memory", "24KiB", "--max-memory-growth", "1000"]
    run.main(["--out", str(out), *server, *steps, *trace, *lengths, *memory, *TINY])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["passed"]
    found = {step["name"]: step for step in summary["steps"]}
    assert list(found) == [
        "load, zipf, 1 users",
        "load, zipf, 3 users",
        "popularity, distinct, 3 users",
        "trace, zipf",
    ]
    for step in found.values():
        assert (step["num_failures"], step["num_refused"]) == (0, 0)
        assert step["output_tokens_per_s"] > 0
        assert 0 < step["ttft_p50_s"] <= step["e2e_p50_s"]
        assert 0 <= step["adapter_hit_rate"] <= 1
    assert found["load, zipf, 1 users"]["adapter_evictions"] > 0
    both = found["load, zipf, 3 users"]["by_user"]
    assert {"Chat", "Completion", "Classify", "Uploader", "Flipper"} == set(both)
    assert found["load, zipf, 3 users"]["classify_p50_s"] > 0
    assert both["Flipper"]["ok"] >= 3
    assert found["trace, zipf"]["by_user"]["Replay"] == {"ok": 8}
    assert found["trace, zipf"]["end_s"] - found["trace, zipf"]["start_s"] < 30

    locust = locusts_count(out / "locust" / "load-zipf-3-users.json")
    told = list(read_outcomes(out / "locust" / "load-zipf-3-users.jsonl"))
    chats = [t.outcome for t in told if t.user == "Chat" and t.outcome.times]
    ttfts = [outcome.times[0] - outcome.due for outcome in chats]
    row = locust["TTFT", "/v1/chat/completions"]
    assert row["num_requests"] == len(ttfts)
    assert row["total_response_time"] == pytest.approx(1e3 * sum(ttfts), rel=0.01)
    completions = [t.outcome.times for t in told if t.user in ("Completion", "Uploader")]
    gaps = sum(max(0, len(times) - 1) for times in completions)
    assert locust["ITL", "/v1/completions"]["num_requests"] == gaps
    assert (out / "locust" / "load-zipf-3-users.html").is_file()

    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(PLOTS)
    assert "passed" in page
    assert {path.name for path in out.glob("*.png")} == PLOTS
    assert min(path.stat().st_size for path in out.glob("*.png")) > 5000
    sizes = [look["resident_mb"] for look in summary["looks"]]
    assert min(sizes) > 50


def test_a_broken_threshold_fails_the_run(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a server by its URL, which has no adapters of ours afterwards."""
    out = tmp_path / "out"
    with serve(tmp_path) as served:
        target = ["--url", served.url, "--model", str(model_folder), "--out", str(out)]
        load = ["--users", "1", "--popularities", "uniform", "--duration", "2", *TINY]
        limits = ["--max-ttft-p95", "60", "--min-tokens-per-second", "1e9"]
        with pytest.raises(SystemExit) as ended:
            run.main([*target, *load, "--no-background", *limits])
        served.wait_idle()
        with Client(served.url) as client:
            assert client.adapters.list() == []
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "kept: failure ratio 0 ≤ 0" in shown
    assert "kept: TTFT p95" in shown
    assert "BROKEN: output tokens/s" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["passed"]
    assert "failed" in (out / "report.html").read_text()
    assert set(summary["steps"][0]["by_user"]) <= {"Chat", "Completion"}


def test_what_fails_is_counted_and_429_is_not(model_folder: Path, tmp_path: Path) -> None:
    """A classifier that is not there, and a queue that is too short for the users."""
    out = tmp_path / "out"
    with serve(tmp_path, max_num_seqs=1, max_waiting=1) as served:
        target = ["--url", served.url, "--model", str(model_folder), "--out", str(out)]
        load = ["--users", "8", "--popularities", "uniform", "--duration", "1.2", *TINY]
        mix = ["--mix", "completion=3,classify=1", "--classifiers", "nobody", "--no-background"]
        with pytest.raises(SystemExit):
            run.main([*target, *load, *mix, "--think", "0.01"])
    summary = json.loads((out / "summary.json").read_text())
    (step,) = summary["steps"]
    assert step["by_user"]["Completion"]["ok"] > 0
    assert step["num_refused"] == step["by_user"]["Completion"]["429"] > 0
    assert step["failures"] == {"404": step["num_failures"]}
    assert step["num_failures"] == step["by_user"]["Classify"]["404"] > 0
    (threshold,) = summary["thresholds"]
    assert threshold["value"] == step["num_failures"] / step["num_requests"]


# -- without a server ------------------------------------------------------------------------------


def outcome(due: float, first: float, end: float, status: str = "ok", num: int = 3) -> Outcome:
    middle = (first + end) / 2
    return Outcome("m", status, due, end, [first, middle, end] if status == "ok" else [], num)


def test_percentiles_are_of_what_was_due_after_the_warm_up() -> None:
    """By the standard library, whose inclusive quantiles interpolate as we say we do."""
    told = [Told("Chat", outcome(i, i + 0.01 * i**2, i + 0.01 * i**2 + 1)) for i in range(40)]
    told.append(Told("Uploader", outcome(5, 500, 600)))
    told += [Told("Classify", Outcome("m", "ok", i, i + 0.1 * i)) for i in range(9)]
    found = summarize(told, 30.0, 4.0)
    cuts = statistics.quantiles([0.01 * i**2 for i in range(4, 31)], n=100, method="inclusive")
    for p in (50, 95, 99):
        assert found[f"ttft_p{p}_s"] == pytest.approx(cuts[p - 1])
    assert found["classify_p50_s"] == pytest.approx(0.4)
    assert found["num_requests"] == 50


def test_rates_are_of_what_arrived_while_it_was_measured() -> None:
    told = [
        Told("Completion", outcome(0.0, 1.0, 3.0)),  # at 1, 2 and 3: one of three within
        Told("Completion", outcome(2.5, 3.0, 5.0, num=6)),  # all
        Told("Completion", outcome(6.0, 7.0, 99.0)),  # at 7, 53 and 99: one
        Told("Completion", outcome(6.0, 7.0, 7.5, "429")),
        Told("Completion", outcome(6.0, 7.0, 7.5, "500")),
    ]
    found = summarize(told, 8.0, 2.5)
    assert found["output_tokens_per_s"] == pytest.approx((1 + 6 + 1) / 5.5)
    assert found["requests_per_s"] == pytest.approx(2 / 5.5)
    assert (found["num_refused"], found["failures"]) == (1, {"500": 1})


def step(**fields: Any) -> dict[str, Any]:
    return {
        "num_requests": 10, "num_failures": 0, "start_s": 0.0, "end_s": 1.0,
        "memory_growth_mb": None, **fields,
    }  # fmt: skip


def broken(*steps: dict[str, Any], **limits: float) -> list[str]:
    every: dict[str, Any] = {
        "max_failure_ratio": 0.0, "max_ttft_p95": None, "min_tokens_per_second": None,
        "max_memory_growth": None,
    }  # fmt: skip
    return [t.name for t in check(steps, **(every | limits)) if not t.kept]


def test_thresholds() -> None:
    assert broken(step()) == []
    assert broken() == broken(step(num_requests=0)) == ["failure ratio"]
    assert broken(step(), step(num_failures=1)) == ["failure ratio"]
    assert broken(step(), step(num_failures=1), max_failure_ratio=0.05) == []
    slow, quick = step(ttft_p95_s=2.0), step(ttft_p95_s=1.0)
    assert broken(quick, slow, max_ttft_p95=1.5) == ["TTFT p95, s"]
    assert broken(quick, slow, max_ttft_p95=2.0) == []
    assert broken(quick, step(), max_ttft_p95=9.0) == ["TTFT p95, s"]  # a step without an answer
    fast = step(output_tokens_per_s=50.0)
    assert broken(step(), fast, min_tokens_per_second=50) == []
    assert broken(step(), fast, min_tokens_per_second=51) == ["output tokens/s"]
    long = step(end_s=9.0, memory_growth_mb=3.0)
    assert broken(step(memory_growth_mb=99.0), long, max_memory_growth=3.0) == []
    assert broken(step(), long, max_memory_growth=2.0) == ["memory growth, MB"]
    assert broken(step(), max_memory_growth=2.0) == ["memory growth, MB"]  # not measured
    assert "BROKEN" in str(Threshold("x", None, 1.0))


@pytest.mark.parametrize(
    ("points", "users"),
    [
        ([(1, 100), (2, 190), (4, 195), (8, 300)], 2),
        ([(1, 100), (2, 190), (4, 250)], None),
        ([(1, 100), (2, 50)], 1),
        ([(1, 100)], None),
    ],
)
def test_saturation_is_where_throughput_stops_growing(
    points: list[tuple[int, float]], users: int | None
) -> None:
    assert saturation(points, 0.05) == users


def look(seconds: float, resident: float | None, metrics: str | None = "") -> Look:
    return Look(seconds, resident, None if metrics is None else Snapshot(metrics))


def test_memory_that_grows_after_the_warm_up() -> None:
    flat = [look(i, 100.0 if i >= 10 else 10.0 * i) for i in range(40)]
    assert memory_growth(flat) == 0
    assert memory_growth([look(i, 100.0 + i) for i in range(40)]) == 20
    assert memory_growth(flat[:7]) is None
    assert memory_growth([look(i, None) for i in range(40)]) is None


def test_cache_figures_are_of_the_time_between_the_looks() -> None:
    def text(hits: int, loads: int) -> str:
        return f"polypeft_adapter_hits_total {hits}\npolypeft_adapter_loads_total {loads}\n"

    looks = [look(0, None, None), look(1, None, text(5, 5)), look(2, None, text(11, 7))]
    found = cache_figures([*looks, look(3, None, None)])
    assert (found["adapter_hit_rate"], found["adapter_loads"]) == (0.75, 2)
    assert "prefix_hit_rate" not in found
    assert cache_figures(looks[:2]) == {}


def test_a_load_is_read_as_it_was_written(tmp_path: Path) -> None:
    changed = {"slots": [Slot(0.5, 3, 4)], "flips": {"a": ["x"]}, "token_ids": [1]}
    load = Load(["a"], "zipf", "o", classifiers=["c"], uploads=["u"], **changed)  # type: ignore[arg-type]
    assert Load.read(load.write(tmp_path / "load.json")) == load
    path = tmp_path / "outcomes"
    told = Told("Chat", Outcome("m", "ok", 1.0, 2.0, [1.5], 3))
    path.write_text(told.line() + told.line()[:20])  # the process was ended
    assert list(read_outcomes(path)) == [told]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--users", "4,2"], "give growing numbers"),
        (["--users", "0"], "give growing numbers"),
        (["--popularities", "fair"], "'fair' is not one of"),
        (["--mix", "chat"], "is not NAME=WEIGHT"),
        (["--mix", "chat=0"], "every weight is 0"),
        (["--classifiers", "a", "--mix", "chat=1"], "--classifiers: needs"),
        (["--trace", "no-such-file"], "No such file"),
        (["--trace", __file__], "the columns TIMESTAMP"),
        (["--url", "http://x", "--adapter-memory", "1MiB"], "--adapter-memory: not with --url"),
        (["--url", "http://x", "--max-memory-growth", "1"], "cannot be seen"),
        (["--max-ttft-p95", "0"], "0 is not over 0"),
        (["--max-failure-ratio", "-1"], "is under 0"),
    ],
)
def test_flags_that_disagree(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_flags.parse(flags, None)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_sample_is_a_trace() -> None:
    args = run_flags.parse(["--trace", "sample"], None)
    assert args.trace == run_flags.SAMPLE
    assert len(run_flags.SAMPLE.read_text().splitlines()) == 49
