"""What a run leaves beside its adapter: a summary in JSON, and the loss curve as a picture."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftcore.checkpoint.files import replace_file

SUMMARY_NAME = "training_summary.json"
CURVE_NAME = "loss.png"


@dataclass(frozen=True)
class TrainingSummary:
    """What a run did. Losses are nats per learned token (per row under SEQ_CLS).

    Attributes:
        base_sha256: of the base's weight files, in the order of their names.
        data_sha256: of the data file's bytes; of the rows of a hub data set.
        num_rows, num_eval_rows: rows trained on, and held out.
        steps: optimizer steps done; fewer than planned where `interrupted` or stopped early.
        train_loss: mean over the last steps, at most 50; None without a step.
        initial_eval, final_eval: metrics on the held-out rows, before and after; None without any.
        seconds: wall time of the training, evaluations included.
        tokens_per_second: trained tokens, padding not counted, over that time.
        peak_memory_bytes: of this process; of the device where there is one.
        num_parameters: trained values.
        labels: under SEQ_CLS the classes, in the order of their logits.
    """

    method: str
    base_model: str | None
    base_sha256: str
    quantization: str
    data: str
    data_sha256: str
    num_rows: int
    num_eval_rows: int
    steps: int
    train_loss: float | None
    initial_eval: dict[str, float] | None
    final_eval: dict[str, float] | None
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    num_parameters: int
    interrupted: bool
    labels: list[str] | None
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2)
        replace_file(folder / SUMMARY_NAME, (text + "\n").encode())


def sha256_of(paths: Sequence[Path]) -> str:
    """SHA-256 over the files' bytes, one after another, as hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def peak_memory() -> int:
    """Bytes at most so far: of the CUDA device where there is one, else resident in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def draw_curve(history: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the losses of the Trainer's log as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, name, style in [("loss", "training", "-"), ("eval_loss", "held out", "o-")]:
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(folder / CURVE_NAME, dpi=120)
    pyplot.close(figure)
