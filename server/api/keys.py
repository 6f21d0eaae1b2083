"""API keys: who may ask. Of a key only its hash is kept."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import response_of
from server.api.state import PROBES
from server.errors import Unauthorized
from server.settings import Settings


class KeyRing:
    """The keys that a server accepts.

    Args:
        keys: at least one, each of printable ASCII without spaces.

    Raises:
        ValueError: there is none, or one could not be sent in a header. The message quotes no key.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes: list[bytes] = []
        for number, key in enumerate(keys, 1):
            if not key or not all("!" <= character <= "~" for character in key):
                raise ValueError(f"key {number} must be printable ASCII without spaces")
            self._hashes.append(_hash(key))
        if not self._hashes:
            raise ValueError("there is no key")

    def __contains__(self, key: str) -> bool:
        """In a time that depends neither on the key's characters nor on which one it is."""
        asked = _hash(key)
        found = False
        for known in self._hashes:
            found |= hmac.compare_digest(asked, known)
        return found


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def key_ring(settings: Settings) -> KeyRing | None:
    """The keys that the settings name; None where they name none, and everybody may ask.

    Raises:
        ValueError: a key or the file is not fit; names the setting.
    """
    keys: list[str] = []
    if settings.api_key is not None:
        keys.append(settings.api_key.get_secret_value())
        try:
            KeyRing(keys)
        except ValueError as exc:
            raise ValueError(f"--api-key: {exc}") from None
    if settings.api_key_file is not None:
        try:
            lines = [line.strip() for line in settings.api_key_file.read_text().splitlines()]
            of_file = [line for line in lines if line and not line.startswith("#")]
            KeyRing(of_file)
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else exc
            raise ValueError(f"--api-key-file {settings.api_key_file}: {reason}") from None
        keys += of_file
    return KeyRing(keys) if keys else None


class RequireKey:
    """Answers 401 to a request without a known key in `Authorization: Bearer`; probes need none."""

    def __init__(self, app: ASGIApp, *, ring: KeyRing) -> None:
        self._app = app
        self._ring = ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBES:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or key.strip() not in self._ring:
                refusal = Unauthorized(
                    "send one of this server's keys as 'Authorization: Bearer KEY'"
                    if scheme.lower() != "bearer"
                    else "this API key is not one of this server's",
                    code="invalid_api_key",
                )
                await response_of(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)
