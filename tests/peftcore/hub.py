"""The fixtures of `make_adapterhub_fixtures`: adapters that AdapterHub's `adapters` made."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save, save_file
from torch import Tensor

from tests.peftcore import make_adapterhub_fixtures as original

#: Its name for the adapter.
NAME = "tuned"


class Hub:
    """One tiny base, and what `adapters` made of it.

    Attributes:
        cases: config name → AdapterHub's `adapter_config.json` and the losses of training.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.tensors = load_file(original.FIXTURES / f"{model}.safetensors")
        text = (original.FIXTURES / f"{model}.json").read_text()
        self.cases: dict[str, dict[str, Any]] = json.loads(text)
        self._state = original.base_state(model)

    def base(self) -> Any:
        """The base, fresh."""
        return original.base_model(self.model, self._state)

    def adapter(self, case: str, when: str = "trained") -> dict[str, Tensor]:
        """The adapter's tensors, `initial` or `trained`, by AdapterHub's keys."""
        prefix = f"{case}/{when}/"
        found = self.tensors.items()
        return {k.removeprefix(prefix): v for k, v in found if k.startswith(prefix)}

    def expected(self, case: str) -> Tensor:
        """What `adapters` computes of `original.batch` with the trained adapter."""
        return self.tensors[f"{case}/outputs"]

    def save(self, case: str, folder: Path, **config: Any) -> Path:
        """The adapter as AdapterHub's files, with changes in the inner config."""
        folder.mkdir(parents=True, exist_ok=True)
        raw = self.cases[case]["config"]
        raw = raw | {"config": raw["config"] | config}
        (folder / "adapter_config.json").write_text(json.dumps(raw))
        save_file(self.adapter(case), folder / "adapter.safetensors")
        return folder


def headed(case: str) -> tuple[dict[str, bytes], Tensor]:
    """An adapter that `adapters` saved with its head, one of `original.HEADS`.

    Returns:
        The bytes of its four files by name, and what `adapters` computes with it of the first row
        of `original.batch`: `[labels]` or `[len, labels]`.
    """
    tensors = load_file(original.FIXTURES / "heads.safetensors")
    configs = json.loads((original.FIXTURES / "heads.json").read_text())[case]
    files = {f"{name}.json": json.dumps(config).encode() for name, config in configs.items()}
    for name in ("adapter", "model_head"):
        prefix = f"{case}/{name}/"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        files[f"{name}.safetensors"] = save(own)
    return files, tensors[f"{case}/logits"]


@cache
def hub(model: str) -> Hub:
    return Hub(model)
