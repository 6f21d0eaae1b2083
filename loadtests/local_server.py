"""A server of our own for a load test: started on a free port, stopped at the end."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class LocalServer:
    """A server that answers.

    Attributes:
        seconds: from the start of its process until it took requests.
    """

    url: str
    pid: int
    seconds: float


@contextmanager
def local_server(flags: Sequence[str], *, max_seconds: float = 300) -> Iterator[LocalServer]:
    """Run `polypeft-serve` with `flags`; yields once it takes requests.

    Raises:
        RuntimeError: it ended, or did not answer within `max_seconds`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "server", "--port", str(port), *flags]
    # A file, because a pipe that nobody reads would stop a server that logs much.
    with tempfile.TemporaryFile() as log, httpx.Client() as http:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            while True:
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the server ended: {log.read().decode()[-2000:]}")
                try:
                    if http.get(f"{url}/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if time.monotonic() > start + max_seconds:
                    raise RuntimeError(f"the server did not answer within {max_seconds} s")
                time.sleep(_POLL_SECONDS)
            yield LocalServer(url, process.pid, time.monotonic() - start)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
