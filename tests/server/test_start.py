"""How a server on a CPU starts: without what is there for training, which would cost it RAM, and
without looking for garbage where there is none."""

from __future__ import annotations

import socket
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


_READY = """
import gc, os, signal, sys, threading, time, urllib.request
from server.__main__ import main
port, folder, data = sys.argv[1:]
def look():
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready")
            break
        except OSError:
            time.sleep(0.1)
    print(gc.isenabled(), gc.get_freeze_count() > 100_000, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=look, daemon=True).start()
sys.argv = ["polypeft-serve", "--model", folder, "--data-dir", data, "--port", port,
            "--kv-memory", "1MiB", "--device", "cpu"]
main()
"""


def test_the_collector_works_once_the_model_is_ready_and_leaves_alone_what_stays(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    tiny.llama().save_pretrained(folder)
    tiny.hf_tokenizer().save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", _READY, port, str(folder), str(tmp_path / "data")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.stdout.strip() == "True True", ended.stderr
