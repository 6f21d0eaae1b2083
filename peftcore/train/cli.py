"""`polypeft-train`: a recipe, flags, or both, made into an adapter's folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import yaml

from peftcore.config import supported_methods
from peftcore.errors import AdapterError
from peftcore.train.recipe import Recipe, RecipeError, load_recipe
from peftcore.train.rows import DataError
from peftcore.train.upload import UploadError, upload

if TYPE_CHECKING:
    from peftcore.train.trainer import StopWhenAsked

#: Of the extra `train`: looked for before anything is trained.
_NEEDED = ("datasets", "tensorboard", "matplotlib")

_DESCRIPTION = """\
Train an adapter on a frozen base model and write it in PEFT's own files.

Everything can stand in a YAML recipe, whose keys are the flags below without their dashes (with _
for -), or be given as flags, which win over the recipe:

  polypeft-train recipe.yaml --data rows.jsonl --output my-adapter
  polypeft-train --data rows.csv --prompt 'Summarize: {text}' --completion '{summary}' \\
      --method LORA --set r=16 --epochs 2 --output my-adapter
  polypeft-train --data chats.jsonl --method IA3 --quantization nf4 --packing \\
      --output my-adapter --upload http://127.0.0.1:8000 --name mine
  polypeft-train --model folder/of/a/bert --task SEQ_CLS --data texts.tsv --label class \\
      --method LORA --eval-rows 500 --output classifier

Rows are JSON lines (messages in OpenAI's form, of which the assistant's turns are learned; prompt
and completion; or text) or a table. They go through the model's chat template, and all are checked
before the model is loaded. Ctrl-C stops after the step and keeps the adapter as it is, and a
checkpoint that --resume goes on from.

The output folder gets the adapter, training_summary.json, loss.png and events for TensorBoard
(tensorboard --logdir OUTPUT/events)."""


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
            continue
        default = "" if field.default is None or field.is_required() else f" [{field.default}]"
        help_text = f"{field.description}{default}".replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=field.description
            )
        elif name == "columns":
            parser.add_argument(flag, nargs="+", metavar="NAME", help=help_text)
        else:
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
def _stop_on_interrupt(stop: StopWhenAsked) -> Iterator[None]:
    """Within, the first Ctrl-C asks to stop; a second one interrupts as usual."""

    def handle(*_: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        print("stopping after this step; Ctrl-C again to stop now", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exits 0 when done, 1 where something is refused, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        recipe = load_recipe(arguments.recipe, _overrides(arguments))
        missing = [name for name in _NEEDED if find_spec(name) is None]
        if missing:
            raise RecipeError(f"{missing[0]} is not installed: pip install 'polypeft[train]'")
        from peftcore.train.run import train
        from peftcore.train.trainer import StopWhenAsked

        stop = StopWhenAsked()
        with _stop_on_interrupt(stop):
            summary = train(recipe, stop=stop)
        print(json.dumps(dataclasses.asdict(summary), indent=2))
        if summary.interrupted:
            sys.exit(130)
        if recipe.upload is not None:
            name = recipe.name or recipe.output.resolve().name
            try:
                digest = upload(recipe.output, recipe.upload, name, recipe.api_key)
            except UploadError as exc:
                sys.exit(f"polypeft-train: {exc}; the adapter is in {recipe.output}")
            print(f"uploaded as {name} ({digest})", file=sys.stderr)
    except (RecipeError, DataError, AdapterError, OSError) as exc:
        sys.exit(f"polypeft-train: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)
