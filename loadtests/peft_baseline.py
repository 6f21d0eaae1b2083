"""HF peft's side of a serving load test: the same requests in static batches, in a process apart.

The base under transformers' `generate`, in float32 or, on a GPU, in bfloat16; every adapter
loaded, and peft's mixed batch (`adapter_names`), which takes LoRA only. Rows without an adapter run
with all adapters disabled, as a user of peft would run them. HF peft is a tool of the test suite's
and is imported in the child.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM

#: Tokens of the batch that warms up.
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Batch:
    """Rows that are generated together: prompts of one length, and each row's adapter.

    Attributes:
        adapters: names, one a row; None where no row has an adapter.
    """

    prompts: Sequence[Sequence[int]]
    adapters: Sequence[str] | None


def generate_batches(
    model_folder: Path,
    adapters: dict[str, Path],
    batches: Sequence[Batch],
    *,
    num_output_tokens: int,
    num_threads: int,
    max_seconds: float,
    device: str = "cpu",
) -> list[float]:
    """Generate all batches in a new process, each row greedily and to its full length.

    Args:
        model_folder: of the base. adapters: the folder of each name in `batches`.
        num_threads: of torch. max_seconds: for the whole process.
        device: `cpu` or `cuda`.

    Returns:
        each batch's seconds, prompt and output.

    Raises:
        RuntimeError: the process failed; what it wrote to stderr has been shown.
        subprocess.TimeoutExpired: it took longer.
    """
    job = {
        "model": str(model_folder),
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "batches": [asdict(batch) for batch in batches],
        "num_output_tokens": num_output_tokens,
        "num_threads": num_threads,
        "device": device,
    }
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.peft_baseline"],
        input=json.dumps(job), stdout=subprocess.PIPE, text=True, timeout=max_seconds,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"peft's process ended with status {done.returncode}")
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def load(model_folder: str, adapters: dict[str, str], device: str = "cpu") -> Any:
    """transformers' model, inside a PeftModel where there are adapters."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    model = model.to(device).eval()
    peft: Any = importlib.import_module("peft")
    for i, (name, folder) in enumerate(adapters.items()):
        if i == 0:
            model = peft.PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    return model.eval()


@torch.inference_mode()
def generate(model: Any, batch: Batch, num_tokens: int) -> float:
    """Seconds that the batch takes."""
    ids = torch.tensor(batch.prompts, device=model.device)
    options: dict[str, Any] = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False,
        "min_new_tokens": num_tokens, "max_new_tokens": num_tokens,
        "pad_token_id": model.config.eos_token_id,
    }  # fmt: skip
    adapters_off: Any = contextlib.nullcontext
    if batch.adapters is not None:
        options["adapter_names"] = list(batch.adapters)
    elif not isinstance(model, transformers.PreTrainedModel):
        adapters_off = model.disable_adapter
    start = time.perf_counter()
    with adapters_off():
        made = model.generate(**options)
    if ids.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert made.shape == (len(ids), ids.shape[1] + num_tokens)
    return seconds


def main() -> None:
    """In the child: a job from stdin, the batches' seconds to stdout."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    job = json.load(sys.stdin)
    torch.set_num_threads(job["num_threads"])
    batches = [Batch(**batch) for batch in job["batches"]]
    model = load(job["model"], job["adapters"], job["device"])
    generate(model, batches[0], _WARM_UP_TOKENS)
    bar = tqdm(batches, "peft", unit="batch")
    seconds = [generate(model, batch, job["num_output_tokens"]) for batch in bar]
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
