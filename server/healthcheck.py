"""Does the server in this container take requests? `python -m server.healthcheck`

Asks /ready at $POLYPEFT_PORT of the loopback, which needs no key; ends with 0 or 1. Imports little,
since it runs every few seconds.
"""

from __future__ import annotations

import http.client
import os
import sys

_SECONDS = 4.0


def main() -> None:
    """Ask, and say what was answered."""
    port = int(os.environ.get("POLYPEFT_PORT") or 8000)
    # http.client, because the rest would ask a proxy that the environment names.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        body = answer.read(500).decode(errors="replace")
    except (OSError, http.client.HTTPException) as exc:
        sys.exit(f"port {port}: {exc}")
    finally:
        connection.close()
    if answer.status != 200:
        sys.exit(f"port {port}: {answer.status} {body}")
    print(body)


if __name__ == "__main__":
    main()
