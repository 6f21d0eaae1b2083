"""The official client's typed errors, its retries and its timeouts, against each refusal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.api.conftest import Clients
from tests.server.api.test_lifecycle import LONG, stream, wait_until
from tests.serving import Served, serve

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Served]:
    """One request at a time, and none that waits."""
    with serve(tmp_path, max_num_seqs=1, max_waiting=0, api_key="key") as served:
        served.http.headers["Authorization"] = "Bearer key"
        yield served
        served.wait_idle()


def test_each_status_has_its_type(small: Served, client_of: Clients) -> None:
    client = client_of(small)
    with pytest.raises(openai.AuthenticationError) as unknown:
        client_of(small, api_key="wrong").chat.completions.create(model="tiny", messages=HELLO)
    assert unknown.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="abc")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="abc", extra_body={"colour": 1})
    assert (bad.value.param, bad.value.code) == ("colour", "unknown_parameter")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="abc", max_tokens=10_000, stream=True)
    assert (bad.value.param, bad.value.code) == ("prompt", "context_length_exceeded")
    assert bad.value.request_id


def test_a_full_queue_is_a_rate_limit_whose_retry_after_is_kept(
    small: Served, client_of: Clients
) -> None:
    small.slow_down(0.01)
    with ThreadPoolExecutor(1) as pool:
        body = LONG | {"max_tokens": 60}
        busy = pool.submit(small.http.post, "/v1/completions", json=body)
        wait_until(lambda: small.runtime.engine.live)
        with pytest.raises(openai.RateLimitError) as full:
            client_of(small).chat.completions.create(model="tiny", messages=HELLO, stream=True)
        assert full.value.code == "queue_full"
        seconds = int(full.value.response.headers["retry-after"])
        # Its own first pause would be half a second.
        start = time.monotonic()
        patient = client_of(small, max_retries=1)
        assert patient.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        assert time.monotonic() - start >= seconds
        assert busy.result().status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
def test_a_late_answer_is_not_asked_for_again(
    tmp_path: Path, streamed: bool, client_of: Clients
) -> None:
    with serve(tmp_path, request_timeout=0.4) as server:
        server.slow_down(0.02)
        client = client_of(server, max_retries=3)
        with pytest.raises(openai.APIError) as late:  # noqa: PT012
            answer = client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=400, stream=streamed,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            list(answer)
        status = 200 if streamed else 504
        name = f'requests_total{{endpoint="/v1/chat/completions",status="{status}"}}'
        wait_until(lambda: f"{name} 1.0" in server.http.get("/metrics").text)
        assert late.value.code == "request_timeout"
        if not streamed:
            assert isinstance(late.value, openai.InternalServerError)
            assert late.value.status_code == 504
        server.wait_idle()


def test_a_client_that_gives_up_ends_the_work(small: Served, client_of: Clients) -> None:
    small.slow_down(0.05)  # 20 s in all
    with pytest.raises(openai.APITimeoutError):
        client_of(small, timeout=0.4).completions.create(
            model="tiny", prompt="abc", max_tokens=400, extra_body={"ignore_eos": True}
        )
    small.wait_idle(10)


def test_a_draining_server_is_unavailable(tmp_path: Path, client_of: Clients) -> None:
    with serve(tmp_path) as server:
        server.slow_down(0.002)
        client = client_of(server)
        assert client.models.list().data  # its connection stays open
        with stream(server, LONG) as events:
            server.server.should_exit = True
            wait_until(lambda: server.server._lifecycle.draining)
            with pytest.raises(openai.InternalServerError) as refused:
                client.completions.create(model="tiny", prompt="abc")
            assert (refused.value.status_code, refused.value.code) == (503, "draining")
            assert int(refused.value.response.headers["retry-after"]) > 0
            assert list(events)[-1] == "data: [DONE]"
