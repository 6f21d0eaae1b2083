"""What the commands have in common: consoles, options, and errors as one line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from clients.client import API_KEY_VARIABLE, URL_VARIABLE
from clients.errors import ApiError, ClientError, ConnectionFailed, ServerFailed, Unauthorized

# Nothing is coloured for looking like a number: digests and names would be, in pieces.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="An adapter's name, BASE:ADAPTER or ADAPTER@sha256:DIGEST; by default the base model.",
    ),
]


@contextmanager
def errors_to_exit() -> Iterator[None]:
    """What the server, the network or the disk refuses is one line on stderr, and exit status 1."""
    try:
        yield
    except (ClientError, OSError) as exc:
        show_error(exc)
        raise typer.Exit(1) from None


def show_error(exc: Exception) -> None:
    """One line: what is wrong, and what to do about it where that is not in the message."""
    text = " ".join(str(exc).split())
    if isinstance(exc, ConnectionFailed):
        text += f"; start one with polypeft-serve, or name yours by --url or {URL_VARIABLE}"
    elif isinstance(exc, Unauthorized):
        text += f"; give a key by --api-key or {API_KEY_VARIABLE}"
    elif isinstance(exc, ServerFailed) and exc.request_id:
        text += f" (request {exc.request_id} in the server's log)"
    elif isinstance(exc, ApiError) and exc.retry_after:
        text += f"; try again in {exc.retry_after:.0f} s"
    err.print(f"polypeft: {text}", style="red", markup=False, highlight=False, soft_wrap=True)


def write(text: str) -> None:
    """As it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    write(json.dumps(value, indent=2) + "\n")


def size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
