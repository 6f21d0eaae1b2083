"""What a server on a CPU imports: nothing that is there for training, which would cost it RAM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import tiny

_START = """
import sys
from pathlib import Path
import server.api.app
from server.build import build_runtime
from server.settings import Settings
folder, data = sys.argv[1:]
for quantization in ("nf4", "int8"):
    settings = Settings(model=folder, quantization=quantization, data_dir=Path(data, quantization),
                        kv_memory="1MiB", device="cpu")
    build_runtime(settings).close()
unwanted = ("bitsandbytes", "xgrammar", "transformers.trainer", "datasets", "pandas", "peft",
            "peftcore.model", "peftcore.ops.triton")
print([name for name in unwanted if name in sys.modules])
"""


def test_a_server_leaves_out_what_is_for_training(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.llama().save_pretrained(folder)
    tiny.hf_tokenizer().save_pretrained(folder)
    command = [sys.executable, "-c", _START, str(folder), str(tmp_path / "data")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "[]"
