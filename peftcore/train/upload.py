"""Sending a trained adapter to a polypeft server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx

from peftcore.config import CONFIG_NAME, WEIGHTS_NAME

#: Of the model that a classifier was trained in.
MODEL_CONFIG_NAME = "config.json"


class UploadError(RuntimeError):
    """The server did not take the adapter; the message says what it answered."""


def upload(folder: Path, url: str, name: str, api_key: str | None = None) -> str:
    """Register the adapter in `folder` under `name`; returns its digest.

    Raises:
        UploadError: the server cannot be reached or refuses. The folder stays as it is.
    """
    weights = next(
        (p for p in (folder / WEIGHTS_NAME, folder / "adapter.safetensors") if p.is_file()), None
    )
    if weights is None:
        raise UploadError(f"{folder} holds no adapter")
    key = api_key or os.environ.get("POLYPEFT_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    target = f"{url.rstrip('/').removesuffix('/v1')}/v1/adapters"
    try:
        with (folder / CONFIG_NAME).open("rb") as config, weights.open("rb") as data:
            files: dict[str, Any] = {"config": config, "weights": data}
            if (folder / MODEL_CONFIG_NAME).is_file():  # what a classifier's classes are called
                files["id2label"] = (folder / MODEL_CONFIG_NAME).read_bytes()
            answer = httpx.post(
                target,
                data={"name": name},
                files=files,
                headers=headers,
                timeout=httpx.Timeout(30, read=300, write=300),
            )
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise UploadError(f"{target}: {exc or type(exc).__name__}") from None
    if not answer.is_success:
        raise UploadError(f"{target} answered {answer.status_code}: {_message(answer)}")
    return str(answer.json().get("digest", ""))


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
