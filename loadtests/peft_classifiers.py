"""HF peft's side of a load test of classifiers: makes them, and answers the same texts by a loop.

One model of transformers a classifier, all of which share the encoder's weights, in float32. HF
peft is a tool of the test suite's and is imported in a process of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

#: Methods in turn: peft's class, and its options for a BERT encoder.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 8, "target_modules": ["query", "value"]}),
    "dora": ("LoraConfig", {"r": 8, "target_modules": ["query", "value"], "use_dora": True}),
    "ia3": ("IA3Config", {}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 8}),
    "norms": ("LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "lora-all": ("LoraConfig", {"r": 16, "target_modules": "all-linear"}),
    "loha": ("LoHaConfig", {"r": 4, "target_modules": ["query", "value"]}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 8}),
    "oft": ("OFTConfig", {"oft_block_size": 32, "target_modules": ["query", "value"]}),
    "adalora": (
        "AdaLoraConfig",
        {"init_r": 8, "target_modules": ["query", "key"], "total_step": 9},
    ),
}

#: Most labels of a classifier; there are at least two.
MAX_LABELS = 6
_MAX_SECONDS = 300
#: Standard deviations of what is added to trained weights; a head's tell texts apart.
_NOISE, _HEAD_NOISE = 0.05, 0.5


def num_labels_of(number: int) -> int:
    """Of classifier `number`."""
    return 2 + number % (MAX_LABELS - 1)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in a new process.

    Args:
        job: `model`, a folder; `adapters`, classifier → folder, in order; and `make: true` to write
            them, or `requests`, pairs of a classifier's name and a text, with `num_threads` and the
            `quantization` of the server that is compared.

    Returns:
        of requests `probs`, each one's over the float encoder; `quantized_probs`, the same over one
        whose weights have the quantized ones' values (None without quantization); and `seconds` of
        the loop over the float one, and of one with a padded batch for each classifier.
    """
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.peft_classifiers"],
        input=json.dumps(job), stdout=subprocess.PIPE, text=True, timeout=_MAX_SECONDS,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"peft's process ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Classifiers:
    """transformers' classifiers around one encoder's weights."""

    def __init__(self, model: str) -> None:
        self._folder = model
        self._encoder = AutoModel.from_pretrained(model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def quantize(self, quantization: str) -> None:
        """Give the weights of every model the values that bitsandbytes' codes of them have."""
        bnb: Any = importlib.import_module("bitsandbytes").functional
        for module in self._encoder.modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            weight = module.weight.data
            if quantization == "nf4":
                codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
                weight.copy_(bnb.dequantize_4bit(codes, state))
            else:
                codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
                weight.copy_(bnb.int8_vectorwise_dequant(codes, absmax))

    def model(self, number: int) -> Any:
        """Classifier `number` without its adapter; its head is random."""
        torch.manual_seed(number)
        config = transformers.AutoConfig.from_pretrained(
            self._folder, num_labels=num_labels_of(number)
        )
        model = AutoModelForSequenceClassification.from_config(config)
        model.base_model.load_state_dict(self._encoder.state_dict(), assign=True)
        return model.eval()


def make(classifiers: Classifiers, adapters: dict[str, str]) -> None:
    """Write classifiers whose weights matter, the methods in turn."""
    peft: Any = importlib.import_module("peft")
    for number, folder in enumerate(adapters.values()):
        kind, options = list(METHODS.values())[number % len(METHODS)]
        config = getattr(peft, kind)(task_type="SEQ_CLS", **options)
        wrapped = peft.get_peft_model(classifiers.model(number), config)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                scale = _HEAD_NOISE if "classifier" in name else _NOISE
                parameter.data = parameter.data + torch.randn_like(parameter) * scale
        wrapped.save_pretrained(folder)


@torch.inference_mode()
def answer(
    classifiers: Classifiers,
    adapters: dict[str, str],
    requests: Sequence[tuple[str, str]],
    quantization: str,
) -> dict[str, Any]:
    """Every request's probabilities, and how long both loops take."""
    peft: Any = importlib.import_module("peft")
    models = {
        name: peft.PeftModel.from_pretrained(classifiers.model(number), folder).eval()
        for number, (name, folder) in enumerate(adapters.items())
    }

    def one(name: str, texts: Sequence[str]) -> list[list[float]]:
        given = classifiers.tokenizer(list(texts), return_tensors="pt", padding=True)
        logits = models[name](**given).logits
        found: list[list[float]] = logits.softmax(dim=-1).tolist()
        return found

    for name, text in requests[: len(models)]:
        one(name, [text])  # warms up
    start = time.perf_counter()
    probs = [one(name, [text])[0] for name, text in requests]
    alone = time.perf_counter() - start
    start = time.perf_counter()
    for name in models:
        own = [text for other, text in requests if other == name]
        if own:
            one(name, own)
    found = {"probs": probs, "seconds": [alone, time.perf_counter() - start]}
    quantized = None
    if quantization != "none":
        classifiers.quantize(quantization)
        quantized = [one(name, [text])[0] for name, text in requests]
    return found | {"quantized_probs": quantized}


def main() -> None:
    """In the child: a job from stdin, what `run` returns to stdout."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    job = json.load(sys.stdin)
    classifiers = Classifiers(job["model"])
    if job.get("make"):
        make(classifiers, job["adapters"])
        print("{}")
        return
    torch.set_num_threads(job["num_threads"])
    print(json.dumps(answer(classifiers, job["adapters"], job["requests"], job["quantization"])))


if __name__ == "__main__":
    main()


__all__ = ["MAX_LABELS", "METHODS", "num_labels_of", "run"]
