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

    model: Path = Field(
        description="Folder of the base model, as transformers' from_pretrained takes it."
    )
    base_model: str | None = Field(
        None,
        description="Name to record as the adapter's base model; the folder's name if not set.",
    )
    data: Path = Field(description="Training rows: .jsonl, .csv or .tsv.")
    output: Path = Field(description="Folder to write the adapter to.")
    method: dict[str, Any] = Field(
        description="The config as in PEFT's adapter_config.json: peft_type and its options."
    )
    prompt: str = Field("{prompt}", description="User message; {column} is a column of the row.")
    completion: str = Field("{completion}", description="The answer to learn; likewise.")
    init_text: str | None = Field(
        None, description="Prefix tuning: text whose keys and values the prefix starts from."
    )
    epochs: float | None = Field(
        None, gt=0, description="Passes over the data; 1 if steps is unset."
    )
    steps: int | None = Field(None, gt=0, description="Optimizer steps, instead of epochs.")
    batch_size: int = Field(8, gt=0, description="Rows per step.")
    lr: float = Field(2e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "linear", description="How the learning rate falls after the warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    max_len: int = Field(
        512, gt=1, description="Longest prompt and completion together, in tokens."
    )
    eval_rows: int = Field(0, ge=0, description="The last rows, held out to measure the loss.")
    seed: int = Field(0, ge=0, description="Decides initialization, order and dropout.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="What the frozen base computes in; the adapter is always float32."
    )
    save_dtype: Literal["float32", "float16"] = Field("float32", description="Of the written file.")
    overwrite: bool = Field(False, description="Replace an adapter that is in the output folder.")

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: dict[str, Any]) -> dict[str, Any]:
        config_from_dict(value)
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Recipe:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("epochs and steps exclude each other")
        return self

    @property
    def config(self) -> AdapterConfig:
        """The adapter's config, with the task and the base model's name in it."""
        return config_from_dict(
            {
                **self.method,
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": self.base_model or self.model.name,
            }
        )


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
