"""Where a base model comes from: a hub id, a folder, a GGUF file or a package, as a folder."""

from peftcore.sources.resolve import (
    DEFAULT_MODEL,
    ModelFolder,
    ModelSourceError,
    default_cache_dir,
    resolve_model,
)

__all__ = [
    "DEFAULT_MODEL",
    "ModelFolder",
    "ModelSourceError",
    "default_cache_dir",
    "resolve_model",
]
