"""Both Python clients against a real server."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import torch
from safetensors.torch import save_file

from clients.adapter_files import WEIGHTS_NAME
from clients.client import AsyncClient, Client, Retries
from clients.errors import (
    ApiError,
    BadRequest,
    ConnectionFailed,
    InvalidInput,
    NotFound,
    RateLimited,
    TooLarge,
    Unauthorized,
    Unprocessable,
)
from clients.results import Reply
from tests import tiny
from tests.clients.conftest import LABELS, classifiers
from tests.server.engine.test_fleet import peft_logits
from tests.serving import Served, serve

T = TypeVar("T")

HELLO = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
LONG: dict[str, Any] = {"max_tokens": 480, "ignore_eos": True}


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def test_complete(client: Client, server: Served) -> None:
    reply = client.complete("abc", "poet", **GREEDY)
    assert reply.text == server.complete("poet", "abc")
    assert (reply.model, reply.finish_reason) == ("poet", "length")
    assert (reply.num_prompt_tokens, reply.num_completion_tokens) == (3, 12)
    with client.stream_complete("abc", "poet", **GREEDY) as stream:
        assert "".join(stream) == reply.text
    assert stream.reply.text == reply.text
    assert (stream.reply.finish_reason, stream.reply.model) == ("length", "poet")
    assert (stream.reply.num_prompt_tokens, stream.reply.num_completion_tokens) == (3, 12)


def test_what_has_no_field_is_in_raw(client: Client) -> None:
    reply = client.complete("abc", "poet", logprobs=2, n=2, **GREEDY)
    assert [choice["index"] for choice in reply.raw["choices"]] == [0, 1]
    assert len(reply.raw["choices"][0]["logprobs"]["tokens"]) == 12


def test_the_base_is_the_default_model(client: Client, server: Served) -> None:
    assert client.models() == ["tiny", "poet"]
    assert client.complete("abc", **GREEDY).text == server.complete("tiny", "abc")
    assert client.health()["status"] == "ok"


def test_chat(client: Client) -> None:
    reply = client.chat(HELLO, "poet", **GREEDY)
    with client.stream_chat(HELLO, "poet", **GREEDY) as stream:
        assert "".join(stream) == reply.text
    mixture = client.chat(HELLO, adapters=[{"name": "poet", "weight": 1.0}], **GREEDY)
    assert mixture.text == reply.text


def test_push_list_show_remove(client: Client, server: Served) -> None:
    folder = server.make_adapter("ia3", 2)
    sent: list[int] = []
    pushed = client.adapters.push("new", folder, sent.append)
    assert (pushed.status, pushed.method) == ("created", "IA3")
    assert max(sent) == (folder / WEIGHTS_NAME).stat().st_size
    assert client.adapters.push("new", folder).status == "unchanged"
    assert [adapter.name for adapter in client.adapters.list()] == ["new", "poet"]
    assert client.adapters.get("new").digest == pushed.digest
    assert client.adapters.remove("new").name == "new"
    with pytest.raises(NotFound, match="new"):
        client.adapters.get("new")


def test_push_takes_the_file_as_adapterhub_names_it(client: Client, server: Served) -> None:
    folder = server.make_adapter("ia3", 3)
    weights = (folder / WEIGHTS_NAME).rename(folder / "adapter.safetensors")
    assert client.adapters.push("renamed", folder).status == "created"
    assert client.adapters.push("renamed", weights).status == "unchanged"
    client.adapters.remove("renamed")


def test_pin_unpin_prefetch(client: Client, server: Served) -> None:
    client.adapters.push("new", server.make_adapter("ia3", 4))
    prefetched = client.adapters.prefetch("new")
    assert (prefetched.name, prefetched.pinned) == ("new", False)
    assert client.adapters.pin("new").pinned
    while client.adapters.get("new").residency != "device":
        time.sleep(0.01)
    assert client.adapters.get("new").tier == "device"
    assert [a.name for a in client.adapters.list() if a.pinned] == ["new"]
    assert not client.adapters.unpin("new").pinned
    client.adapters.remove("new")
    for act in (client.adapters.pin, client.adapters.unpin, client.adapters.prefetch):
        with pytest.raises(NotFound, match="new"):
            act("new")


def test_a_server_with_keys(tmp_path: Path) -> None:
    with serve(tmp_path, api_key="secret") as served:
        with Client(served.url, "secret") as client:
            assert client.models() == ["tiny"]
        for key in (None, "wrong"):
            with Client(served.url, key) as client, pytest.raises(Unauthorized) as refused:
                client.models()
            assert refused.value.code == "invalid_api_key"
            assert refused.value.request_id


def test_a_full_queue_is_asked_again(tmp_path: Path) -> None:
    """Six requests for a server that has room for two at a time: all are answered in the end."""

    async def ask(url: str, retries: Retries) -> list[Reply | BaseException]:
        async with AsyncClient(url, retries=retries) as client:
            asked = [client.complete(f"prompt {i}", "tiny", **GREEDY) for i in range(6)]
            return await asyncio.gather(*asked, return_exceptions=True)

    with serve(tmp_path, max_num_seqs=1, max_waiting=1) as served:
        once = run(ask(served.url, Retries(max_retries=0)))
        refused = [error for error in once if isinstance(error, RateLimited)]
        assert 0 < len(refused) < 6
        assert all(error.retry_after is not None for error in refused)
        again = run(ask(served.url, Retries(max_retries=20)))
        assert all(isinstance(reply, Reply) for reply in again)


def test_typed_errors(client: Client, server: Served, tmp_path: Path) -> None:
    with pytest.raises(NotFound) as missing:
        client.complete("abc", "nobody")
    assert (missing.value.status, missing.value.param) == (404, "model")
    assert missing.value.code == "model_not_found"
    with pytest.raises(BadRequest, match="temperature"):
        client.chat(HELLO, temperature=9)
    with pytest.raises(BadRequest, match="colour"), client.stream_chat(HELLO, colour="red"):
        pass
    folder = server.make_adapter("lora-r4", 3)
    save_file({"nobody.weight": torch.zeros(3)}, folder / WEIGHTS_NAME)
    with pytest.raises(Unprocessable, match="missing from the weights"):
        client.adapters.push("bad", folder)
    save_file({"nobody.weight": torch.zeros(5 << 18)}, folder / WEIGHTS_NAME)
    with pytest.raises(TooLarge, match=str(4 << 20)):
        client.adapters.push("bad", folder)
    with pytest.raises(InvalidInput, match=WEIGHTS_NAME):
        client.adapters.push("bad", tmp_path)
    with pytest.raises(NotFound):
        client.adapters.get("../../health")


def test_classify_and_embed(client: Client, server: Served) -> None:
    """As peft has it, whose logits and hidden states are softmaxed and averaged here."""
    folders = classifiers(server)
    for name, folder in folders.items():
        client.adapters.push(name, folder)
    ids = server.runtime.tokenizer.encode("abcd")
    logits = peft_logits(tiny.for_task(server.model, "SEQ_CLS", 3), folders["mood"], ids)[0]
    found = client.classify(["xy", "abcd"], "mood")
    assert [c.index for c in found] == [0, 1]
    assert found[1].probs == pytest.approx(logits.softmax(-1).tolist(), abs=1e-4)
    assert found[1].label == LABELS[int(logits.argmax())]
    assert (found[1].num_classes, found[1].tokens) == (3, None)
    (tokens,) = client.classify(["abc"], "names")
    assert tokens.tokens is not None
    assert [(t.token, t.start, t.end) for t in tokens.tokens] == [
        *(("a", 0, 1), ("b", 1, 2), ("c", 2, 3))
    ]
    assert (tokens.label, tokens.probs, tokens.num_classes) == (None, None, 4)
    with pytest.raises(BadRequest, match="has no classes"):
        client.classify(["abc"], "poet")

    made = client.embed(["abcd", "x"], pooling="mean", normalize=False)
    with torch.inference_mode():
        hidden = server.model.base_model(torch.tensor([ids])).last_hidden_state[0]
    assert made.vectors[0] == pytest.approx(hidden.mean(0).tolist(), abs=1e-4)
    assert (len(made.vectors), made.num_prompt_tokens, made.model) == (2, 5, "tiny")
    with pytest.raises(InvalidInput, match="encoding_format"):
        client.embed(["x"], encoding_format="base64")

    async def work() -> None:
        async with AsyncClient(server.url) as other:
            assert await other.classify(["xy", "abcd"], "mood") == found
            again = await other.embed(["abcd", "x"], pooling="mean", normalize=False)
            assert again == made

    run(work())
    for name in folders:
        client.adapters.remove(name)


def left_early(server: Served) -> bool:
    """Whether the engine stopped before it had generated all that was asked for."""
    sequences = server.runtime.engine.live
    server.wait_idle()
    return all(seq.num_output_tokens < LONG["max_tokens"] for seq in sequences)


def test_leaving_a_stream_ends_the_work(client: Client, slow_server: Served) -> None:
    with client.stream_complete("abc", "poet", **LONG) as stream:
        next(iter(stream))
        assert slow_server.runtime.engine.live
    assert left_early(slow_server)
    with suppress(KeyError), client.stream_chat(HELLO, "poet", **LONG) as stream:
        for _ in stream:
            raise KeyError
    assert left_early(slow_server)
    assert client.complete("abc", "poet", **GREEDY).text  # and the client goes on


def test_the_server_keeps_a_connection_for_longer_than_its_clients(server: Served) -> None:
    """Else a request is now and then sent into a connection that the server is closing."""
    kept = httpx.Limits().keepalive_expiry
    assert kept is not None
    assert server.server.config.timeout_keep_alive > 2 * kept


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = time.monotonic()
    retries = Retries(max_retries=2, first_wait=0.05)
    with (
        Client(f"http://127.0.0.1:{port}", retries=retries) as client,
        pytest.raises(ConnectionFailed, match=str(port)),
    ):
        client.models()
    assert 0.1 < time.monotonic() - start < 5


@pytest.mark.parametrize(
    "url", ["127.0.0.1", "ftp://host", "http://", "http://a:b", "localhost:80"]
)
def test_what_is_no_url_of_a_server(url: str) -> None:
    with pytest.raises(InvalidInput, match="URL"):
        Client(url)


# -- asyncio ---------------------------------------------------------------------------------------


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def test_the_async_client_answers_the_same(client: Client, server: Served) -> None:
    folder = server.make_adapter("ia3", 7)

    async def work() -> None:
        async with AsyncClient(server.url) as other:
            assert await other.models() == client.models()
            assert await other.base_model() == client.base_model()
            assert (await other.health())["status"] == "ok"
            assert "polypeft_requests_total" in await other.metrics()
            reply = await other.complete("abc", "poet", **GREEDY)
            assert reply.text == client.complete("abc", "poet", **GREEDY).text
            spoken = await other.chat(HELLO, **GREEDY)
            assert spoken.text == client.chat(HELLO, **GREEDY).text
            async with other.stream_complete("abc", "poet", **GREEDY) as stream:
                assert "".join([piece async for piece in stream]) == reply.text
            assert stream.reply.num_completion_tokens == 12
            async with other.stream_chat(HELLO, **GREEDY) as stream:
                assert "".join([piece async for piece in stream]) == spoken.text
            sent: list[int] = []
            pushed = await other.adapters.push("new", folder, sent.append)
            assert pushed.status == "created"
            assert max(sent) == (folder / WEIGHTS_NAME).stat().st_size
            assert [a.name for a in await other.adapters.list()] == ["new", "poet"]
            assert (await other.adapters.get("new")).digest == pushed.digest
            assert (await other.adapters.prefetch("new")).name == "new"
            assert (await other.adapters.pin("new")).pinned
            assert not (await other.adapters.unpin("new")).pinned
            assert (await other.adapters.remove("new")).name == "new"
            with pytest.raises(NotFound, match="new"):
                await other.adapters.get("new")
            with pytest.raises(BadRequest, match="colour"):
                async with other.stream_chat(HELLO, colour="red"):
                    pass

    run(work())


def test_many_at_once(server: Served) -> None:
    async def work() -> list[str]:
        async with AsyncClient(server.url) as client:
            prompts = [f"prompt {i}" for i in range(8)]
            replies = await asyncio.gather(
                *(client.complete(prompt, "poet", **GREEDY) for prompt in prompts)
            )
            return [reply.text for reply in replies]

    assert run(work()) == [server.complete("poet", f"prompt {i}") for i in range(8)]


def test_leaving_an_async_stream_ends_the_work(slow_server: Served) -> None:
    async def leave() -> None:
        async with (
            AsyncClient(slow_server.url) as client,
            client.stream_complete("abc", "poet", **LONG) as stream,
        ):
            async for _ in stream:
                break

    async def be_cancelled() -> None:
        begun = asyncio.Event()

        async def listen() -> None:
            async with (
                AsyncClient(slow_server.url) as client,
                client.stream_chat(HELLO, "poet", **LONG) as stream,
            ):
                async for _ in stream:
                    begun.set()

        task = asyncio.create_task(listen())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for work in (leave, be_cancelled):
        run(work())
        assert left_early(slow_server)


def test_nobody_listens_to_the_async_client() -> None:
    async def work() -> None:
        retries = Retries(max_retries=1, first_wait=0.01)
        async with AsyncClient("http://127.0.0.1:1", retries=retries) as client:
            with pytest.raises(ConnectionFailed):
                await client.models()

    run(work())


def test_api_error_is_the_base_of_what_the_server_refuses() -> None:
    assert issubclass(NotFound, ApiError)
    assert issubclass(InvalidInput, ValueError)
