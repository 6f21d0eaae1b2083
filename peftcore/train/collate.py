"""Samples put together into the tensors of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftcore.train.samples import IGNORED


def padded(features: Sequence[Mapping[str, Any]], pad_id: int = 0) -> dict[str, Tensor]:
    """Samples padded on the right.

    Args:
        features: each with `input_ids` and `labels` of its length, or one label for all of it.

    Returns:
        input_ids, attention_mask `[batch, len]`; labels `[batch, len]`, IGNORED at the padding, or
        `[batch]`.
    """
    length = max(len(f["input_ids"]) for f in features)
    input_ids = torch.full((len(features), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    at_tokens = isinstance(features[0]["labels"], list)
    labels = torch.full_like(input_ids, IGNORED)
    for i, feature in enumerate(features):
        count = len(feature["input_ids"])
        input_ids[i, :count] = torch.tensor(feature["input_ids"])
        attention_mask[i, :count] = 1
        if at_tokens:
            labels[i, :count] = torch.tensor(feature["labels"])
    if not at_tokens:
        labels = torch.tensor([f["labels"] for f in features])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def side_by_side(features: Sequence[Mapping[str, Any]], pad_id: int = 0) -> dict[str, Tensor]:
    """Rows of several samples each; positions begin anew with every sample.

    There is no attention mask: where positions begin anew, transformers lets no token attend to
    what is before. Padding is a sample of its own, off the loss.

    Args:
        features: each with `samples`, a list of features as in `padded`.

    Returns:
        input_ids, position_ids, labels `[rows, len]`. The first label of each sample is IGNORED,
        for no token before it predicts it.
    """
    length = max(sum(len(s["input_ids"]) for s in f["samples"]) for f in features)
    input_ids = torch.full((len(features), length), pad_id)
    position_ids = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, feature in enumerate(features):
        start = 0
        for sample in feature["samples"]:
            end = start + len(sample["input_ids"])
            input_ids[i, start:end] = torch.tensor(sample["input_ids"])
            position_ids[i, start:end] = torch.arange(end - start)
            labels[i, start + 1 : end] = torch.tensor(sample["labels"][1:])
            start = end
        position_ids[i, start:] = torch.arange(length - start)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
