"""`polypeft-train`: a recipe, flags, or both, made into an adapter's folder."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any

import yaml

from peftcore.config import CONFIG_NAME, supported_methods
from peftcore.errors import AdapterError
from peftcore.train.data import DataError
from peftcore.train.recipe import Recipe, RecipeError, load_recipe
from peftcore.train.trainer import train

_DESCRIPTION = """\
Train an adapter on a frozen base model and write it in PEFT's own files.

Everything can stand in a YAML recipe, whose keys are the flags below without their dashes (with _
for -), or be given as flags, which win over the recipe:

  polypeft-train recipe.yaml --model MODEL_FOLDER --data rows.jsonl --output my-adapter
  polypeft-train --model MODEL_FOLDER --data rows.csv --output my-adapter \\
      --prompt 'Summarize: {text}' --completion '{summary}' --method LORA --set r=16 --epochs 2

A row is one user message and the answer to learn; both go through the model's chat template, and
only the answer's tokens are in the loss. Ctrl-C stops early and keeps the adapter as it is."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "polypeft-train",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="YAML recipe")
    for name, field in Recipe.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if name == "method":
            parser.add_argument(flag, help=f"One of {', '.join(supported_methods())}.")
            parser.add_argument(
                "--set",
                action="append",
                default=[],
                metavar="OPTION=VALUE",
                help="An option of the method as in PEFT's config, its value in YAML; repeatable.",
            )
        elif name == "overwrite":
            parser.add_argument(flag, action="store_true", default=None, help=field.description)
        else:
            default = "" if field.default is None or field.is_required() else f" [{field.default}]"
            help_text = f"{field.description}{default}".replace("%", "%%")
            parser.add_argument(flag, metavar=name.upper(), help=help_text)
    return parser


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, as recipe keys."""
    given = {k: v for k, v in vars(arguments).items() if v is not None and k in Recipe.model_fields}
    method: dict[str, Any] = {"peft_type": given.pop("method")} if "method" in given else {}
    for option in arguments.set:
        name, equals, value = option.partition("=")
        if not equals:
            raise RecipeError(f"--set {option}: OPTION=VALUE is expected")
        try:
            method[name] = yaml.safe_load(value)
        except yaml.YAMLError as exc:
            raise RecipeError(f"--set {option}: {exc}") from None
    return {**given, "method": method} if method else given


@contextmanager
def _stop_on_interrupt() -> Iterator[Event]:
    """Within, the first Ctrl-C sets the event; a second one interrupts as usual."""
    stop = Event()

    def handle(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exits 0 when done, 1 where something is refused, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        recipe = load_recipe(arguments.recipe, _overrides(arguments))
        if (recipe.output / CONFIG_NAME).exists() and not recipe.overwrite:
            raise RecipeError(f"output: {recipe.output} holds an adapter; --overwrite replaces it")
        with _stop_on_interrupt() as stop:
            summary = train(recipe, stop=stop)
    except (RecipeError, DataError, AdapterError, OSError) as exc:
        sys.exit(f"polypeft-train: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps(vars(summary), indent=2))
    if summary.interrupted:
        sys.exit(130)
