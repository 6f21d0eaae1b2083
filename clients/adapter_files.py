"""An adapter's files, wherever they lie, looked at before they are sent.

What is looked at is what a glance tells: that there are two, that one is a JSON object and the
other safetensors of the length that it says. Whether it fits the base only the server knows.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from clients.errors import InvalidInput

CONFIG_NAME = "adapter_config.json"
#: The trained model's own config, whose id2label says what a classifier's classes are called.
MODEL_CONFIG_NAME = "config.json"
#: As PEFT names the weights, and as AdapterHub does.
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter.safetensors")
WEIGHTS_NAME = WEIGHTS_NAMES[0]
#: What AdapterHub saves beside the adapter of a model with a head.
HEAD_NAME = "model_head.safetensors"
HEAD_CONFIG_NAME = "head_config.json"
PICKLED_HEAD_NAME = "pytorch_model_head.bin"
#: As PEFT names them where it is told to pickle.
PICKLED_NAMES = ("adapter_model.bin", "pytorch_adapter.bin")

#: Everything that is looked for.
_NAMES = {
    CONFIG_NAME, MODEL_CONFIG_NAME, *WEIGHTS_NAMES, HEAD_NAME, HEAD_CONFIG_NAME, PICKLED_HEAD_NAME
}  # fmt: skip

#: Longest header that safetensors itself takes, in bytes.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class AdapterFiles:
    """Files that look like an adapter.

    Attributes:
        weights: a path as long as the files are open.
        weights_name: what the weights are called.
        model_config: the config.json beside them, or None.
        head, head_config: AdapterHub's head beside them, or None.
    """

    config: bytes
    weights: Path
    weights_name: str
    model_config: bytes | None = None
    head: Path | None = None
    head_config: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return self.weights.stat().st_size


@contextmanager
def open_adapter(path: Path) -> Iterator[AdapterFiles]:
    """The files of a folder, of a zip of one, or of weights with their config beside them.

    Raises InvalidInput: one of the two is missing, or is not what its name says.
    """
    if path.is_dir():
        files = _in_folder(path)
    elif not path.is_file():
        raise InvalidInput(f"{path}: no such file or folder")
    elif path.suffix == ".safetensors":
        files = _beside(path)
    elif zipfile.is_zipfile(path) and path.suffix == ".zip":
        with _unzipped(path) as files:
            _check(files, path)
            yield files
        return
    else:
        raise InvalidInput(
            f"{path}: neither a folder, a .zip nor .safetensors; give the folder that "
            "save_pretrained wrote"
        )
    _check(files, path)
    yield files


def _in_folder(folder: Path) -> AdapterFiles:
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return _beside(folder / name)
    raise InvalidInput(_no_weights(str(folder), {p.name for p in folder.iterdir()}))


def _beside(weights: Path) -> AdapterFiles:
    folder = weights.parent
    head = folder / HEAD_NAME
    if weights.name == WEIGHTS_NAME:  # PEFT's, which hold their heads
        return AdapterFiles(
            _read(folder / CONFIG_NAME),
            weights,
            weights.name,
            _read_if_there(folder / MODEL_CONFIG_NAME),
        )
    if not head.is_file() and (folder / PICKLED_HEAD_NAME).is_file():
        raise InvalidInput(
            f"{folder}: {PICKLED_HEAD_NAME} is pickled, which no server loads; save the adapter "
            "again with use_safetensors=True"
        )
    return AdapterFiles(
        _read(folder / CONFIG_NAME),
        weights,
        weights.name,
        _read_if_there(folder / MODEL_CONFIG_NAME),
        head if head.is_file() else None,
        _read_if_there(folder / HEAD_CONFIG_NAME) if head.is_file() else None,
    )


def _read_if_there(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _no_weights(where: str, names: set[str]) -> str:
    pickled = next((name for name in PICKLED_NAMES if name in names), None)
    if pickled is not None:
        return (
            f"{where}: {pickled} is pickled, which no server loads; save it again with "
            "safe_serialization=True"
        )
    return f"{where}: has no {' or '.join(WEIGHTS_NAMES)}; give the folder that holds one"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InvalidInput(
            f"{path}: is missing; PEFT writes it beside the weights (save_pretrained)"
        ) from None


@contextmanager
def _unzipped(path: Path) -> Iterator[AdapterFiles]:
    """The zip's files in a folder, for as long as they are needed; nothing else is unpacked."""
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as scratch:
        names = {
            PurePosixPath(member.filename).name: member
            for member in archive.infolist()
            if not member.is_dir()
        }
        if CONFIG_NAME not in names:
            raise InvalidInput(f"{path}: has no {CONFIG_NAME}; zip the folder that PEFT wrote")
        if not names.keys() & set(WEIGHTS_NAMES):
            raise InvalidInput(_no_weights(str(path), set(names)))
        try:
            for name in names.keys() & _NAMES:
                with archive.open(names[name]) as packed, (Path(scratch) / name).open("wb") as file:
                    shutil.copyfileobj(packed, file)
        except (zipfile.BadZipFile, RuntimeError) as exc:  # damaged, or under a password
            raise InvalidInput(f"{path}: {exc}") from None
        yield _in_folder(Path(scratch))


def _check(files: AdapterFiles, path: Path) -> None:
    try:
        config = json.loads(files.config)
    except ValueError as exc:
        raise InvalidInput(f"{path}: {CONFIG_NAME} is not JSON: {exc}") from None
    if not isinstance(config, dict):
        raise InvalidInput(f"{path}: {CONFIG_NAME} is not a JSON object")
    for weights in (files.weights, files.head):
        if weights is not None and (problem := _safetensors_problem(weights)) is not None:
            raise InvalidInput(f"{path}: {weights.name} {problem}")


def _safetensors_problem(path: Path) -> str | None:
    """What is wrong with a file of eight bytes, a header of that length, and tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            return "is no safetensors file: it ends within its first eight bytes"
        (length,) = struct.unpack("<Q", head)
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            return "is no safetensors file, or is cut off within its header; save it again"
        try:
            header = json.loads(file.read(length))
            ends = [t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "is no safetensors file: its header is not its tensors' index"
    if not ends:
        return "holds no tensors"
    if size != expected:
        return f"has {size} bytes and should have {expected}; was it copied whole?"
    return None


class Watched:
    """A binary file that tells how far it was read.

    Args:
        on_progress: called with the bytes read so far; goes back to 0 where they are sent again.
    """

    def __init__(self, file: IO[bytes], on_progress: Callable[[int], None]) -> None:
        self._file = file
        self._on_progress = on_progress

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._on_progress(self._file.tell())
        return data

    def fileno(self) -> int:
        return self._file.fileno()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


__all__ = [
    "CONFIG_NAME",
    "HEAD_CONFIG_NAME",
    "HEAD_NAME",
    "MODEL_CONFIG_NAME",
    "WEIGHTS_NAME",
    "AdapterFiles",
    "Watched",
    "open_adapter",
]
