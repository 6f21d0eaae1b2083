"""A training recipe: everything that decides a run, read from YAML and flags and checked at once.

Knows names and numbers; loads neither model nor data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from peftcore.config import AdapterConfig, config_from_dict


class RecipeError(ValueError):
    """A key of the recipe is unknown, missing or wrong; the message names it."""


class Recipe(BaseModel):
    """What `polypeft-train` is told. Lengths are in tokens; `lr` is AdamW's peak learning rate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # -- what is trained
    model: str | None = Field(
        None,
        description="Base model: a folder, a GGUF file, pypi:PACKAGE or a hub id; by default "
        "SmolLM2-135M-Instruct.",
    )
    base_model: str | None = Field(
        None, description="Name to record as the adapter's base model, instead of the model's own."
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none", description="Of the frozen base; nf4 and int8 as the server quantizes it."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="What the frozen base computes in; the adapter is always float32."
    )
    task: Literal["CAUSAL_LM", "SEQ_CLS"] = Field(
        "CAUSAL_LM", description="Learn answers, or learn to classify texts."
    )
    method: dict[str, Any] = Field(
        description="The config as in PEFT's adapter_config.json: peft_type and its options."
    )
    init_text: str | None = Field(
        None, description="Prefix tuning: text whose keys and values the prefix starts from."
    )

    # -- on what
    data: str = Field(
        description="Rows: .jsonl (messages; prompt and completion; or text), .csv, .tsv, or the "
        "name of a hub data set."
    )
    data_split: str = Field("train", description="Split of a hub data set.")
    columns: list[str] | None = Field(
        None, description="Names of the columns of a table that has no header line."
    )
    prompt: str | None = Field(None, description="User message; {column} is a column of the row.")
    completion: str | None = Field(None, description="The answer to learn; likewise.")
    text: str = Field("text", description="Column of a text.")
    label: str = Field("label", description="Column of a text's class, for SEQ_CLS.")
    loss_on: Literal["answers", "everything"] = Field(
        "answers", description="The tokens that are learned, where there are answers."
    )
    max_len: int = Field(512, gt=1, description="Longest row, in tokens.")
    packing: bool = Field(
        False, description="Put short rows side by side, none attending to another."
    )
    eval_data: str | None = Field(None, description="Held-out rows, in a file of their own.")
    eval_rows: int | float = Field(
        0, ge=0, description="Or the last rows of the data, held out; below 1, that share of them."
    )

    # -- how
    epochs: float | None = Field(
        None, gt=0, description="Passes over the data; 1 if steps is unset."
    )
    steps: int | None = Field(None, gt=0, description="Optimizer steps, instead of epochs.")
    batch_size: int = Field(8, gt=0, description="Rows per batch.")
    gradient_accumulation: int = Field(1, gt=0, description="Batches per optimizer step.")
    lr: float = Field(2e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "linear", description="How the learning rate falls after the warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice to keep fewer of them."
    )
    seed: int = Field(0, ge=0, description="Decides initialization, order and dropout.")
    eval_steps: int | None = Field(
        None, gt=0, description="Measure the held-out rows every so many steps, and keep the best."
    )
    patience: int | None = Field(
        None, gt=0, description="Stop after so many evaluations in a row without an improvement."
    )
    save_steps: int | None = Field(
        None,
        gt=0,
        description="Keep a checkpoint every so many steps, to --resume from; with eval_steps "
        "there is one at every evaluation.",
    )

    # -- where to
    output: Path = Field(description="Folder to write the adapter to.")
    save_dtype: Literal["float32", "float16"] = Field("float32", description="Of the written file.")
    overwrite: bool = Field(False, description="Replace an adapter that is in the output folder.")
    resume: bool = Field(False, description="Go on from the output folder's last checkpoint.")
    upload: str | None = Field(
        None, description="URL of a polypeft server to upload the adapter to."
    )
    name: str | None = Field(None, description="Its name there; by default the output folder's.")
    api_key: str | None = Field(
        None, repr=False, description="Key for the upload; or POLYPEFT_API_KEY."
    )

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: dict[str, Any]) -> dict[str, Any]:
        config_from_dict(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("epochs and steps exclude each other")
        if self.eval_rows >= 1 and self.eval_rows != int(self.eval_rows):
            raise ValueError("eval_rows is a number of rows, or a share below 1")
        if self.eval_data is not None and self.eval_rows:
            raise ValueError("eval_data and eval_rows exclude each other")
        held_out = self.eval_data is not None or self.eval_rows > 0
        for name in ("eval_steps", "patience"):
            if getattr(self, name) is not None and not held_out:
                raise ValueError(f"{name} needs held-out rows: set eval_rows or eval_data")
        if None not in (self.save_steps, self.eval_steps) and self.save_steps != self.eval_steps:
            raise ValueError("save_steps: with eval_steps there is a checkpoint at each evaluation")
        if self.patience is not None and self.eval_steps is None:
            raise ValueError("patience needs eval_steps")
        if self.packing and (self.task != "CAUSAL_LM" or self.config.is_prompt_learning):
            raise ValueError(
                "packing: only for CAUSAL_LM, and not for methods that put a prompt before the row"
            )
        if self.name is not None and self.upload is None:
            raise ValueError("name is for upload only")
        return self

    @property
    def config(self) -> AdapterConfig:
        """The adapter's config, with the task in it."""
        return config_from_dict({**self.method, "task_type": self.task})


def load_recipe(path: str | Path | None, overrides: Mapping[str, Any]) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file; None where the flags say everything. Relative paths in it are relative
            to the working directory.
        overrides: values that win over the file's; those of `method` are merged into its options,
            unless they name another `peft_type`.

    Raises:
        RecipeError: the file is no YAML mapping, or a key is unknown, missing or wrong.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
            raise RecipeError(f"{path}: {exc}") from None
        if not isinstance(loaded, dict):
            raise RecipeError(f"{path}: a mapping of recipe keys is expected")
        values = loaded
    method = values.get("method") or {}
    new = overrides.get("method") or {}
    if isinstance(method, dict) and new.get("peft_type") in (None, method.get("peft_type")):
        new = {**method, **new}
    values = {**values, **overrides, "method": new or method}
    if "epochs" in overrides or "steps" in overrides:  # the flag's unit replaces the file's
        values = {k: v for k, v in values.items() if k not in ("epochs", "steps") or k in overrides}
    try:
        return Recipe(**values)
    except ValidationError as exc:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg'].removeprefix('Value error, ')}"
            for e in exc.errors()
        ]
        known = f"Known keys: {', '.join(Recipe.model_fields)}"
        if any(e["type"] in ("extra_forbidden", "missing") for e in exc.errors()):
            problems.append(known)
        raise RecipeError("\n".join(problems)) from None
