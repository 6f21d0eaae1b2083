"""API keys: where they come from, and what a server that has some answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from server.__main__ import warn_if_open
from server.api.keys import KeyRing, key_ring
from tests import tiny
from tests.server.api.conftest import Clients
from tests.serving import Served, serve

KEYS = ["first-key", "second~key!"]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text(f"# a comment\n\n{KEYS[0]}\n  {KEYS[1]}  \n")
    with serve(folder, api_key_file=folder / "keys", api_key="third-key") as served:
        yield served


@pytest.mark.parametrize("key", [*KEYS, "third-key"])
def test_each_key_opens(locked: Served, key: str, client_of: Clients) -> None:
    client = client_of(locked, api_key=key)
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = locked.http.get("/v1/models", headers={"Authorization": f"bEARER {key}"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer first-ke", "Bearer first-key2", "Basic first-key",
     "first-key", "Bearer # a comment", "Bearer fïrst-key", "Bearer first-key second~key!"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/adapters"),
     ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nowhere"), ("GET", "/health/")],
)  # fmt: skip
def test_anything_else_is_401(locked: Served, method: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {b"Authorization": header.encode("latin-1")}
    answer = locked.http.request(method, path, headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert all(key not in answer.text for key in KEYS)


def test_the_openai_client_knows_the_error(locked: Served, client_of: Clients) -> None:
    client = client_of(locked, api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_probes_need_no_key(locked: Served) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert locked.http.get(path).status_code == 200


def test_no_key_is_ever_logged(locked: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for key in (KEYS[0], "wrong-key"):
            locked.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    ours = [r for r in caplog.records if r.name.startswith(("server", "uvicorn"))]
    assert ours
    assert not any(KEYS[0] in str(vars(r)) or "wrong-key" in str(vars(r)) for r in ours)


@pytest.mark.parametrize("content", ["", "# only a comment\n", "two words\n", "nön-ascii\n"])
def test_a_file_without_good_keys_locks_the_start(tmp_path: Path, content: str) -> None:
    """It does not open the server to everybody, and the message quotes no key."""
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ValueError, match="--api-key-file") as caught:
        key_ring(tiny.settings(tmp_path, api_key_file=path))
    assert content.strip() not in str(caught.value) or not content.strip()
    with pytest.raises(ValueError, match="--api-key-file"):
        key_ring(tiny.settings(tmp_path, api_key_file=tmp_path / "missing"))
    with pytest.raises(ValueError, match="--api-key: key 1"):
        key_ring(tiny.settings(tmp_path, api_key=""))


def test_no_keys_no_ring(tmp_path: Path) -> None:
    assert key_ring(tiny.settings(tmp_path)) is None


def test_only_hashes_are_kept() -> None:
    ring = KeyRing(KEYS)
    assert all(key in ring for key in KEYS)
    assert "other" not in ring
    assert not any(key in repr(vars(ring)) for key in KEYS)


@pytest.mark.parametrize(
    ("host", "has_keys", "warns"),
    [
        ("127.0.0.1", False, False),
        ("::1", False, False),
        ("localhost", False, False),
        ("0.0.0.0", False, True),
        ("::", False, True),
        ("somewhere", False, True),
        ("0.0.0.0", True, False),
    ],
)
def test_a_port_that_is_open_to_all_is_told(
    host: str, has_keys: bool, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_open(host, has_keys=has_keys)
    assert ("--api-key-file" in caplog.text) == warns
