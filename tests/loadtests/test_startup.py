"""The command: a process's memory as it is, and a run that starts a tiny model's server."""

from __future__ import annotations

import json
import mmap
import os
import resource
from pathlib import Path

import pytest

from loadtests import startup


def test_memory_is_what_a_process_has_in_ram() -> None:
    before = startup.memory(os.getpid())
    with mmap.mmap(-1, 64 << 20) as pages:
        untouched = startup.memory(os.getpid())
        pages.write(b"x" * len(pages))
        touched = startup.memory(os.getpid())
    after = startup.memory(os.getpid())
    assert untouched["resident_mb"] - before["resident_mb"] < 32
    assert touched["resident_mb"] - before["resident_mb"] > 64
    assert after["resident_mb"] < touched["resident_mb"] - 60
    assert after["peak_mb"] >= touched["resident_mb"] - 1
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    assert after["peak_mb"] == pytest.approx(usage, rel=0.05)
    assert startup.memory(1 << 30) == {}  # no such process


def test_a_run_starts_a_server_and_uses_its_adapters(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    load = ["--adapters", "3", "--rank", "2", "--prompt-tokens", "20", "--output-tokens", "4"]
    server = ["--model", str(model_folder), "--server-flag=--kv-memory=1MiB"]
    startup.main([*server, "--starts", "1", *load, "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["starts"] == [result["seconds_to_ready"]]
    assert 0 < result["seconds_to_ready"] < 120
    assert result["server"]["status"] == "ok"
    assert list(result["memory"]) == ["ready", "uploaded", "used"]
    peaks = [figures["peak_mb"] for figures in result["memory"].values()]
    assert peaks == sorted(peaks)
    for figures in result["memory"].values():
        assert 0 < figures["resident_mb"] <= figures["peak_mb"]
    shown = capsys.readouterr().out
    assert "ready after" in shown
    assert f"{peaks[-1]:.0f}" in shown
