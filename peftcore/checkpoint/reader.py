"""The tensors of one adapter file, each to be taken exactly once.

A method takes the keys that its config implies; what is then missing or left over is an error that
names the key. This is what makes a wrong prefix or a wrong target a refusal instead of a silent
base model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftcore.errors import CheckpointError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: AdaLoRA can take all ranks away from a module.
_MAY_BE_EMPTY = (".lora_A", ".lora_B", ".lora_E")

#: PEFT's prefix before the module's path in the base model.
PREFIX = "base_model.model."


#: Why a pickle is refused, and what to do.
PICKLE = (
    "a pickle (.bin) can run code and is not read: load the adapter in the library that wrote it "
    "and save it again, in PEFT by save_pretrained(folder), in adapters by "
    "save_adapter(folder, name, use_safetensors=True)"
)


#: Why what git leaves in a large file's place is refused, and what to do.
_LFS_POINTER = "a git-lfs pointer, not the weights themselves: fetch them by git lfs pull"

#: Begins of files that are taken for weights: of a pickle, of the zip in which torch.save puts one.
_OTHERS = {
    **dict.fromkeys((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), PICKLE),
    b"version https://git-lfs": _LFS_POINTER,
}


def _what_it_is(path: str | Path) -> str | None:
    """The refusal of a file that is known as another kind by its first bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(max(map(len, _OTHERS)))
    except OSError:
        return None
    return next((reason for begin, reason in _OTHERS.items() if head.startswith(begin)), None)


class TensorReader:
    """The checked tensors of an adapter, by key."""

    def __init__(self, tensors: Mapping[str, Tensor], *, check_values: bool = True) -> None:
        """`check_values=False` is for a file whose values were found finite before."""
        for key, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise CheckpointError(
                    key, f"dtype {tensor.dtype} is not one of float32, float16, bfloat16"
                )
            if tensor.numel() == 0 and not key.endswith(_MAY_BE_EMPTY):
                raise CheckpointError(key, f"the tensor is empty: shape {tuple(tensor.shape)}")
            if check_values and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(key, "the tensor holds values that are not finite (NaN, inf)")
        self._tensors = dict(tensors)
        self._taken: set[str] = set()

    @classmethod
    def from_file(
        cls, path: str | Path, name: str = "weights", *, check_values: bool = True
    ) -> TensorReader:
        """Read a safetensors file, which errors call `name`.

        Raises:
            CheckpointError: not a safetensors file, truncated, or a tensor that is refused.
        """
        tensors: dict[str, Tensor] = {}
        try:
            with safe_open(str(path), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    tensors[key] = file.get_tensor(key)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
            reason = _what_it_is(path) or f"not a readable safetensors file: {exc}"
            raise CheckpointError(name, reason) from None
        if not tensors:
            raise CheckpointError(name, "the file holds no tensor")
        return cls(tensors, check_values=check_values)

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def peek(self, key: str) -> Tensor:
        """The tensor as it is in the file, not taken."""
        return self._tensors[key]

    def has(self, key: str) -> bool:
        return key in self._tensors

    def has_left(self, key: str) -> bool:
        """Is the key there, and not taken?"""
        return key in self._tensors and key not in self._taken

    def take(self, key: str, shape: Sequence[int], why: str = "") -> Tensor:
        """Take one tensor as float32.

        Args:
            key: its full key in the file.
            shape: the shape that config and base imply.
            why: what implies the key, for the message.

        Raises:
            CheckpointError: the key is missing, or its shape is another.
        """
        tensor = self._tensors.get(key)
        if tensor is None:
            raise CheckpointError(key, f"missing from the weights{why and f': {why}'}")
        if tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                key,
                f"shape {list(tensor.shape)}, but the config and the base model imply "
                f"{list(shape)}",
            )
        assert key not in self._taken, f"{key} is taken twice"
        self._taken.add(key)
        return tensor.to(torch.float32)

    def again(self) -> TensorReader:
        """The same tensors, none taken."""
        return TensorReader(self._tensors, check_values=False)

    def finish(self) -> None:
        """Raises CheckpointError if a key was never taken."""
        left = sorted(self._tensors.keys() - self._taken)
        if left:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise CheckpointError(
                left[0],
                f"no module of the base model takes this key under this config{more}. Keys look "
                f"like '{PREFIX}<module path>.<parameter>'; check the prefix and target_modules",
            )
