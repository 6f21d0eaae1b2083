"""How a model's texts are embedded where a request does not say: what its own files say of it.

sentence-transformers keeps that beside a model: `modules.json` lists what comes after the model, a
pooling (with a config of its own) and perhaps a normalization.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from server.engine.sequence import PoolingKind, PoolingParams
from server.models.loader import LoadedModel

logger = logging.getLogger(__name__)

_KINDS: dict[str, PoolingKind] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


def default_embedding(loaded: LoadedModel) -> PoolingParams:
    """Where the files say nothing: an encoder's mean, a decoder's last; of length 1."""
    return PoolingParams("mean" if loaded.is_encoder else "last", normalize=True)


def embedding_defaults(folder: Path, loaded: LoadedModel) -> PoolingParams:
    """What the files in the model's folder say, as far as they do."""
    default = default_embedding(loaded)
    modules = _read(folder / "modules.json")
    if not isinstance(modules, list):
        return default
    kind, normalize = default.kind, False
    for module in modules:
        name = str(module.get("type", "")).rpartition(".")[2]
        if name == "Normalize":
            normalize = True
        elif name == "Pooling":
            config = _read(folder / str(module.get("path", "")) / "config.json") or {}
            modes = [k for k, on in config.items() if k.startswith("pooling_mode_") and on is True]
            if len(modes) == 1 and modes[0] in _KINDS:
                kind = _KINDS[modes[0]]
            else:
                logger.warning("embeddings: %s is not known here; %s is used", modes, kind)
        elif name != "Transformer":
            logger.warning("embeddings: the module %s is left out", name)
    return PoolingParams(kind, normalize)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
