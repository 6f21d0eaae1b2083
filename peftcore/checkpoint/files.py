"""Files that are written whole: a reader sees the old one or the new one, never a part."""

from __future__ import annotations

from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_bytes(data)
    scratch.replace(path)
