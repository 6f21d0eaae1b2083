"""Trainable tokens: some rows of the embedding are trained, and the others stay the base's.

An output embedding that shares the input embedding's weight gets the same rows. LoRA's
`trainable_token_indices` is this beside the low-rank updates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from peftcore.checkpoint.reader import TensorReader
from peftcore.config import AdapterConfig, PatternMatcher, register, strict
from peftcore.errors import CheckpointError, ConfigError
from peftcore.methods.targets import resolve_targets
from peftcore.parts import ModulePart
from peftcore.primitives import Primitive, RowOverride

if TYPE_CHECKING:
    from peftcore.base import BaseModel, BaseModule

#: The parameter's name in PEFT's files; what it holds are the rows themselves.
ROWS_NAME = "trainable_tokens_delta"


@register
@dataclass(config=strict, kw_only=True)
class TrainableTokensConfig(AdapterConfig):
    """Config of trained rows; fields and defaults as PEFT's `TrainableTokensConfig`."""

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    training_only: ClassVar[frozenset[str]] = frozenset({"init_weights"})
    trains_head: ClassVar[bool] = False

    token_indices: list[int] = dataclasses.field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    @field_validator("target_modules", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return sorted(value) if isinstance(value, set | tuple | frozenset) else value

    def __post_init__(self) -> None:
        if self.modules_to_save:
            raise ConfigError(
                "modules_to_save",
                "PEFT's TRAINABLE_TOKENS has none: use LORA with trainable_token_indices",
            )

    def parts(self, base: BaseModel) -> Iterator[ModulePart]:
        targets = resolve_targets(
            base,
            PatternMatcher(),
            target_modules=self.target_modules or [base.input_embedding],
            embeddings=True,
        )
        wanted = {module.path: self.token_indices for module in targets}
        yield from token_parts(base, wanted, "token_indices", "", self.init_weights)

    def completed(self, base: BaseModel) -> Self:
        return dataclasses.replace(self, target_modules=self.target_modules or base.input_embedding)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["modules_to_save"]
        return values

    def canonical(self) -> dict[str, Any]:
        return super().canonical() | {"token_indices": self.token_indices}  # their order counts


def named_tokens(
    base: BaseModel, indices: Sequence[int] | Mapping[str, Sequence[int]]
) -> dict[str, Sequence[int]]:
    """Path of a module → the ids that LoRA's `trainable_token_indices` gives it.

    Raises ConfigError where a name matches no module, or two names match one.
    """
    if not isinstance(indices, Mapping):
        return {base.input_embedding: indices}
    found: dict[str, Sequence[int]] = {}
    for name, ids in indices.items():
        paths = [path for path in base.modules if path.endswith(name)]
        if not paths:
            raise ConfigError(
                "trainable_token_indices", f"{name!r} matches no module of the base model"
            )
        for path in paths:
            if path in found:
                raise ConfigError("trainable_token_indices", f"{path} is named twice")
            found[path] = ids
    return found


def token_parts(
    base: BaseModel,
    wanted: Mapping[str, Sequence[int]],
    field: str,
    prefix: str,
    from_base: bool = True,
) -> Iterator[ModulePart]:
    """The parts that train rows of modules.

    The input embedding's rows are the tied output's too, unless `wanted` gives that one others.

    Args:
        wanted: path → ids.
        field: of the config, for messages.
        prefix: of the parameter's name in the file.

    Raises:
        ConfigError: an id or a module that cannot be trained so.
    """
    tied = base.tied_output
    own = wanted.get(base.input_embedding)
    shares = tied is not None and own is not None and list(wanted.get(tied, own)) == list(own)
    source: TrainedRows | None = None
    for path, ids in wanted.items():
        if shares and path == tied:
            continue
        part = TrainedRows(base.modules[path], ids, field, prefix, from_base)
        if path == base.input_embedding:
            source = part
        yield part
    if shares:
        assert tied is not None
        assert source is not None
        yield TiedRows(base.modules[tied], source, is_saved=not prefix)


class TrainedRows(ModulePart):
    """Rows of an embedding, or of a linear module without bias.

    Key: `trainable_tokens_delta` `[num_ids, dim]`; LoRA's has `token_adapter.` before it.
    """

    exclusive = True

    def __init__(
        self, module: BaseModule, ids: Sequence[int], field: str, prefix: str, from_base: bool
    ) -> None:
        super().__init__(module)
        if module.kind not in ("embedding", "linear") or module.bias() is not None:
            raise ConfigError(field, f"{module.path}: neither an embedding nor linear without bias")
        num, dim = module.out_features, module.in_features
        if module.kind == "embedding":
            num, dim = module.module.weight.shape  # type: ignore[misc]
        if not ids:
            raise ConfigError(field, f"no token is named for {module.path}")
        if len(set(ids)) < len(ids):
            raise ConfigError(field, f"a token is named twice for {module.path}")
        for i in ids:
            if not 0 <= i < num:
                raise ConfigError(field, f"{i}: {module.path} has the rows 0 to {num - 1}")
        self.ids = tuple(ids)
        self.prefix = prefix
        self.from_base = from_base
        self.trainable_tokens_delta = nn.Parameter(torch.empty(len(ids), dim))

    def reset_parameters(self) -> None:
        if self.from_base:
            self.trainable_tokens_delta.data = self.module.weight()[list(self.ids)].clone()
        else:
            self.trainable_tokens_delta.data = torch.randn(self.trainable_tokens_delta.shape)

    def file_key(self, name: str) -> str:
        return super().file_key(self.prefix + name)

    def primitives(self) -> list[Primitive]:
        return [RowOverride(self.module.path, self.ids, self.trainable_tokens_delta)]


class TiedRows(ModulePart):
    """The rows of another part at a module that shares the other's weight. Owns no parameter.

    Key: `trainable_tokens_delta`, a second time; LoRA's file holds it once.
    """

    exclusive = True

    def __init__(self, module: BaseModule, source: TrainedRows, is_saved: bool) -> None:
        super().__init__(module)
        self._source = (source,)  # not a submodule: it is somebody else's
        self.is_saved = is_saved

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        if self.is_saved:
            yield ROWS_NAME, self._source[0].trainable_tokens_delta

    def load(self, tensors: TensorReader) -> None:
        key = self.file_key(ROWS_NAME)
        if not self.is_saved or not tensors.has(key):
            return
        rows = self._source[0].trainable_tokens_delta
        first = tensors.peek(self._source[0].file_key(ROWS_NAME))
        second = tensors.take(key, tuple(rows.shape))
        if not torch.equal(second, first.to(second)):
            raise CheckpointError(
                key, "differs from the input embedding's rows, whose weight the base model shares"
            )

    def primitives(self) -> list[Primitive]:
        source = self._source[0]
        return [RowOverride(self.module.path, source.ids, source.trainable_tokens_delta)]
