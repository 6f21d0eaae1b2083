"""How the server's log lines are written: text for people, or JSON for machines.

Every line that belongs to a request bears its id. No line has a prompt, an answer or a key in it.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any, Literal

#: Of the request that the current task or thread works for.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def configure(format: Literal["text", "json"], level: str) -> None:
    """Write all loggers' lines from `level` on to standard error."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_request_id)
    handler.setFormatter(_json_formatter() if format == "json" else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True


class _TextFormatter(logging.Formatter):
    """`INFO server.access: request method=GET … request_id=…`"""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        if getattr(record, "request_id", None) is not None:
            fields["request_id"] = record.request_id  # type: ignore[attr-defined]
        pairs = "".join(f" {key}={value}" for key, value in fields.items())
        return super().formatMessage(record) + pairs


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    class Formatter(JsonFormatter):
        def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
            log_data |= log_data.pop("fields", {})
            log_data.pop("color_message", None)  # uvicorn's, for a terminal
            return {key: value for key, value in log_data.items() if value is not None}

    return Formatter(
        ["levelname", "name", "message", "request_id"],
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
    )
