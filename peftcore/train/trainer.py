"""The training loop, and the files that it leaves.

Knows one adapter, one model on one device and token batches; nothing of recipes' files or flags.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from peftcore.base import BaseModel
from peftcore.config import WEIGHTS_NAME, AdapterConfig
from peftcore.errors import ConfigError, UnsupportedError
from peftcore.methods.prefix_tuning import PrefixAdapter
from peftcore.methods.training import Trainable, TrainableAdapter
from peftcore.train.data import (
    IGNORED,
    Batch,
    Sequence,
    batches_of,
    collate,
    load_examples,
    tokenize_all,
)
from peftcore.train.recipe import Recipe, RecipeError

SUMMARY_NAME = "training_summary.json"

#: The reported training loss is the mean over this many last steps.
_LAST_STEPS = 50


@dataclass(frozen=True)
class TrainingSummary:
    """What a run did. Losses are nats per completion token, of the weights before saving.

    Attributes:
        data_sha256: of the data file's bytes.
        num_rows, num_eval_rows: rows trained on, and held out.
        steps: optimizer steps done; fewer than planned where `interrupted`.
        train_loss: mean over the last steps, at most 50; None without a step.
        initial_eval_loss, eval_loss: on the held-out rows, before and after; None without any.
        seconds: wall time of the training loop.
        num_parameters: trained values.
    """

    method: str
    base_model: str | None
    data: str
    data_sha256: str
    num_rows: int
    num_eval_rows: int
    steps: int
    train_loss: float | None
    initial_eval_loss: float | None
    eval_loss: float | None
    seconds: float
    num_parameters: int
    interrupted: bool


def new_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: AdapterConfig
) -> TrainableAdapter:
    """Attach a new adapter to `model`, whose own weights are frozen.

    Raises:
        ConfigError: the config does not fit the model.
        UnsupportedError: the method or an option is served but not trained here.
    """
    if not isinstance(config, Trainable):
        raise UnsupportedError("peft_type", f"{config.peft_type} is not trainable here")
    return config.attach(model, BaseModel.from_model(model), tokenizer)


def batch_loss(adapter: TrainableAdapter, batch: Batch) -> tuple[Tensor, int]:
    """The mean loss over the completion tokens of a batch, in nats, and how many they are."""
    targets = batch.labels[:, 1:]
    keep = (targets != IGNORED).any(dim=0).nonzero().flatten()
    logits = adapter(batch.input_ids, batch.attention_mask, keep)
    targets = targets[:, keep]
    loss = cross_entropy(
        logits.flatten(0, 1).to(torch.float32), targets.flatten(), ignore_index=IGNORED
    )
    return loss, int((targets != IGNORED).sum())


@torch.no_grad()
def evaluate(adapter: TrainableAdapter, sequences: list[Sequence], batch_size: int) -> float:
    """The mean loss over all completion tokens of `sequences`, in nats."""
    adapter.eval()
    total, count = 0.0, 0
    by_length = sorted(sequences, key=lambda s: len(s.ids))
    for start in range(0, len(by_length), batch_size):
        loss, tokens = batch_loss(adapter, collate(by_length[start : start + batch_size]))
        total, count = total + float(loss) * tokens, count + tokens
    return total / count


def fit(adapter: TrainableAdapter, sequences: list[Sequence], recipe: Recipe) -> Iterator[float]:
    """Train, yielding the loss of each step once its update is done.

    Whoever stops iterating keeps a whole adapter: no update is half done at a yield.
    """
    parameters = adapter.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = num_steps(len(sequences), recipe)
    scheduler = get_scheduler(
        recipe.schedule, optimizer, num_warmup_steps=recipe.warmup_steps, num_training_steps=steps
    )
    rng = random.Random(recipe.seed)
    epochs = (batches_of(sequences, recipe.batch_size, rng) for _ in itertools.count())
    adapter.train()
    for batch in itertools.islice(itertools.chain.from_iterable(epochs), steps):
        loss, _ = batch_loss(adapter, collate(batch))
        loss.backward()
        clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield loss.item()


def num_steps(num_sequences: int, recipe: Recipe) -> int:
    """The optimizer steps that the recipe asks for."""
    if recipe.steps is not None:
        return recipe.steps
    return math.ceil((recipe.epochs or 1) * math.ceil(num_sequences / recipe.batch_size))


def save_adapter(
    adapter: TrainableAdapter, folder: str | Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does.

    Each file is replaced whole: a reader sees the old one or the new one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.to(dtype).cpu().contiguous() for k, v in adapter.tensors().items()}
    scratch = folder / f"{WEIGHTS_NAME}.partial"
    scratch.write_bytes(save(tensors, metadata={"format": "pt"}))
    scratch.replace(folder / WEIGHTS_NAME)
    dataclasses.replace(adapter.config, inference_mode=True).save_pretrained(folder)


def train(recipe: Recipe, *, stop: Event | None = None, progress: bool = True) -> TrainingSummary:
    """Run a recipe and write the adapter and `training_summary.json` to its output folder.

    Args:
        recipe: what to do.
        stop: once set, the training ends after the current step; the adapter as it then is gets
            written.
        progress: draw a bar on the error stream.

    Raises:
        DataError: rows that are refused, before anything is trained.
        ConfigError, UnsupportedError: the method's config does not fit the model.
        RecipeError: no model in the folder, or too few rows.
    """
    if not (recipe.model / "config.json").is_file():
        raise RecipeError(f"model: {recipe.model} is no model folder: it has no config.json")
    examples = load_examples(recipe.data, recipe.prompt, recipe.completion)
    if len(examples) <= recipe.eval_rows:
        raise RecipeError(f"eval_rows: {recipe.eval_rows} of {len(examples)} rows leave none")
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    sequences = tokenize_all(recipe.data, examples, tokenizer, recipe.max_len)
    cut = len(sequences) - recipe.eval_rows
    sequences, held_out = sequences[:cut], sequences[cut:]

    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=getattr(torch, recipe.dtype))
    adapter = new_adapter(model, tokenizer, recipe.config)
    if recipe.init_text is not None:
        if not isinstance(adapter, PrefixAdapter):
            raise ConfigError("init_text", "is for PREFIX_TUNING only")
        adapter.start_from_text(tokenizer(recipe.init_text)["input_ids"])

    initial = evaluate(adapter, held_out, recipe.batch_size) if held_out else None
    losses: list[float] = []
    start = time.perf_counter()
    total = num_steps(len(sequences), recipe)
    with tqdm(total=total, unit="step", disable=not progress) as bar:
        for loss in fit(adapter, sequences, recipe):
            losses.append(loss)
            bar.set_postfix(loss=f"{_mean(losses):.4f}", refresh=False)
            bar.update()
            if stop is not None and stop.is_set():
                break
    seconds = time.perf_counter() - start
    save_adapter(adapter, recipe.output, getattr(torch, recipe.save_dtype))
    final = evaluate(adapter, held_out, recipe.batch_size) if held_out else None
    summary = TrainingSummary(
        method=adapter.config.peft_type,
        base_model=adapter.config.base_model_name_or_path,
        data=recipe.data.name,
        data_sha256=hashlib.sha256(recipe.data.read_bytes()).hexdigest(),
        num_rows=len(sequences),
        num_eval_rows=len(held_out),
        steps=len(losses),
        train_loss=_rounded(_mean(losses)) if losses else None,
        initial_eval_loss=_rounded(initial),
        eval_loss=_rounded(final),
        seconds=round(seconds, 1),
        num_parameters=sum(p.numel() for p in adapter.trainable_parameters()),
        interrupted=len(losses) < total,
    )
    text = json.dumps(dataclasses.asdict(summary), indent=2)
    (recipe.output / SUMMARY_NAME).write_text(text + "\n")
    return summary


def _mean(losses: list[float]) -> float:
    last = losses[-_LAST_STEPS:]
    return sum(last) / len(last)


def _rounded(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 4)
