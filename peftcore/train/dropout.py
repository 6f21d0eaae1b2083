"""Dropout whose masks one job's sample decides, whatever else is in the batch.

A mask is drawn from the seed of (job, step, sample) and the place where it is applied: the same in
a recomputation under gradient checkpointing, the same alone and beside other jobs, and none of it
touches torch's global random numbers. Covers `nn.Dropout` modules, of adapters and of the base,
and attention's; a base that calls dropout as a function elsewhere draws from torch's own stream.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peftcore.model import PeftModel
    from peftcore.train.packed import Span

_MASK = (1 << 63) - 1


@dataclass(frozen=True)
class Draw:
    """Where one sample's masks in one step come from."""

    seed: int

    @classmethod
    def of(cls, job_seed: int, step: int, sample: int) -> Draw:
        return cls(hash((job_seed, step, sample)) & _MASK)

    def mask(
        self,
        shape: Sequence[int],
        p: float,
        place: tuple[str | int, ...],
        device: torch.device,
    ) -> Tensor:
        """0 with probability p, else 1 / (1 − p); float32."""
        generator = torch.Generator(device).manual_seed(self._seed(place))
        mask = torch.empty(tuple(shape), device=device).bernoulli_(1 - p, generator=generator)
        return mask.div_(1 - p) if p < 1 else mask

    def _seed(self, place: tuple[str | int, ...]) -> int:
        # No hash of a string: it differs between processes.
        numbers = (p if isinstance(p, int) else int.from_bytes(p.encode()[:8]) for p in place)
        return hash((self.seed, *numbers)) & _MASK

    @contextmanager
    def global_stream(self) -> Iterator[None]:
        """Within, torch's global random numbers are this draw's; they are put back after."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            yield


def has_dropout(model: PeftModel, name: str) -> bool:
    """Does anything drop in training: of the base, or of the adapter `name`?"""
    config = model.get_base_model().config.get_text_config().to_dict()
    if any(v for k, v in config.items() if "drop" in k and isinstance(v, int | float)):
        return True
    for path, module in model.named_modules():
        own = f".parts.{name}." in path or path.startswith(f"prompt_encoder.{name}.")
        others = ".parts." in path or path.startswith("prompt_encoder.")
        if own or not others:
            p = module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0)
            if isinstance(p, int | float) and p > 0:
                return True
    return False


@contextmanager
def own_dropout(model: PeftModel, spans: Sequence[Span]) -> Iterator[None]:
    """Within, the model's dropout modules draw for each sequence of `spans` from its own `draw`."""
    changed: list[nn.Dropout] = []
    if any(s.draw is not None for s in spans):
        for path, module in model.named_modules():
            if not isinstance(module, nn.Dropout) or module.p == 0 or not module.training:
                continue
            place = zlib.crc32(path.replace(".base_layer", "").encode())
            own = [s for s in spans if f".parts.{s.name}." in path]
            if own or ".parts." not in path:
                module.forward = _forward(module, place, own or spans)  # type: ignore[assignment, method-assign]
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(module: nn.Dropout, place: int, spans: Sequence[Span]) -> Callable[[Tensor], Tensor]:
    lengths = [len(s) for s in spans]
    kept = [s.num_kept for s in spans]

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        counts = lengths if len(rows) == sum(lengths) else kept
        assert len(rows) == sum(counts), "the rows of a dropout are not the batch's"
        masks = [
            s.draw.mask((n, x.shape[-1]), module.p, (place,), x.device)
            if s.draw is not None
            else torch.ones(n, x.shape[-1], device=x.device)
            for s, n in zip(spans, counts, strict=True)
        ]
        return (rows * torch.cat(masks).to(rows.dtype)).view(x.shape)

    return forward
