"""Adapters that lie in a folder of the server's own machine, named by a client.

A client's path is not trusted: what it leads to must lie in the root, through whatever links, and
is opened without following any that appear afterwards.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from peftcore.config import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME
from server.api.upload import Upload
from server.errors import BadRequest, Forbidden, NotFound, TooLarge


@contextmanager
def open_adapter(root: Path, path: str, name: str, max_bytes: int) -> Iterator[Upload]:
    """A folder's two files as if they had been uploaded as `name`. The weights are a copy that
    nobody else can write to while they are checked.

    Args:
        root: the folder that paths may lead into.
        path: of the adapter's folder, absolute or from `root`.
        max_bytes: largest file of weights.

    Raises:
        Forbidden: it leads out of `root`. NotFound: it leads nowhere, or to no adapter.
        BadRequest: it is no path. TooLarge: see `max_bytes`.
    """
    if "\0" in path:
        raise BadRequest("lora_path: holds a zero byte", param="lora_path")
    root = root.expanduser().resolve()
    folder = root / path
    with _open_under(root, folder / CONFIG_NAME, path) as config_file:
        config = os.read(config_file, MAX_CONFIG_BYTES + 1)
    with _open_under(root, folder / WEIGHTS_NAME, path) as weights_file, TemporaryFile() as copy:
        if os.fstat(weights_file).st_size > max_bytes:
            raise TooLarge(
                f"lora_path: {WEIGHTS_NAME} has more than {max_bytes} bytes (--max-upload)",
                param="lora_path",
            )
        with os.fdopen(weights_file, "rb", closefd=False) as source:
            shutil.copyfileobj(source, copy)
        copy.flush()
        yield Upload(name, config, Path(f"/dev/fd/{copy.fileno()}"))


@contextmanager
def _open_under(root: Path, path: Path, asked: str) -> Iterator[int]:
    """A descriptor of the regular file at `path`."""
    missing = NotFound(f"lora_path: there is no {path.name} in {asked[:200]!r}", param="lora_path")
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # links in a circle, names that are too long
        raise missing from None
    if ".." in path.parts or not real.is_relative_to(root):
        raise Forbidden(
            f"lora_path: {asked[:200]!r} leads out of the server's --lora-root",
            param="lora_path",
            code="path_not_allowed",
        )
    opened: list[int] = []
    try:
        try:
            opened.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY))
            *folders, last = real.relative_to(root).parts
            for part in folders:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                opened.append(os.open(part, flags, dir_fd=opened[-1]))
            # Not to wait for the other end of a pipe.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            opened.append(os.open(last, flags, dir_fd=opened[-1]))
        except OSError:
            raise missing from None
        if not stat.S_ISREG(os.fstat(opened[-1]).st_mode):
            raise missing
        yield opened[-1]
    finally:
        for descriptor in opened:
            os.close(descriptor)
