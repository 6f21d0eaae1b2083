"""HF `Trainer` for adapters of language models: logits only where there is a loss.

With a vocabulary of tens of thousands the logits of a short prompt cost more than a layer. The rows
that no label needs are dropped before the output embedding, so that neither their logits nor their
gradients are computed. Everything else (optimizer, schedule, checkpoints, resuming, early stopping)
is transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftcore.model import PeftModel
from peftcore.train.samples import IGNORED


class AdapterTrainer(Trainer):
    """Trains a `PeftModel` whose task is CAUSAL_LM.

    Attributes:
        num_tokens: tokens trained on so far, padding not counted.
    """

    model: PeftModel

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_tokens = 0
        # The loss below divides by the tokens of all accumulated batches.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss in nats over the labelled tokens (of all accumulated batches)."""
        if model.training:
            self.num_tokens += count_tokens(inputs)
        total, count = summed_loss(self.model, inputs)
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        term = self.model.regularization()
        if term is not None:
            loss = loss + term
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The mean loss over all labelled tokens of the data set, however they are batched."""
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for inputs in self.get_eval_dataloader(eval_dataset):
                batch, tokens = summed_loss(self.model, self._prepare_inputs(inputs))
                total, count = total + float(batch), count + tokens
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def count_tokens(inputs: dict[str, Tensor]) -> int:
    """The tokens of a batch, padding not counted."""
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else int(mask.sum())


def summed_loss(model: PeftModel, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The sum of the losses at the labelled tokens, in nats, and how many they are."""
    inputs = dict(inputs)
    targets = inputs.pop("labels")[:, 1:]
    wanted = targets != IGNORED
    # The last position predicts nothing.
    keep = torch.cat([wanted, wanted.new_zeros(len(wanted), 1)], dim=1)
    with only_rows(model, keep):
        logits = model(**inputs, use_cache=False).logits[0]
    loss = cross_entropy(logits.to(torch.float32), targets[wanted], reduction="sum")
    return loss, len(logits)


@contextmanager
def only_rows(model: PeftModel, keep: Tensor) -> Iterator[None]:
    """Within, logits are made of some positions only, `[1, k, vocab]`.

    Args:
        keep: `[batch, len]` bool; virtual tokens before the sequence are not counted.
    """

    def drop(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        virtual = hidden.shape[1] - keep.shape[1]
        return (hidden[:, virtual:][keep][None], *args[1:])

    handle = model.get_base_model().get_output_embeddings().register_forward_pre_hook(drop)
    try:
        yield
    finally:
        handle.remove()


class Progress(TrainerCallback):
    """A bar on the error stream: steps, and the loss of the last."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._bar is None or logs is None:
            return
        self._shown |= {k: f"{float(logs[k]):.4f}" for k in ("loss", "eval_loss") if k in logs}
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(state.global_step - self._bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class RankAllocation(TrainerCallback):
    """AdaLoRA moves ranks between modules after each update."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].update_and_allocate(state.global_step)


class StopWhenAsked(TrainerCallback):
    """Ends the training, with a checkpoint, after the step in which it is asked to.

    Attributes:
        asked: set it to stop.
    """

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.asked:
            control.should_training_stop = True
            control.should_save = True
