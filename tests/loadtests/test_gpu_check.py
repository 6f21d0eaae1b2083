"""The runner of `make gpu-check`, with steps of its own; and that it does nothing without a GPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from loadtests import gpu_check
from loadtests.gpu_check import STEPS, Step, check, facts

ROOT = Path(__file__).parents[2]


def python(name: str, code: str, seconds: float = 20, **environment: str | None) -> Step:
    return Step(name, ("{python}", "-c", code), seconds, environment)


def test_a_step_that_fails_or_hangs_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GONE", "here")
    hang = (
        "import os, subprocess, sys, time; "
        "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); time.sleep(60)"
    )
    steps = [
        python("good", "import os; print(os.environ['SET'], 'GONE' in os.environ)", SET="set",
               GONE=None),
        python("bad", "import sys; print('why'); sys.exit(3)"),
        python("slow", hang, 1.5),
        Step("absent", ("{python}", "no-such-file.py"), 20),
        Step("writes", ("{python}", "-c", "open(r'{out}/figures.json', 'w').write('[]')"), 20),
    ]  # fmt: skip
    start = time.monotonic()
    assert check(steps, tmp_path / "out", {"card": "a card", "driver": "1.2"}) == 1
    assert time.monotonic() - start < 20
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(s["result"], s["status"]) for s in report["steps"]] == [
        ("passed", 0), ("failed", 3), ("timed out", None), ("failed", 2), ("passed", 0),
    ]  # fmt: skip
    assert report["steps"][0]["tail"] == "set False"
    child = int(report["steps"][2]["tail"])
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert (tmp_path / "out" / "figures.json").read_text() == "[]"
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# a card\n")
    assert "| driver | 1.2 |" in text
    assert "## bad: failed\n\n```\nwhy\n```" in text


def test_all_passed(tmp_path: Path) -> None:
    assert check([python("good", "")], tmp_path, {}) == 0


def test_without_a_gpu_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "finds no GPU. Nothing was run and nothing was measured." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_facts_name_a_stubbed_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        name, total_memory, major, minor, multi_processor_count = "Stub", 80 << 30, 9, 0, 132

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    found = facts()
    assert (found["card"], found["compute_capability"]) == ("Stub", "9.0")
    assert found["torch"]


def test_the_real_steps_name_what_there_is() -> None:
    """Tests that are there; modules with the flags they get."""
    for step in STEPS:
        assert step.command[:2] == ("{python}", "-m")
        if step.command[2] == "pytest":
            paths = [word for word in step.command if word.startswith("tests/")]
            assert paths
            assert all((ROOT / path).exists() for path in paths)
        else:
            module = ROOT / (step.command[2].replace(".", "/") + ".py")
            text = module.read_text()
            for flag in (word for word in step.command if word.startswith("--")):
                assert f'"{flag}"' in text, f"{module}: {flag}"
    assert sys.executable
