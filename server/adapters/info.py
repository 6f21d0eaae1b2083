"""What a client is told of an adapter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterInfo:
    """Bytes on the device and in the files; times in seconds since the epoch."""

    name: str
    digest: str
    method: str
    rank: int
    num_bytes: int
    file_bytes: int
    num_virtual_tokens: int
    modules: tuple[str, ...]
    created_at: float
    updated_at: float
    num_requests: int
    last_used_at: float | None
    pinned: bool
    tier: str
    residency: str
    num_running: int
    task: str
    labels: tuple[str, ...] | None
    problem_type: str | None
