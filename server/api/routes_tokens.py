"""POST /tokenize and /detokenize, as vLLM's: a prompt's tokens, and tokens' text."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from server.api.fields import check_token_ids
from server.api.responses import Detokenized, Tokens
from server.api.schemas import DetokenizeRequest, TokenizeRequest
from server.api.state import runtime_of
from server.api.tools import toolbox

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Tokens:
    """The tokens that a completion of `prompt`, or a chat's answer to `messages`, starts from."""
    runtime = runtime_of(request)
    tokenizer = runtime.tokenizer
    with runtime.adapters.lease(body.model or runtime.base_name, None) as lease:
        if body.messages is not None:
            tools = toolbox(body.tools, None, True, tokenizer.tool_template)
            messages, native = tools.prompt([message.to_template() for message in body.messages])
            tokens = await run_in_threadpool(
                tokenizer.chat, messages, native,
                add_generation_prompt=body.add_generation_prompt,
                add_special_tokens=bool(body.add_special_tokens),
            )  # fmt: skip
        else:
            tokens = await run_in_threadpool(
                tokenizer.encode, body.prompt or "",
                add_special_tokens=body.add_special_tokens is not False,
            )  # fmt: skip
        max_model_len = runtime.max_model_len - lease.num_virtual_tokens
    return Tokens(tokens=tokens, count=len(tokens), max_model_len=max_model_len)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Detokenized:
    runtime = runtime_of(request)
    with runtime.adapters.lease(body.model or runtime.base_name, None):
        check_token_ids(body.tokens, runtime.tokenizer.vocab_size, "tokens")
        return Detokenized(prompt=await run_in_threadpool(runtime.tokenizer.text, body.tokens))
