"""The command on a tiny model: every part of a step has a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadtests import step
from server.engine.engine import Engine

PARTS = {
    "schedule", "prepare", "linear", "adapters", "attention", "norms", "gates", "python",
    "sample", "detokenize", "deliver", "total",
}  # fmt: skip


def test_every_part_of_a_step_has_a_row(
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cached: list[int] = []
    advance = Engine._advance

    def advancing(self: Engine, seq: Any, token: Any) -> Any:
        output = advance(self, seq, token)
        cached.append(output.num_cached_tokens)
        return output

    monkeypatch.setattr(Engine, "_advance", advancing)
    path = tmp_path / "step.json"
    load = ["--streams", "2", "--adapters", "2", "--rank", "2", "--repeats", "1", "--threads", "1"]
    tokens = ["--prompt-tokens", "20", "--output-tokens", "6"]
    step.main(["--model", str(model_folder), *load, *tokens, "--quiet", "--json", str(path)])
    assert len(cached) == 2 * 2 * 3 * 6, "streams, cases, runs, tokens"
    assert not any(cached), "no prompt is found in a cache"
    result = json.loads(path.read_text())
    shown = capsys.readouterr().out
    for case in ("base", "with adapters"):
        for kind in ("decode_parts_ms", "prefill_parts_ms"):
            parts = result[case][kind]
            assert set(parts) == PARTS
            assert all(ms >= 0 for ms in parts.values())
            for part in ("linear", "python", "sample"):
                assert parts[part] > 0, part
        assert result[case]["decode_parts_ms"]["detokenize"] > 0
    assert result["base"]["decode_parts_ms"]["adapters"] == 0
    for part in PARTS:
        assert f"\n{part} " in shown


def test_adapters_are_what_is_beyond_the_base() -> None:
    steps = [{"decode": 1.0, "python": 0.004, "linear": 0.002, "total": 0.01}]
    base = [{"decode": 1.0, "linear": 0.0015, "total": 0.01}]
    assert step.table(steps, base, decode=False) == {}, "no such step"
    found = step.table(steps, base, decode=True)
    assert (found["python"], found["linear"], found["adapters"]) == (4.0, 1.5, 0.5)
