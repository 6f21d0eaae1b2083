"""What a method is made of: parts at modules of the base, or a prompt before the sequence.

A part owns its parameters, whose names are those of PEFT's file after the module's path; turns them
into serving primitives, differentiably; and initializes them. Everything else follows from these:
training applies the primitives, loading takes the names from a file, compiling a served adapter is
loading and then `primitives()`, and merging folds the primitives into the module's weight.
Knows nothing of models, data or optimizers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcore.checkpoint.reader import PREFIX, TensorReader
from peftcore.errors import CheckpointError, UnsupportedError
from peftcore.primitives import BiasDelta, ModuleOverride, Primitive
from peftcore.quant import is_quantized

if TYPE_CHECKING:
    from peftcore.base import BaseModule

#: Prefix of what belongs to an adapter as a whole and to no module.
SHARED_PREFIX = "base_model."

#: The one tensor that every prompt's file has.
PROMPT_KEY = "prompt_embeddings"


class Linear(nn.Linear):
    """nn.Linear that is not initialized under the meta device: that takes most of a file's load."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class ModulePart(nn.Module, ABC):
    """What one adapter does at one module of the base.

    The parameters are float32 whatever the base computes in. Made under `torch.device("meta")`
    it costs nothing and consumes no random numbers: that is how a file is loaded.

    Attributes:
        module: the base's module, as it was before any adapter.
        dropout: on the input of the low-rank parts, or on what a bottleneck adds, while training;
            None without.
    """

    #: Must be alone at a module, or among parts of its own kind: its effects do not compose.
    exclusive = False

    def __init__(self, module: BaseModule, dropout: float = 0.0) -> None:
        super().__init__()
        self.module = module
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    @abstractmethod
    def primitives(self) -> Sequence[Primitive]:
        """What the part computes, as functions of its parameters (gradients flow)."""

    def applied(self) -> Sequence[Primitive]:
        """The primitives for one forward pass: what is random while training is drawn here."""
        return self.primitives()

    def reset_parameters(self) -> None:
        """Initialize the parameters of a new adapter as PEFT does. Reads the base's weights."""

    def file_key(self, name: str) -> str:
        """The key in PEFT's file of the parameter or buffer `name`."""
        return f"{PREFIX}{self.module.path}.{name}"

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are saved, by name."""
        return iter(self.named_parameters())

    def load(self, tensors: TensorReader) -> None:
        """Take this part's tensors out of a file. Raises CheckpointError."""
        for name, tensor in list(self.saved()):
            why = f"the config names {self.module.path}"
            self.assign(name, tensors.take(self.file_key(name), tuple(tensor.shape), why))

    def assign(self, name: str, value: Tensor) -> None:
        """Give one of the `saved` tensors its value from a file."""
        assign(self, name, value)

    def num_replaced(self) -> int:
        """How many of the base's parameters the part's stand in the place of, as PEFT counts."""
        return 0

    def forward(self, base: nn.Module, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The module's output for rows that are all this part's; only for `own_forward`."""
        raise AssertionError("the primitives say what this part computes")

    #: Training needs `forward`, because the primitives alone do not say it (dropout inside).
    own_forward = False

    #: The part sits at a module that ends a post-norm branch: one that is given the stream too.
    ends_branch = False


class StreamTap(ModulePart):
    """At a norm: does nothing but show its input, a residual stream, to the adapter's other parts.

    It has no parameters. A served bottleneck says by itself what it reads.
    """

    exclusive = True

    def primitives(self) -> Sequence[Primitive]:
        return ()


class ReplacedModule(ModulePart):
    """A trained copy of the base's module in its place: `modules_to_save`, LN tuning.

    Keys: those of the module itself.

    Attributes:
        prefix: of the keys. PEFT has another one beside a prompt.
    """

    own_forward = True
    exclusive = True

    def __init__(self, module: BaseModule, prefix: str = PREFIX) -> None:
        super().__init__(module)
        self.copy = _trainable_copy(module)
        self.prefix = prefix

    def file_key(self, name: str) -> str:
        return f"{self.prefix}{self.module.path}.{name.removeprefix('copy.')}"

    def load(self, tensors: TensorReader) -> None:
        super().load(tensors)
        for name in ("modules_to_save.bias", "original_module.bias"):
            key = f"{self.prefix}{self.module.path}.{name}"
            if tensors.has(key):  # PEFT writes biases twice under bias="all"
                tensors.take(key, tuple(tensors.peek(key).shape))

    def primitives(self) -> Sequence[Primitive]:
        found: list[Primitive] = []
        for name, leaf in self.copy.named_modules():
            if list(leaf.children()) or not list(leaf.parameters()):
                continue
            path = f"{self.module.path}.{name}" if name else self.module.path
            weight, bias = leaf.weight, getattr(leaf, "bias", None)
            if isinstance(leaf, Conv1D):
                weight = weight.t()
            found.append(ModuleOverride(path, weight, bias))
        return found

    def forward(self, base: nn.Module, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        weight = next(self.copy.parameters())
        if x.is_floating_point():
            x = x.to(weight.dtype)
        return self.copy(x, *args, **kwargs)


def _trainable_copy(module: BaseModule) -> nn.Module:
    """A copy of the module that gradients can reach; float32 where the base is quantized."""
    original = module.module
    if torch.get_default_device().type == "meta":
        made = (
            nn.Linear(module.in_features, module.out_features, original.bias is not None)
            if is_quantized(original)
            else copy.deepcopy(original, _without_values(original))
        )
    elif is_quantized(original):
        weight, bias = module.weight(), module.bias()
        made = nn.Linear(module.in_features, module.out_features, bias is not None)
        made = made.to(weight.device)
        with torch.no_grad():
            made.weight.copy_(weight)
            if bias is not None:
                made.bias.copy_(bias)
    else:
        made = copy.deepcopy(original)
    for submodule in made.modules():
        if is_quantized(submodule):
            raise UnsupportedError(
                "modules_to_save",
                f"{module.path} holds quantized layers: load the base with this module among "
                "its llm_int8_skip_modules",
            )
    return made.requires_grad_(True)


def _without_values(module: nn.Module) -> dict[int, object]:
    """A memo for `deepcopy`: parameters become meta tensors, and buffers are copied."""
    return {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in module.parameters()
    }


class Bias(ModulePart):
    """The module's bias, trained on its own (LoRA's and others' `bias="all"`)."""

    def __init__(self, module: BaseModule) -> None:
        super().__init__(module)
        bias = module.bias()
        assert bias is not None
        self.bias = nn.Parameter(torch.empty_like(bias, device=torch.get_default_device()))

    def reset_parameters(self) -> None:
        bias = self.module.bias()
        assert bias is not None
        self.bias.data = bias.clone()

    def num_replaced(self) -> int:
        return self.bias.numel()

    def primitives(self) -> Sequence[Primitive]:
        own = self.module.bias()
        assert own is not None
        return [BiasDelta(self.module.path, self.bias - own)]


class Shared(nn.Module):
    """What the parts of one adapter have in common, and its file holds once."""

    def file_key(self, name: str) -> str:
        return SHARED_PREFIX + name

    def reset_parameters(self) -> None:
        """As `ModulePart.reset_parameters`."""

    def load(self, tensors: TensorReader) -> None:
        """Take the shared tensors out of a file. Raises CheckpointError."""
        for name, tensor in list(self.saved()):
            assign(self, name, tensors.take(self.file_key(name), tuple(tensor.shape)))

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters()
        yield from self.named_buffers()


class Prompt(nn.Module, ABC):
    """Virtual tokens before the sequence, or their keys and values.

    Attributes:
        num_virtual_tokens: n.
        is_kv: are keys and values given at every layer, rather than rows of the embedding?
        embedding: what is trained; or, once loaded from a file, the rows themselves.
    """

    embedding: nn.Embedding
    is_kv = False

    def __init__(self, num_virtual_tokens: int) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens

    def kv(self) -> Tensor:
        """`[layers, 2, kv_heads, n, head_dim]`: keys, already rotated, and values; if `is_kv`."""
        raise AssertionError("these are virtual tokens")

    @abstractmethod
    def rows(self, task_ids: Tensor | None = None) -> Tensor:
        """`[n, width]`, or with `task_ids` `[batch]` under multitask prompts `[batch, n, width]`.

        width: the hidden size; or layers · 2 · kv_heads · head_dim.
        """

    @abstractmethod
    def primitives(self) -> Sequence[Primitive]:
        """As `ModulePart.primitives`."""

    def reset_parameters(self) -> None:
        """As `ModulePart.reset_parameters`."""

    def file_key(self, name: str) -> str:
        return name

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of PEFT's file."""
        yield PROMPT_KEY, self.rows()

    @abstractmethod
    def load(self, tensors: TensorReader) -> None:
        """Take the prompt out of a file; an encoder is dropped. Raises CheckpointError."""

    def encoder_state(self) -> dict[str, Tensor] | None:
        """All that is trained, where the file of PEFT holds less; else None."""
        return None


@dataclass
class Parts:
    """All that one adapter is on one base."""

    modules: list[ModulePart] = field(default_factory=list)
    prompt: Prompt | None = None
    shared: Shared | None = None
    #: The base's, for the copies of them that a file may hold.
    embeddings: Sequence[BaseModule] = ()

    def add(self, part: ModulePart | Prompt | Shared) -> None:
        if isinstance(part, ModulePart):
            self.modules.append(part)
        elif isinstance(part, Prompt):
            self.prompt = part
        else:
            self.shared = part

    def all(self) -> list[ModulePart | Prompt | Shared]:
        return [p for p in (self.shared, self.prompt, *self.modules) if p is not None]

    def load(self, tensors: TensorReader) -> None:
        """Take every tensor out of a file. Raises CheckpointError; does not call `finish`."""
        for part in self.all():
            part.load(tensors)
        for module in self.embeddings:
            _take_copies(module, tensors)

    def primitives(self) -> list[Primitive]:
        found: list[Primitive] = []
        for part in self.all():
            if not isinstance(part, Shared):
                found += part.primitives()
        return found


#: Under which names PEFT saves an embedding's own weights beside an adapter.
_COPIES = ("", "base_layer.", "token_adapter.base_layer.", "original_module.")


def _take_copies(module: BaseModule, tensors: TensorReader) -> None:
    """Take what a file holds of an embedding of the base: it must be the base's own.

    Raises CheckpointError.
    """
    for name, read in [("weight", module.weight), ("bias", module.bias)]:
        prefix = f"{PREFIX}{module.path}."
        for key in [f"{prefix}{inner}{name}" for inner in _COPIES]:
            # Most files hold none, and the weight of a quantized head is a tenth of a gigabyte.
            own = read() if tensors.has_left(key) else None
            if own is None:
                continue
            saved = tensors.take(key, tuple(own.shape), "a resized vocabulary?")
            if float((saved - own).norm()) > 0.2 * float(own.norm()):
                raise CheckpointError(
                    key,
                    "differs from the base model's weights: this adapter changes its base, "
                    "or was trained on another one",
                )
        key = f"{prefix}modules_to_save.{name}"
        if tensors.has_left(key):  # a second time what the part at the module has taken
            tensors.take(key, tuple(tensors.peek(key).shape))


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer by its dotted name.

    One that has values keeps its place, for an optimizer may hold it; and its dtype.
    """
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    old = getattr(owner, leaf)
    if not old.is_meta:
        with torch.no_grad():
            old.copy_(value)
        return
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(owner, leaf, value)
