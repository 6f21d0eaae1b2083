"""An adapter's multipart upload, streamed to disk. Leaves nothing behind, however it ends.

The parts are spooled to files that have no name in any folder, so that even a killed process leaves
none; the size cap is `limits.BodyLimit`'s.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, cast

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from peftcore.config import MAX_CONFIG_BYTES
from server.errors import BadRequest

FIELDS = ("name", "config", "weights")
OPTIONAL = ("id2label", "head", "head_config")

#: The request body, for the OpenAPI description.
UPLOAD_SCHEMA: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": list(FIELDS),
                "properties": {
                    "name": {"type": "string", "description": "what requests call it"},
                    "config": {
                        "type": "string",
                        "format": "binary",
                        "description": "adapter_config.json, PEFT's or AdapterHub's",
                    },
                    "weights": {
                        "type": "string",
                        "format": "binary",
                        "description": "PEFT's adapter_model.safetensors, or AdapterHub's "
                        "adapter.safetensors",
                    },
                    "id2label": {
                        "type": "string",
                        "format": "binary",
                        "description": "what a classifier's classes are called, as JSON: a list, "
                        '{"0": name, ...}, or the config.json of the model that was trained, whose '
                        "problem_type counts too",
                    },
                    "head": {
                        "type": "string",
                        "format": "binary",
                        "description": "AdapterHub's model_head.safetensors",
                    },
                    "head_config": {
                        "type": "string",
                        "format": "binary",
                        "description": "AdapterHub's head_config.json, beside head",
                    },
                },
            }
        }
    },
}


@dataclass(frozen=True)
class Upload:
    """The fields. Paths are there only as long as the upload is open."""

    name: str
    config: bytes
    weights: Path
    id2label: bytes | None = None
    head: Path | None = None
    head_config: bytes | None = None


@asynccontextmanager
async def receive_upload(request: Request) -> AsyncIterator[Upload]:
    """Read the whole body.

    Raises:
        BadRequest: not multipart, or a field is missing, repeated, unknown, or of the wrong kind.
        ClientDisconnect: the body ended early.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadRequest(f"send multipart/form-data with the fields {', '.join(FIELDS)}")
    try:
        form = await _Parser(request).parse()
    except MultiPartException as exc:
        raise BadRequest(f"the multipart body cannot be read: {exc.message}") from None
    try:
        parts = _by_name(form)
        name = await _bytes_of(parts["name"], 1024)
        config = await _bytes_of(parts["config"], MAX_CONFIG_BYTES + 1)
        if "head_config" in parts and "head" not in parts:
            raise BadRequest("head_config: goes beside head, which is missing", param="head")
        yield Upload(
            name.decode(errors="replace"),
            config,
            await _path_of("weights", parts),
            await _small("id2label", parts),
            await _path_of("head", parts) if "head" in parts else None,
            await _small("head_config", parts),
        )
    finally:
        await form.close()


class _Parser(MultiPartParser):
    """Closes what it opened when it raises; and it raises for a body that is cut off."""

    def __init__(self, request: Request) -> None:
        stream = self._until_end(request)
        super().__init__(
            request.headers, stream, max_files=8, max_fields=8, max_part_size=MAX_CONFIG_BYTES
        )
        self._ended = False

    def on_end(self) -> None:
        self._ended = True

    async def _until_end(self, request: Request) -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            yield chunk
        if not self._ended:
            raise BadRequest("the multipart body is cut off: its closing boundary is missing")


def _by_name(form: FormData) -> dict[str, UploadFile | str]:
    parts: dict[str, UploadFile | str] = {}
    for name, value in form.multi_items():
        if name not in (*FIELDS, *OPTIONAL):
            raise BadRequest(f"{name[:200]}: no such field", param=name, code="unknown_parameter")
        if name in parts:
            raise BadRequest(f"{name}: sent twice", param=name)
        parts[name] = value
    for name in FIELDS:
        if name not in parts:
            raise BadRequest(f"{name}: required", param=name, code="missing_required_parameter")
    return parts


async def _bytes_of(part: UploadFile | str, max_bytes: int) -> bytes:
    return part.encode() if isinstance(part, str) else await part.read(max_bytes)


async def _small(name: str, parts: Mapping[str, UploadFile | str]) -> bytes | None:
    """Of an optional part what may be read of a config, and a byte more."""
    return await _bytes_of(parts[name], MAX_CONFIG_BYTES + 1) if name in parts else None


async def _path_of(name: str, parts: Mapping[str, UploadFile | str]) -> Path:
    """A path to the part's nameless file: its descriptor's, which opens it anew."""
    part = parts[name]
    if not isinstance(part, UploadFile):
        raise BadRequest(f"{name}: must be sent as a file", param=name)
    file = cast("SpooledTemporaryFile[bytes]", part.file)
    await run_in_threadpool(file.rollover)
    await run_in_threadpool(file.flush)
    return Path(f"/dev/fd/{file.fileno()}")
