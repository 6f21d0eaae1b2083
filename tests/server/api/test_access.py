"""The line that each request leaves in the log, and the id by which its client finds it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest

from server import logs
from tests.server.api.conftest import Clients
from tests.server.api.test_lifecycle import LONG, wait_until
from tests.serving import Served


@pytest.fixture(autouse=True)
def root() -> Iterator[logging.Logger]:
    """The root logger, put back as it was."""
    logger = logging.getLogger()
    level, handlers = logger.level, logger.handlers[:]
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def configure(format: Literal["text", "json"], level: str) -> io.StringIO:
    """As the server does it, but to a stream in place of standard error."""
    logs.configure(format, level)
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.StreamHandler)
    written = io.StringIO()
    handler.setStream(written)
    return written


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def requests_in(stream: io.StringIO) -> list[dict[str, Any]]:
    return [line for line in lines_of(stream) if line["logger"] == "server.access"]


def test_one_json_line_a_request(server: Served) -> None:
    server.http.get("/health")  # once it is answered, what was asked before has been logged
    written = configure("json", "info")
    server.complete("poet", "abc", max_tokens=7)
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 5, "stream": True}
    answer = server.http.post("/v1/completions", json=body | {"ignore_eos": True})
    server.http.get("/v1/adapters/no%0Abody%20%22?key=secret")
    server.http.get("/health")
    wait_until(lambda: len(requests_in(written)) == 3)
    first, second, third = requests_in(written)
    assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/completions", 200)
    assert (first["adapter"], first["prompt_tokens"], first["output_tokens"]) == ("poet", 3, 7)
    assert 0 < first["seconds"] < 60
    assert "adapter" not in second
    assert (second["prompt_tokens"], second["output_tokens"]) == (2, 5)
    assert second["request_id"] == answer.headers["x-request-id"] != first["request_id"]
    assert (third["path"], third["status"]) == ("/v1/adapters/no%0Abody%20%22", 404)
    assert "secret" not in written.getvalue(), "queries are not logged"
    assert {"level", "time", "logger", "message"} <= set(first)


def test_no_terminals_colours_in_json(server: Served) -> None:
    written = configure("json", "info")
    extra = {"color_message": "Started \x1b[36m%d\x1b[0m"}  # as uvicorn does it
    logging.getLogger("uvicorn.error").info("Started %d", 7, extra=extra)
    (line,) = [line for line in lines_of(written) if line["logger"] == "uvicorn.error"]
    assert set(line) == {"level", "logger", "message", "time"}
    assert line["message"] == "Started 7"


def test_text_lines(server: Served) -> None:
    written = configure("text", "debug")
    server.http.get("/health", headers={"X-Request-Id": "mine"})
    wait_until(lambda: "request_id=mine" in written.getvalue())  # those before may come late
    (line,) = [line for line in written.getvalue().splitlines() if line.endswith("=mine")]
    assert line.startswith("DEBUG server.access: request method=GET path=/health status=200 ")
    assert line.endswith(" request_id=mine")


def test_a_client_that_left_is_logged_as_499(server: Served) -> None:
    written = configure("json", "info")
    step = server.runtime.engine.step
    server.slow_down(0.01)
    with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
        next(answer.iter_lines())
    wait_until(lambda: requests_in(written))
    server.runtime.engine.step = step  # type: ignore[method-assign]
    (line,) = requests_in(written)
    assert line["status"] == 200, "it had begun"
    assert 0 < line["output_tokens"] < LONG["max_tokens"]


@pytest.mark.parametrize(
    ("given", "taken"),
    [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("two words", False), ("", False),
     ("ï", False), ("tab\tbed", False)],
)  # fmt: skip
def test_request_ids(server: Served, given: str, taken: bool) -> None:
    headers = {b"X-Request-Id": given.encode("latin-1")}
    for path in ("/health", "/v1/models", "/nowhere"):
        answer = server.http.get(path, headers=headers)  # type: ignore[arg-type]
        found = answer.headers["x-request-id"]
        assert (found == given) is taken
        assert len(found) in (32, len(given) if taken else 32)


def test_the_openai_client_has_the_id(server: Served, client_of: Clients) -> None:
    client = client_of(server)
    extra = {"X-Request-Id": "mine"}
    answer = client.completions.create(model="tiny", prompt="abc", extra_headers=extra)
    assert answer._request_id == "mine"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody", extra_headers=extra)
    assert caught.value.request_id == "mine"


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_failure_is_logged_with_its_request(
    server: Served, format: Literal["text", "json"]
) -> None:
    """With the traceback; the client is told the id and nothing of the inside."""
    written = configure(format, "info")
    listing = server.runtime.adapters.list

    def fail() -> Any:
        raise RuntimeError("the inside")

    server.runtime.adapters.list = fail  # type: ignore[method-assign]
    answer = server.http.get("/v1/adapters", headers={"X-Request-Id": "mine"})
    server.runtime.adapters.list = listing  # type: ignore[method-assign]
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine"
    assert "the inside" not in answer.text
    wait_until(lambda: "the inside" in written.getvalue())
    assert "Traceback" in written.getvalue()
    assert "mine" in written.getvalue()
