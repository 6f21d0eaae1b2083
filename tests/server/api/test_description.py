"""Every answer is as the server's own OpenAPI description says, whatever is sent; the answers of
operations that are OpenAI's also are as OpenAI's description says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema
import openai
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving import Served, serve

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
#: For each operation, of what its schema allows and of what it does not; more by environment.
NUM_EXAMPLES = int(os.environ.get("POLYPEFT_TEST_EXAMPLES", "25"))
OPENAI = json.loads((Path(__file__).parent / "openai" / "responses.json").read_text())
KEY = "the-key"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("described")
    with serve(
        folder, max_model_len=64, api_key=KEY, lora_root=folder, max_upload="1MiB"
    ) as served:
        served.http.headers["Authorization"] = f"Bearer {KEY}"
        assert served.push("poet", served.make_adapter("lora-r4", 1)).status_code == 201
        yield served
        served.wait_idle()


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def operations(server: Served) -> list[Any]:
    raw = server.http.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(raw)
    return [operation.ok() for operation in schema.get_all_operations()]


def send(server: Served, session: requests.Session, case: Any, known: bool) -> int:
    """One case, checked; where `known`, with names that the server knows in the place of random
    ones. Returns the status."""
    if known:
        if isinstance(case.body, dict):
            case.body |= {key: "poet" for key in ("model", "lora_name") if key in case.body}
        if isinstance(case.path_parameters, dict):
            case.path_parameters |= dict.fromkeys(case.path_parameters, "poet")
    answer = case.call_and_validate(
        base_url=server.url,
        session=session,
        headers={"Authorization": f"Bearer {KEY}"},
        checks=CHECKS,
        timeout=30,
    )
    return answer.status_code


@pytest.mark.filterwarnings("ignore")  # schemathesis' own
def test_every_operation_answers_as_described(server: Served, closing: ExitStack) -> None:
    """All that the application has, as it describes itself: a new route needs no new test."""
    tested, seen = set(), set()
    poet = server.make_adapter("lora-r4", 1)
    session = closing.enter_context(requests.Session())
    for operation in operations(server):
        assert server.push("poet", poet).status_code in (200, 201), "some operations delete it"
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(
                max_examples=NUM_EXAMPLES,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
            def check(case: Any, known: bool) -> None:
                seen.add(send(server, session, case, known))

            try:
                check()
            except Exception as exc:
                # Nothing of an operation without parameters is wrong.
                if type(exc).__name__ != "Unsatisfiable":
                    raise
            else:
                tested.add((operation.method.upper(), operation.path))
    described = server.http.get("/openapi.json").json()["paths"]
    assert seen >= {200, 202, 400, 404}, "not only refusals"
    assert tested == {(m.upper(), path) for path, ways in described.items() for m in ways}
    server.push("poet", poet)


def test_every_route_is_described(server: Served) -> None:
    """So that the test above covers all there are; pages for people apart."""
    described = set(server.http.get("/openapi.json").json()["paths"])
    for path in ("/v1/models", "/v1/chat/completions", "/v1/load_lora_adapter", "/ready"):
        assert path in described
    app = server.server.config.app
    hidden = {r.path for r in app.routes if getattr(r, "include_in_schema", None) is False}  # type: ignore[union-attr]
    assert hidden <= {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}


def test_keys_are_described(server: Served) -> None:
    description = server.http.get("/openapi.json").json()
    assert description["security"] == [{"key": []}]
    assert description["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


# -- OpenAI's -------------------------------------------------------------------------------------


def conforms(value: Any, name: str) -> None:
    jsonschema.validate(
        value,
        {**OPENAI, "$ref": f"#/$defs/{name}"},
        format_checker=jsonschema.FormatChecker(),
        cls=jsonschema.Draft202012Validator,
    )


def ask(server: Served, path: str, body: dict[str, Any]) -> httpx.Response:
    return server.http.post(path, json={"model": "poet", "max_tokens": 4} | body)


HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    "fields",
    [{}, {"n": 2}, {"logprobs": 2}, {"stop": "a"}, {"prompt": ["a", "b"], "max_tokens": 1}],
)
def test_completions_conform(server: Served, fields: dict[str, Any]) -> None:
    answer = ask(server, "/v1/completions", {"prompt": "abc"} | fields)
    assert answer.status_code == 200
    conforms(answer.json(), "CreateCompletionResponse")


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}])
def test_chats_conform(server: Served, fields: dict[str, Any]) -> None:
    answer = ask(server, "/v1/chat/completions", HELLO | fields)
    assert answer.status_code == 200
    conforms(answer.json(), "CreateChatCompletionResponse")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = ask(server, "/v1/chat/completions", HELLO | fields | options)
    events = [e.removeprefix("data: ") for e in answer.text.split("\n\n") if e]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    for chunk in chunks:
        conforms(chunk, "CreateChatCompletionStreamResponse")


@pytest.mark.parametrize("fields", [{"input": "a"}, {"input": ["a", "b"]}, {"input": [5, 6]}])
def test_embeddings_conform(server: Served, fields: dict[str, Any]) -> None:
    answer = server.http.post("/v1/embeddings", json={"model": "poet"} | fields)
    assert answer.status_code == 200
    conforms(answer.json(), "CreateEmbeddingResponse")


def test_models_conform(server: Served) -> None:
    conforms(server.http.get("/v1/models").json(), "ListModelsResponse")
    conforms(server.http.get("/v1/models/poet").json(), "Model")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("POST", "/v1/completions", {}), ("POST", "/v1/chat/completions", {"colour": 1}),
     ("GET", "/v1/models/nobody", None), ("GET", "/nowhere", None), ("PUT", "/v1/models", None),
     ("POST", "/v1/adapters", {}), ("DELETE", f"/v1/adapters/{quote('a b')}", None)],
)  # fmt: skip
def test_errors_conform(server: Served, method: str, path: str, body: Any) -> None:
    answer = server.http.request(method, path, json=body)
    assert answer.status_code >= 400
    conforms(answer.json(), "ErrorResponse")
    answer = server.http.request(method, path, json=body, headers={"Authorization": ""})
    assert answer.status_code == 401
    conforms(answer.json(), "ErrorResponse")


def test_the_extract_refuses_what_is_wrong() -> None:
    with pytest.raises(jsonschema.ValidationError):
        conforms({"id": "x"}, "CreateCompletionResponse")
    with pytest.raises(jsonschema.ValidationError):
        conforms({"error": {"message": "x"}}, "ErrorResponse")


#: Of a schema's keywords those that only tell.
PROSE = {"description", "title", "example", "examples", "default", "deprecated", "discriminator"}


def constraints(value: Any, *, are_names: bool = False) -> Any:
    """A schema without prose and extensions; `nullable` as JSON Schema has it."""
    if isinstance(value, list):
        return [constraints(item) for item in value]
    if isinstance(value, str):
        return value.replace("#/components/schemas/", "#/$defs/")
    if not isinstance(value, dict):
        return value
    found = {
        key: constraints(part, are_names=key == "properties" and not are_names)
        for key, part in value.items()
        if are_names or not (key in PROSE or key.startswith("x-"))
    }
    if are_names or not found.pop("nullable", False):
        return found
    if "type" not in found:
        return {"anyOf": [found, {"type": "null"}]}
    if "enum" in found:
        found["enum"] = [*found["enum"], None]
    return found | {"type": [found["type"], "null"]}


def test_the_extract_is_openais(server: Served) -> None:
    """As the whole description has it, where POLYPEFT_OPENAI_DESCRIPTION names its file."""
    path = os.environ.get("POLYPEFT_OPENAI_DESCRIPTION")
    if path is None:
        pytest.skip("POLYPEFT_OPENAI_DESCRIPTION is not set")
    import yaml

    whole = yaml.load(Path(path).read_text(), Loader=yaml.CSafeLoader)["components"]["schemas"]
    for name, schema in OPENAI["$defs"].items():
        assert constraints(schema) == constraints(whole[name]), name


def test_the_openai_client_needs_the_key(server: Served) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        assert client.models.retrieve("poet").id == "poet"
