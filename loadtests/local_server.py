"""A server of our own for a load test: started on a free port, stopped at the end."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx


@contextmanager
def local_server(flags: Sequence[str], *, max_seconds: float = 300) -> Iterator[str]:
    """Run `polypeft-serve` with `flags`; yields its URL once it answers.

    Raises:
        RuntimeError: it ended, or did not answer within `max_seconds`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "server", "--port", str(port), *flags]
    # A file, because a pipe that nobody reads would stop a server that logs much.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            end = time.monotonic() + max_seconds
            while True:
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the server ended: {log.read().decode()[-2000:]}")
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if time.monotonic() > end:
                    raise RuntimeError(f"the server did not answer within {max_seconds} s")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
