"""A recipe carried out: data, base, adapter, training, files."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from peftcore.config import CONFIG_NAME, AdapterConfig
from peftcore.errors import ConfigError
from peftcore.methods.prefix_tuning import Prefix
from peftcore.methods.prompt_learning import fit_ids
from peftcore.model import PeftModel, get_peft_model
from peftcore.quant import quantize_model
from peftcore.sources import ModelSourceError, resolve_model
from peftcore.train.collate import padded, side_by_side
from peftcore.train.recipe import Recipe, RecipeError
from peftcore.train.report import TrainingSummary, draw_curve, peak_memory, sha256_of
from peftcore.train.rows import DataError, read_rows
from peftcore.train.samples import Reading, Sample, labels_of, make_samples, packed
from peftcore.train.trainer import AdapterTrainer, Progress, RankAllocation, StopWhenAsked

#: In the output folder: checkpoints, which also hold the optimizer's state; TensorBoard's events.
CHECKPOINTS = "checkpoints"
EVENTS = "events"

#: The reported training loss is the mean over this many last steps.
_LAST_STEPS = 50


@dataclass
class Data:
    """The rows in tokens, and the classes where they are classified."""

    train: list[Sample]
    held_out: list[Sample]
    labels: list[str] | None
    sha256: str


def train(
    recipe: Recipe, *, stop: StopWhenAsked | None = None, progress: bool = True
) -> TrainingSummary:
    """Carry out a recipe: the adapter, `training_summary.json`, `loss.png` and TensorBoard's events
    are in its output folder afterwards.

    Args:
        recipe: what to do.
        stop: once asked, the training ends after the current step; the adapter as it then is gets
            written, and a checkpoint to resume from.
        progress: draw a bar on the error stream.

    Raises:
        DataError: rows that are refused, before anything is loaded.
        ConfigError, UnsupportedError: the method's config does not fit the model.
        RecipeError: no such model, too few rows, or nothing to resume from.
    """
    check_output(recipe)
    checkpoint = _checkpoint(recipe)
    try:
        source = resolve_model(recipe.model)
    except ModelSourceError as exc:
        raise RecipeError(f"model: {exc}") from None
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    data = load_data(recipe, tokenizer, model_context(source.path, tokenizer))
    if checkpoint is None:  # what an earlier run left
        for name in (CHECKPOINTS, EVENTS):
            shutil.rmtree(recipe.output / name, ignore_errors=True)

    set_seed(recipe.seed)
    base = load_base(recipe, source.path, data.labels)
    model = get_peft_model(base, adapter_config(recipe, source.path))
    name = recipe.base_model or source.name
    if recipe.init_text is not None:
        start_prefix_from_text(model, tokenizer(recipe.init_text)["input_ids"])

    stop = stop or StopWhenAsked()
    trainer = _trainer(recipe, model, data, tokenizer, stop, progress)
    initial = _evaluated(trainer, data)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started

    save(model, recipe, name)
    final = _evaluated(trainer, data)
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e][-_LAST_STEPS:]
    tokens = getattr(trainer, "num_tokens", 0) or _tokens(data.train, trainer.state.epoch)
    summary = TrainingSummary(
        method=model.peft_type,
        base_model=name,
        base_sha256=sha256_of(sorted(source.path.glob("*.safetensors"))),
        quantization=recipe.quantization,
        data=Path(recipe.data).name,
        data_sha256=data.sha256,
        num_rows=len(data.train),
        num_eval_rows=len(data.held_out),
        steps=trainer.state.global_step,
        train_loss=round(float(np.mean(losses)), 4) if losses else None,
        initial_eval=initial,
        final_eval=final,
        seconds=round(seconds, 1),
        tokens_per_second=round(tokens / seconds, 1),
        peak_memory_bytes=peak_memory(),
        num_parameters=model.get_nb_trainable_parameters()[0],
        interrupted=stop.asked,
        labels=data.labels,
        versions={n: importlib.metadata.version(n) for n in ("torch", "transformers", "polypeft")},
    )
    summary.write(recipe.output)
    draw_curve(trainer.state.log_history, recipe.output)
    if not stop.asked and recipe.save_steps is None:
        shutil.rmtree(recipe.output / CHECKPOINTS, ignore_errors=True)
    return summary


def check_output(recipe: Recipe) -> None:
    """Raises RecipeError where the output folder holds what may not be replaced."""
    if recipe.overwrite or recipe.resume:
        return
    if (recipe.output / CONFIG_NAME).exists():
        what = "an adapter"
    elif _last_checkpoint(recipe) is not None:
        what = "an unfinished run"
    else:
        return
    raise RecipeError(
        f"output: {recipe.output} holds {what}; --overwrite replaces it, "
        "--resume goes on training it"
    )


def load_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> Data:
    """Raises DataError for rows that are refused, RecipeError where too few are left."""
    rows = read_rows(recipe.data, recipe.data_split, recipe.columns)
    reading = Reading(
        prompt=recipe.prompt,
        completion=recipe.completion,
        text=recipe.text,
        label=recipe.label,
        everything=recipe.loss_on == "everything",
        max_len=recipe.max_len,
        context=context and context - recipe.method.get("num_virtual_tokens", 0),
    )
    labels = labels_of(rows, recipe.label) if recipe.task == "SEQ_CLS" else None
    samples = make_samples(recipe.data, rows, tokenizer, reading, labels)
    if labels is not None and len(labels) < 2:
        raise DataError(recipe.data, [(1, f"every row has the {recipe.label} {labels[0]!r}")])
    if recipe.eval_data is not None:
        others = read_rows(recipe.eval_data, recipe.data_split, recipe.columns)
        held_out = make_samples(recipe.eval_data, others, tokenizer, reading, labels)
    else:
        share = 0 < recipe.eval_rows < 1
        count = math.ceil(recipe.eval_rows * len(samples)) if share else int(recipe.eval_rows)
        if len(samples) <= count:
            raise RecipeError(f"eval_rows: {count} of {len(samples)} rows leave none")
        cut = len(samples) - count
        samples, held_out = samples[:cut], samples[cut:]
    if Path(recipe.data).is_file():
        digest = sha256_of([Path(recipe.data)])
    else:
        text = json.dumps([r.values for r in rows], sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
    return Data(samples, held_out, labels, digest)


def model_context(path: Path, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest sequence that the model in the folder has positions for."""
    config = AutoConfig.from_pretrained(path).get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    return min(stated, tokenizer.model_max_length) if isinstance(stated, int) else None


def load_base(recipe: Recipe, path: Path, labels: list[str] | None) -> PreTrainedModel:
    """The frozen base, quantized as the server quantizes it."""
    dtype = getattr(torch, recipe.dtype)
    if labels is None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=dtype,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={name: i for i, name in enumerate(labels)},
        )
        config = model.config.get_text_config()
        if config.pad_token_id is None:
            end = config.eos_token_id
            config.pad_token_id = (end[0] if isinstance(end, list) else end) or 0
    if torch.cuda.is_available():
        nn.Module.cuda(model)
    quantize_model(model, recipe.quantization)
    return model


def adapter_config(recipe: Recipe, path: Path) -> AdapterConfig:
    """The adapter's config; its tokenizer, where it needs one, is the base's."""
    config = recipe.config
    config.base_model_name_or_path = str(path)
    if getattr(config, "prompt_tuning_init", None) == "TEXT":
        config = dataclasses.replace(config, tokenizer_name_or_path=str(path))  # type: ignore[call-arg]
    return config


def start_prefix_from_text(model: PeftModel, ids: list[int]) -> None:
    """Let a prefix start from the keys and values that the base computes for a text.

    Far closer to a useful prefix than PEFT's random rows, which at first drown the prompt.

    Args:
        ids: the text's tokens; cut, or repeated and cut, to the number of virtual tokens.

    Raises:
        ConfigError: the adapter is no prefix, or a projected one.
    """
    prompt = model.prompt_encoder[model.active_adapter] if model.prompt_encoder else None
    if not isinstance(prompt, Prefix) or prompt.transform is not None:
        raise ConfigError("init_text", "is for PREFIX_TUNING without projection only")
    ids = fit_ids(ids, prompt.num_virtual_tokens, "init_text")
    with torch.no_grad(), model.disable_adapter():
        cache = model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values
        # Per layer [2, heads, n, head_dim], then [n, layers, 2, heads, head_dim].
        kv = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        rows = torch.stack(kv).permute(3, 0, 1, 2, 4).flatten(1)
        prompt.embedding.weight.copy_(rows)


def _trainer(
    recipe: Recipe,
    model: PeftModel,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    stop: StopWhenAsked,
    progress: bool,
) -> Trainer:
    every = recipe.eval_steps or recipe.save_steps
    arguments = TrainingArguments(
        output_dir=str(recipe.output / CHECKPOINTS),
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        num_train_epochs=recipe.epochs or 1.0,
        max_steps=recipe.steps or -1,
        learning_rate=recipe.lr,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        activation_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        logging_steps=1,
        eval_strategy="steps" if recipe.eval_steps else "no",
        eval_steps=recipe.eval_steps,
        save_strategy="steps" if every else "no",
        save_steps=every or 500,
        save_total_limit=3,
        load_best_model_at_end=recipe.eval_steps is not None,
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        label_names=["labels"],
        train_sampling_strategy="random" if recipe.packing else "group_by_length",
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=not progress,
    )
    callbacks: list[TrainerCallback] = [stop, *_tensorboard(recipe.output / EVENTS)]
    if recipe.patience is not None:
        callbacks.append(EarlyStoppingCallback(recipe.patience))
    if model.peft_type == "ADALORA":
        callbacks.append(RankAllocation())
    pad_id = tokenizer.pad_token_id or 0
    if data.labels is not None:  # a decoder finds a row's last token by the padding's id
        pad_id = model.config.get_text_config().pad_token_id or 0
    rows, held_out = [[s.features() for s in part] for part in (data.train, data.held_out)]
    if recipe.packing:
        groups = packed(data.train, recipe.max_len, recipe.seed)
        rows = [{"samples": [s.features() for s in group]} for group in groups]
        held_out = [{"samples": [features]} for features in held_out]
    options: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": Dataset.from_list(rows),
        "eval_dataset": Dataset.from_list(held_out) if held_out else None,
        "data_collator": partial(side_by_side if recipe.packing else padded, pad_id=pad_id),
        "callbacks": callbacks,
    }
    if data.labels is None:
        trainer: Trainer = AdapterTrainer(**options)
    else:
        trainer = Trainer(**options, compute_metrics=_accuracy)
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress())
    return trainer


def _accuracy(prediction: Any) -> dict[str, float]:
    right = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


def _tensorboard(folder: Path) -> list[TrainerCallback]:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder)))]


def _evaluated(trainer: Trainer, data: Data) -> dict[str, float] | None:
    if not data.held_out:
        return None
    metrics = trainer.evaluate()
    names = ("eval_loss", "eval_accuracy")
    return {n.removeprefix("eval_"): round(metrics[n], 4) for n in names if n in metrics}


def _checkpoint(recipe: Recipe) -> str | None:
    """The checkpoint to go on from; None for a new start.

    Raises RecipeError where there should be one and is none.
    """
    if not recipe.resume:
        return None
    last = _last_checkpoint(recipe)
    if last is None:
        folder = recipe.output / CHECKPOINTS
        raise RecipeError(f"resume: {folder} holds no checkpoint (save_steps makes them)")
    return last


def _last_checkpoint(recipe: Recipe) -> str | None:
    folder = recipe.output / CHECKPOINTS
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _tokens(samples: list[Sample], epochs: float | None) -> float:
    return sum(map(len, samples)) * (epochs or 0.0)


def save(model: PeftModel, recipe: Recipe, base_name: str) -> None:
    """Write the adapter in its files, in `save_dtype`, under its base's name."""
    config = model.peft_config[model.active_adapter]
    names: dict[str, Any] = {"base_model_name_or_path": base_name}
    if getattr(config, "tokenizer_name_or_path", None):
        names["tokenizer_name_or_path"] = base_name
    model.peft_config[model.active_adapter] = dataclasses.replace(config, **names)
    model.save_pretrained(recipe.output, dtype=getattr(torch, recipe.save_dtype))
    if recipe.task == "SEQ_CLS":  # its id2label: no adapter's own files hold that
        model.get_base_model().config.save_pretrained(recipe.output)
