"""What a client returns. Sizes in bytes, times in seconds since the epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Adapter:
    """What the server says of an adapter.

    Attributes:
        digest: its identity; a name can be flipped to another.
        num_bytes, file_bytes: on the device, and in its files.
        residency: "device", "host", "disk" or "loading".
        tier: where its bytes lie, "device", "host" or "disk"; None from a server without tiers.
        pinned: whether it is kept on the device.
        task: what it was trained for, as "CAUSAL_LM" or "SEQ_CLS".
        labels, problem_type: what its classes are called and how they are asked; None from one
            that does not classify, `problem_type` also where nobody said.
        status: only after a push: "created", "updated" or "unchanged".
    """

    name: str
    digest: str
    method: str
    rank: int
    num_bytes: int
    file_bytes: int
    num_virtual_tokens: int
    modules: Sequence[str]
    created_at: float
    updated_at: float
    num_requests: int
    last_used_at: float | None
    residency: str
    num_running: int
    tier: str | None = None
    pinned: bool = False
    task: str | None = None
    labels: Sequence[str] | None = None
    problem_type: str | None = None
    status: str | None = None

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Adapter:
        """Fields that a newer server adds are passed over."""
        return cls(**{f.name: body[f.name] for f in fields(cls) if f.name in body})


@dataclass(frozen=True)
class Reply:
    """A finished answer, of its first choice.

    Attributes:
        raw: the whole answer as the server sent it, with log probabilities and all choices; of a
            stream its last event.
    """

    text: str
    model: str
    finish_reason: str | None
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, text: str, finish_reason: str | None, usage: Mapping[str, Any], raw: Mapping[str, Any]
    ) -> Reply:
        return cls(
            text=text,
            model=raw.get("model", ""),
            finish_reason=finish_reason,
            num_prompt_tokens=usage.get("prompt_tokens", 0),
            num_completion_tokens=usage.get("completion_tokens", 0),
            num_cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            raw=raw,
        )


@dataclass(frozen=True)
class ClassifiedToken:
    """A token's class; `start` and `end` count the text's characters."""

    token: str
    start: int | None
    end: int | None
    label: str
    score: float


@dataclass(frozen=True)
class Entity:
    """Neighbouring tokens of one class: characters `start` to `end` of the text."""

    text: str
    start: int
    end: int
    label: str
    score: float


@dataclass(frozen=True)
class Classification:
    """One text's class, or its tokens' classes.

    Attributes:
        index: which of the texts.
        label, probs: the likeliest class, and the probability of every one in the model's order;
            None from a regression and from an adapter that classifies tokens.
        labels: of multi-label classes those of probability 0.5 and more.
        values: from a regression alone.
        tokens, entities: from an adapter that classifies tokens, the one or the other.
    """

    index: int
    num_classes: int
    label: str | None = None
    probs: Sequence[float] | None = None
    labels: Sequence[str] | None = None
    values: Sequence[float] | None = None
    tokens: Sequence[ClassifiedToken] | None = None
    entities: Sequence[Entity] | None = None

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Classification:
        known = {f.name: body[f.name] for f in fields(cls) if f.name in body}
        for name, kind in (("tokens", ClassifiedToken), ("entities", Entity)):
            if known.get(name) is not None:
                known[name] = [
                    kind(**{f.name: part[f.name] for f in fields(kind)}) for part in known[name]
                ]
        return cls(**known)


@dataclass(frozen=True)
class Embeddings:
    """One vector a text, in the texts' order."""

    vectors: Sequence[Sequence[float]]
    model: str
    num_prompt_tokens: int

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Embeddings:
        rows = sorted(body["data"], key=lambda row: row["index"])
        usage = body.get("usage") or {}
        return cls([row["embedding"] for row in rows], body["model"], usage.get("prompt_tokens", 0))


__all__ = ["Adapter", "Classification", "ClassifiedToken", "Embeddings", "Entity", "Reply"]
