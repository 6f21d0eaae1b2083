"""How fast does it train, and in how much memory? `python -m loadtests.training`

Two comparisons, over a float32 base, and over one in nf4 that computes in bfloat16:

    one adapter     a LoRA under transformers' Trainer: HF peft's model, and ours in its place; and
                    ours under the trainer of polypeft-train
    joint           four adapters of four kinds, a batch of one sample each: all in one batch, the
                    same four one after another, and HF peft's four one after another

Every contender runs in a process of its own, contenders alternate, and the median over the rounds
counts. Tokens are those of the samples: no padding, no virtual tokens. The losses of the contenders
are compared too: what is faster must compute the same. HF peft is a tool of the test suite's; where
it is not installed its rows are left out.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import peftcore
from peftcore.quant import quantize_model
from peftcore.sources import resolve_model
from peftcore.train.joint import Job, JointTrainer
from peftcore.train.trainer import AdapterTrainer

Rows = list[dict[str, list[int]]]

#: 128 rows of GSM8K (Cobbe et al. 2021, arXiv:2110.14168; MIT licence).
_DATA = Path(__file__).parent / "gsm8k.jsonl"

#: Of the joint comparison: options of a LoraConfig, or of an IA3Config.
_FOUR: dict[str, dict[str, Any]] = {
    "lora-r8": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "lora-r16": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "ia3": {},
    "dora-r8": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "use_dora": True},
}

#: What a base is kept in, if quantized, and what it computes in.
_BASES = ["fp32", "bf16", "nf4-fp32", "nf4-bf16"]

#: Of each comparison; the first is what the others are compared with. "peft" and "ours" have the
#: same base, quantized by bitsandbytes' layers, and transformers' own Trainer; "ours-trained" has
#: the trainer of polypeft-train in its place. The others have the base as ours is quantized.
_CONTENDERS = {
    "single": ["peft", "ours", "ours-trained", "ours-resident"],
    "joint": ["one-after-another", "joint", "peft-one-after-another"],
}


# -- in the child ----------------------------------------------------------------------------------


def read_rows(args: argparse.Namespace, folder: Path) -> Rows:
    """The data in tokens; the prompt's labels are -100."""
    path = Path(args.data)
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            raw = [json.loads(line) for line in file if line.strip()]
        else:
            raw = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows: Rows = []
    for row in raw[: args.rows]:
        prompt, completion = args.prompt.format(**row), args.completion.format(**row)
        if args.template:
            user = {"role": "user", "content": prompt}
            answer = {"role": "assistant", "content": completion}
            template = tokenizer.apply_chat_template
            prompt = str(template([user], tokenize=False, add_generation_prompt=True))
            whole = str(template([user, answer], tokenize=False))
        else:
            whole = prompt + completion
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"][: args.max_len]
        num_prompt = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if num_prompt < len(ids):
            rows.append({"input_ids": ids, "labels": [-100] * num_prompt + ids[num_prompt:]})
    return rows


def load(folder: Path, base: str, by_bitsandbytes: bool) -> PreTrainedModel:
    quantization, _, computed_in = base.rpartition("-")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[computed_in]
    options: dict[str, Any] = {"dtype": dtype}
    if quantization == "nf4" and by_bitsandbytes:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if quantization == "nf4" and not by_bitsandbytes:
        quantize_model(model, "nf4")
    return model


def collate(rows: Rows) -> dict[str, Tensor]:
    """Padded on the right."""
    pad = nn.utils.rnn.pad_sequence
    ids = [torch.tensor(r["input_ids"]) for r in rows]
    labels = [torch.tensor(r["labels"]) for r in rows]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


class Clock(transformers.TrainerCallback):
    """When the training began, and each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def hf_train(
    model: nn.Module,
    rows: Rows,
    args: argparse.Namespace,
    batch_size: int,
    steps: int,
    autocast: bool = False,
    trainer_class: type[transformers.Trainer] = transformers.Trainer,
) -> tuple[list[float], list[float]]:
    """Train under transformers' Trainer, in the rows' order: losses, and when each step ended."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch_size, max_steps=steps,
            learning_rate=args.learning_rate, lr_scheduler_type="constant", logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False, train_sampling_strategy="sequential",
            bf16=autocast,
        )  # fmt: skip
        trainer = trainer_class(
            model=model, args=arguments, train_dataset=rows, data_collator=collate,
            callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, clock.ends


def num_tokens(rows: Rows) -> int:
    return sum(len(r["input_ids"]) for r in rows)


def run_single(args: argparse.Namespace, folder: Path, rows: Rows) -> dict[str, Any]:
    package: Any = importlib.import_module("peft") if args.contender == "peft" else peftcore
    model = load(folder, args.base, args.contender != "ours-resident")
    config = package.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    adapted = package.get_peft_model(model, config)
    size, total = args.batch_size, args.warmup_steps + args.steps
    used = [rows[i % len(rows)] for i in range(size * total)]
    trainer = AdapterTrainer if args.contender == "ours-trained" else transformers.Trainer
    losses, ends = hf_train(adapted, used, args, size, total, trainer_class=trainer)
    seconds = ends[-1] - ends[args.warmup_steps]
    return {
        "tokens_per_s": num_tokens(used[size * args.warmup_steps :]) / seconds,
        "losses": {"lora": losses},
    }


def run_joint(args: argparse.Namespace, folder: Path, rows: Rows) -> dict[str, Any]:
    """Four adapters over one base; the base is loaded, and warmed up, before the clock starts."""
    by_peft = args.contender.startswith("peft")
    package: Any = importlib.import_module("peft") if by_peft else peftcore
    data = {
        name: [rows[(4 * j + i) % len(rows)] for j in range(args.steps)]
        for i, name in enumerate(_FOUR)
    }

    def config(name: str) -> Any:
        make = package.IA3Config if name == "ia3" else package.LoraConfig
        return make(**_FOUR[name], task_type="CAUSAL_LM")

    def job(name: str) -> Job:
        return Job(
            adapter_name=name, dataset=data[name], batch_size=1, max_steps=args.steps,
            learning_rate=args.learning_rate, lr_scheduler="constant",
        )  # fmt: skip

    losses: dict[str, list[float]] = {}
    seconds = 0.0
    if by_peft:
        for name in ["warm-up", *_FOUR]:
            torch.manual_seed(0)
            made = config("lora-r8" if name == "warm-up" else name)
            # Loaded anew, not timed: peft cannot take an IA3 off a base in 4 bits.
            adapted = package.get_peft_model(load(folder, args.base, True), made)
            steps = args.warmup_steps if name == "warm-up" else args.steps
            # peft's IA3 over a base in bfloat16 works under autocast only.
            autocast = args.base.endswith("bf16")
            rows = data.get(name, data["lora-r8"])
            found, ends = hf_train(adapted, rows, args, 1, steps, autocast)
            if name != "warm-up":
                losses[name] = found
                seconds += ends[-1] - ends[0]
            del adapted
            gc.collect()
    else:
        model = load(folder, args.base, False)
        adapted = None
        for name in ["warm-up", *_FOUR]:
            torch.manual_seed(0)
            made = config("lora-r8" if name == "warm-up" else name)
            if adapted is None:
                adapted = peftcore.get_peft_model(model, made, name)
            else:
                adapted.add_adapter(name, made)
        assert adapted is not None
        warm_up = Job(
            adapter_name="warm-up", dataset=data["lora-r8"], batch_size=1,
            max_steps=args.warmup_steps,
        )  # fmt: skip
        list(JointTrainer(adapted, [warm_up]).train())
        groups = [[name] for name in _FOUR]
        if args.contender == "joint":
            groups = [list(_FOUR)]
        for names in groups:
            start = time.perf_counter()
            trainer = JointTrainer(adapted, [job(name) for name in names])
            for _ in trainer.train():
                pass
            seconds += time.perf_counter() - start
            for name in names:
                progress = trainer.progress[name]
                assert progress.status == "finished", progress.reason
                losses[name] = progress.losses
    tokens = sum(map(num_tokens, data.values()))
    return {"tokens_per_s": tokens / seconds, "losses": losses}


def child(args: argparse.Namespace) -> None:
    """One contender, in this process; JSON to stdout."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    folder = resolve_model(args.model).path
    rows = read_rows(args, folder)
    gc.collect()
    result = (run_single if args.comparison == "single" else run_joint)(args, folder, rows)
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result["mean_row_tokens"] = num_tokens(rows) / len(rows)
    print(json.dumps(result))


# -- in the parent ---------------------------------------------------------------------------------


def run_child(argv: Sequence[str], comparison: str, base: str, contender: str) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "loadtests.training", *argv,
        "--child", comparison, base, contender,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{comparison} {base} {contender}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def largest_difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> float | None:
    pairs = [abs(a - b) for name in one for a, b in zip(one[name], other[name], strict=False)]
    return max(pairs) if pairs else None


def compare(
    argv: Sequence[str], args: argparse.Namespace, comparison: str, base: str
) -> list[dict[str, Any]]:
    contenders = _CONTENDERS[comparison]
    if "nf4" not in base:  # there they are one
        contenders = [c for c in contenders if c != "ours-resident"]
    if importlib.util.find_spec("peft") is None:
        contenders = [c for c in contenders if not c.startswith("peft")]
    found: dict[str, list[dict[str, Any]]] = {c: [] for c in contenders}
    for round_ in range(args.repeats):
        order = contenders if round_ % 2 == 0 else contenders[::-1]
        for contender in order:
            found[contender].append(run_child(argv, comparison, base, contender))
    first = found[contenders[0]]
    rows = []
    for contender, runs in found.items():
        speed = statistics.median(r["tokens_per_s"] for r in runs)
        rows.append(
            {
                "comparison": comparison,
                "base": base,
                "contender": contender,
                "tokens_per_s": speed,
                "all_tokens_per_s": [r["tokens_per_s"] for r in runs],
                "ratio": speed / statistics.median(r["tokens_per_s"] for r in first),
                "peak_rss_mib": statistics.median(r["peak_rss_mib"] for r in runs),
                "largest_loss_difference": largest_difference(
                    first[0]["losses"], runs[0]["losses"]
                ),
                "last_losses": {k: v[-1] for k, v in runs[0]["losses"].items() if v},
                "mean_row_tokens": runs[0]["mean_row_tokens"],
            }
        )
    return rows


def machine(args: argparse.Namespace) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return {
        "processor": name,
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    titles = ("comparison", "base", "contender", "tokens/s", "ratio", "peak MiB", "loss diff.")
    print("{:<11} {:<9} {:<23} {:>9} {:>6} {:>9} {:>11}".format(*titles))
    for r in rows:
        difference = r["largest_loss_difference"]
        print(
            f"{r['comparison']:<11} {r['base']:<9} {r['contender']:<23} {r['tokens_per_s']:>9.1f} "
            f"{r['ratio']:>6.2f} {r['peak_rss_mib']:>9.0f} "
            + ("          -" if difference is None else f"{difference:>11.1e}")
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="as polypeft-serve's; the default model by default")
    parser.add_argument("--data", default=str(_DATA), help=".jsonl, .csv or .tsv")
    parser.add_argument("--prompt", default="{question}", help="{column} is a column of the row")
    parser.add_argument("--completion", default="{answer}", help="likewise")
    parser.add_argument(
        "--template",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="through the model's chat template, or one text after the other",
    )
    parser.add_argument("--rows", type=int, default=128, help="of the data, from the first")
    parser.add_argument("--max-len", type=int, default=512, help="longer rows are cut, in tokens")
    parser.add_argument(
        "--comparisons", nargs="+", choices=list(_CONTENDERS), default=list(_CONTENDERS)
    )
    parser.add_argument("--bases", nargs="+", choices=_BASES, default=["fp32", "nf4-bf16"])
    parser.add_argument("--rank", type=int, default=16, help="of the single adapter")
    parser.add_argument("--batch-size", type=int, default=4, help="of the single adapter")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each adapter")
    parser.add_argument("--warmup-steps", type=int, default=2, help="not timed, at least 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", help="write JSON here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given)
    if args.child:
        args.comparison, args.base, args.contender = args.child
        child(args)
        return
    about = machine(args)
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    rows = []
    for comparison in args.comparisons:
        for base in args.bases:
            found = compare(given, args, comparison, base)
            show(found)
            rows += found
    result = {"machine": about, "arguments": vars(args), "results": rows}
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
