"""The kernels' comparison: what is timed how often, the cases, the tables, and one tiny run."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtests import contest, kernel_attention, kernel_low_rank, kernel_matmul, kernels, machine
from loadtests.contest import Contender, Unavailable, copies_of, number, percent, plan, race, table
from loadtests.kernel_low_rank import Task, segments_of
from loadtests.machine import Limits, Watch
from loadtests.traffic import POPULARITIES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "matmul,cache"], "'cache' is not one of matmul, low-rank, attention"),
        (["--shapes", "64"], "'64' is not OUTxIN"),
        (["--shapes", "64x0"], "'64x0' is not OUTxIN"),
        (["--shapes", "64x65"], "not a multiple of 64"),
        (["--rows", "1,-2"], "'-2' is not a number over 0"),
        (["--rows", "5"], "multiples of 16"),
        (["--repeats", "0"], "over 0"),
        (["--patience", "-1"], "at least 0"),
    ],
)
def test_flags_that_cannot_be(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        kernels.parse(flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_cases_that_are_asked_for() -> None:
    args = kernels.parse(["--rows", "1,16,100", "--shapes", "192x64,49152x576"])
    assert kernels.matmul_cases(args) == ([(192, 64), (49152, 576)], [1, 16, 100])
    assert kernels.low_rank_rows(args) == [16]
    assert kernel_matmul.rows_of((192, 64), args.rows) == [1, 16, 100]
    assert kernel_matmul.rows_of((49152, 576), args.rows) == [1, 16]  # a head
    assert kernels.num_steps(args) == 5 + 3 * 2 * 1 * 5 + 4 * 2
    assert kernels.num_steps(kernels.parse(["--only", "matmul"])) == 7 * 6 + 4 + 1


def test_calls_and_repeats_of_a_measurement() -> None:
    assert plan(1e-3, copies=100, repeats=7, max_seconds=1.0) == (8, 7)
    assert plan(1e-3, copies=3, repeats=7, max_seconds=1.0) == (3, 7)  # no copy twice
    assert plan(1e-3, copies=100, repeats=7, max_seconds=0.04) == (8, 5)
    assert plan(5.0, copies=100, repeats=7, max_seconds=1.0) == (1, 3)
    assert plan(5.0, copies=100, repeats=2, max_seconds=1.0) == (1, 2)


def test_copies_fill_more_than_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "COLD_BYTES", 1000)
    codes, scales = torch.arange(100, dtype=torch.uint8), torch.ones(25)
    copies = copies_of([codes, scales])
    assert len(copies) == 5
    assert copies[0][0] is codes
    assert len({t.data_ptr() for copy in copies for t in copy}) == 10
    assert all(torch.equal(a, codes) and torch.equal(b, scales) for a, b in copies)
    assert len(copies_of([torch.ones(300)])) == 1


class Clock:
    """A clock that runs only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(contest.time, "perf_counter", lambda: self.now)

    def takes(self, seconds: float) -> None:
        self.now += seconds


def test_contenders_take_turns_over_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        clock.takes(seconds)

    fast = Contender("fast", [lambda i=i: call(f"f{i}", 0.004) for i in range(3)])
    slow = Contender("slow", [lambda: call("s", 1.0)])
    missing = Contender("missing", None, note="why")
    timings = race([fast, missing, slow], repeats=4, max_seconds=3.0)
    assert timings.keys() == {"fast", "slow"}
    assert (timings["fast"].seconds, timings["fast"].repeats) == (pytest.approx(0.004), 4)
    assert (timings["slow"].best_seconds, timings["slow"].repeats) == (pytest.approx(1.0), 3)
    warm_up = ["f0", "f1", "s", "s"]
    assert order == [*warm_up, "f2", "f0", "s", "s", "f1", "f2", "f0", "f1", "s", "f2", "f0"]


def test_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times = iter([9.0, 1.0, 50.0, 3.0])
    found = race([Contender("one", [lambda: clock.takes(next(times))])], repeats=3, max_seconds=9.0)
    assert (found["one"].seconds, found["one"].best_seconds) == (3.0, 1.0)


def test_a_contender_that_is_not_there() -> None:
    def build(error: Exception) -> Contender:
        raise error

    for error in (Unavailable("no such\noperator"), RuntimeError("no such\nbackend")):
        found = Contender.make("x", lambda error=error: build(error))
        assert found.calls is None
        assert found.note.startswith("no such")
        assert "\n" not in found.note
    with pytest.raises(ValueError, match="a mistake"):
        Contender.make("x", lambda: build(ValueError("a mistake")))
    with pytest.raises(AssertionError, match="relative error"):
        contest.relative_error(torch.ones(3), torch.full((3,), 2.0))
    with pytest.raises(AssertionError, match="relative error"):
        contest.relative_error(torch.full((3,), torch.nan), torch.ones(3))


def test_the_limit_is_the_later_of_two() -> None:
    limits = Limits(2, gflops=100.0, read_gb=10.0)
    assert limits.seconds(1e9, 1e9) == pytest.approx(0.1)
    assert limits.seconds(1e12, 1e9) == pytest.approx(10.0)
    assert limits.best_of(Limits(2, 90.0, 11.0)) == Limits(2, 100.0, 11.0)
    records: list[dict[str, Any]] = [{"ms": 200.0, "flop": 1e9, "bytes": 1e9}, {"note": "none"}]
    kernels.put_limits(records, limits)
    assert records[0]["limit_share"] == pytest.approx(0.5)
    assert records[1] == {"note": "none"}


def test_a_busy_machine_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quiet; busy, and while one waits busy, then quiet; busy at the end of all patience."""
    #: (clock, core-seconds of others)
    states = [(0.0, 0.0), (1.0, 0.0), (2.0, 1.0), (3.0, 2.0), (4.0, 2.0)]
    monkeypatch.setattr(Watch, "_now", staticmethod(lambda: states.pop(0)))
    slept: list[float] = []
    monkeypatch.setattr(machine.time, "sleep", slept.append)
    watch = Watch(patience=60.0)
    assert not watch.disturbed()
    assert watch.disturbed()
    assert len(slept) == 2
    states += [(4.0 + i, 2.0 + i) for i in range(1, 3)]
    watch.patience = 0.0
    assert watch.num_disturbed == 0
    assert not watch.disturbed()
    assert watch.num_disturbed == 1


def test_a_quiet_machines_others() -> None:
    watch = Watch(0)
    assert 0 <= watch.others() < 1000


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", [16, 256])
def test_segments_cover_all_rows_once(popularity: str, num_rows: int) -> None:
    found = segments_of(popularity, num_rows, random.Random(0))
    assert found[0][0] == 0
    assert found[-1][1] == num_rows
    for (_, end, owner), (start, _, other) in itertools.pairwise(found):
        assert end == start
        assert owner != other
    assert all((end - start) % (num_rows // 16) == 0 for start, end, _ in found)
    assert {"distinct": 16, "identical": 1}.get(popularity, len(found)) == len(found)


def test_a_tasks_bytes_and_arithmetic() -> None:
    """Of the adapters that have rows, at their own ranks."""
    task = Task.make((2, 7, 3), torch.float16, 16, [(0, 4, 0), (4, 10, 2), (10, 16, 0)])
    numbers = sum(out + in_ for out, in_ in kernel_low_rank.MODULES)
    assert task.num_bytes == 2 * numbers * (2 + 3)
    assert task.flop == 2 * numbers * (10 * 2 + 6 * 3)
    rounded = Task.make((16, 4), torch.int8, 16, [(0, 8, 0), (8, 16, 1)])
    scales = 16 * 4 * len(kernel_low_rank.MODULES)
    assert rounded.num_bytes == numbers * 16 + scales + 2 * numbers * 4


def test_what_attention_reads_and_computes() -> None:
    prompt = kernel_attention.Case("prompt", 2, 3, 4)
    assert prompt.flop == 4 * 2 * (4 + 5 + 6 + 7) * 9 * 64
    assert prompt.num_bytes(torch.float16) == 2 * 2 * 7 * 3 * 64 * 2
    assert kernel_attention.causal(prompt).sum() == 4 + 5 + 6 + 7
    assert kernel_attention.causal(prompt)[0].tolist() == [True] * 4 + [False] * 3


def test_numbers_and_tables() -> None:
    given = [0.0, 123.4, 12.34, 1.234, 0.1234, 0.000001234, -1.234, None]
    shown = ["0", "123", "12.3", "1.23", "0.123", "0.00000", "-1.23", "-"]
    assert [number(value) for value in given] == shown
    assert [percent(x) for x in (0.987, None)] == ["99%", "-"]
    assert table(["name", "ms"], [["a", "1"], ["bcdef", "10.5"]]) == (
        "name     ms\na         1\nbcdef  10.5"
    )


def test_a_tiny_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each contender computes the right thing, or says why it is not there; the bar ends full."""
    monkeypatch.setattr(contest, "COLD_BYTES", 1)
    monkeypatch.setattr(kernels, "measure_limits", lambda *_: Limits(1, 100.0, 10.0))
    monkeypatch.setattr(kernel_matmul, "prepacked", lambda *_: None)
    steps: list[int] = []
    monkeypatch.setattr(kernels.tqdm, "update", lambda *_: steps.append(1))
    path = tmp_path / "kernels.json"
    flags = "--shapes 64x128,48x64 --rows 1,16 --repeats 2 --max-seconds 0.001 --threads 1"
    before = torch.get_num_threads()
    kernels.main([*flags.split(), "--patience", "0", "--json", str(path)])
    assert torch.get_num_threads() == before
    result = json.loads(path.read_text())
    assert len(steps) == kernels.num_steps(kernels.parse(flags.split()))
    records = result["results"]
    names = {r["contender"] for r in records if r["section"] == "matmul" and "ms" in r}
    assert {"ours int8", "ours nf4", "F.linear fp32", "bnb nf4 dequantize"} <= names
    assert all(r["note"] for r in records if "ms" not in r)
    ours = [r for r in records if r["contender"] == "ours" and r["section"] != "matmul"]
    assert len(ours) == 3 * 2 * 1 * 5 + 4 * 2
    rounded = [r for r in ours if r.get("dtype") == "int8" and r["section"] == "low-rank"]
    assert len(rounded) == 2 * 5
    assert all(1e-4 < r["error"] < 0.02 for r in rounded)
    assert all(r["error"] < 1e-4 for r in ours if r not in rounded)
    assert all(r["limit_share"] > 0 for r in ours)
    printed = capsys.readouterr().out
    for text in ("64 x 128", "48 x 64", "ours nf4: GB/s", "a layer, 16 rows", "decode, 16 x 214"):
        assert text in printed
    assert "oneDNN packed fp32: not available: this torch has no" in printed
