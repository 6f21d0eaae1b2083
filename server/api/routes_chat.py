"""POST /v1/chat/completions: the assistant's next turn in a conversation."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from server.api.generation import (
    Deltas,
    UsageCounter,
    chat_logprobs,
    collect,
    generate,
)
from server.api.responses import (
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FinishReason,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from server.api.schemas import ChatCompletionRequest
from server.api.state import metrics_of, runtime_of
from server.api.streaming import DONE, EventStream, event, unless_gone
from server.api.tool_parser import ArgumentsPiece, CallStart, Piece, Text, ToolCallParser
from server.api.tools import Toolbox, toolbox
from server.engine.sequence import SampledToken, SamplingParams
from server.tokenization import Tokenizer

if TYPE_CHECKING:
    from server.runtime import Runtime

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    runtime = runtime_of(request)
    tokenizer = runtime.tokenizer
    async with AsyncExitStack() as stack:
        lease = stack.enter_context(runtime.adapters.lease(body.model, body.mixture()))
        runtime.check_generates(lease)
        tools = toolbox(
            body.tools, body.tool_choice, body.parallel_tool_calls, tokenizer.tool_template
        )
        messages, native = tools.prompt([message.to_template() for message in body.messages])
        prompt = await run_in_threadpool(tokenizer.chat, messages, native)
        room = runtime.max_model_len - lease.num_virtual_tokens - len(prompt)
        params = body.sampling(room, tokenizer.vocab_size)
        params = await _constrained(runtime, body, tools, params)
        deltas = await stack.enter_async_context(
            aclosing(generate(runtime, [prompt], params, lease, body.n, metrics_of(request)))
        )
        usage = UsageCounter(len(prompt), body.n)
        writer = _Writer(
            tokenizer,
            lease.label,
            with_logprobs=params.logprobs is not None,
            parser=tools.parser if tools.tools else None,
        )
        if body.stream:
            events = writer.events(deltas, usage, body.include_usage)
            first = await unless_gone(request.receive, anext(events))
            return EventStream(first, events, stack.pop_all())
        whole = writer.whole(deltas, body.n, usage)
        return JSONResponse(await unless_gone(request.receive, whole))


async def _constrained(
    runtime: Runtime, body: ChatCompletionRequest, tools: Toolbox, params: SamplingParams
) -> SamplingParams:
    """With the grammar of what the request asks for and of its calls, and the calls' end."""
    constraint = tools.constraint(body.constraint(), runtime.grammars.followed)
    if constraint is not None:
        params = replace(params, grammar=await runtime.grammars.compile(constraint))
    elif tools.stop:  # a grammar ends by itself
        params = replace(params, stop=(*params.stop, *tools.stop))
    return params


class _Writer:
    """Puts one request's choices into OpenAI's words.

    Args:
        parser: makes a parser of tool calls for each choice; None where none can be made.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        label: str,
        *,
        with_logprobs: bool,
        parser: Callable[[], ToolCallParser] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._parser = parser
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": label,
        }

    async def whole(self, deltas: Deltas, num_choices: int, usage: UsageCounter) -> dict[str, Any]:
        choices = []
        for choice in await collect(deltas, num_choices, usage):
            message, has_calls = self._message(choice.text)
            choices.append(
                ChatChoice(
                    index=choice.index,
                    message=message,
                    logprobs=self._logprobs(choice.tokens),
                    finish_reason=_reason(choice.finish_reason, has_calls),
                )
            )
        return ChatCompletion(
            **self._head, object="chat.completion", choices=choices, usage=usage.usage()
        ).model_dump(exclude_unset=True)

    def _message(self, text: str) -> tuple[ChatMessage, bool]:
        """The message of a whole text, and whether it calls tools."""
        if self._parser is None:
            return ChatMessage(role="assistant", content=text, refusal=None), False
        parser = self._parser()
        content, calls = "", []
        for piece in [*parser.push(text), *parser.finish()]:
            match piece:
                case Text():
                    content += piece.text
                case CallStart():
                    function = CalledFunction(name=piece.name, arguments="")
                    calls.append(ToolCall(id=_call_id(), type="function", function=function))
                case ArgumentsPiece():
                    calls[piece.index].function.arguments += piece.text
        if not calls:
            return ChatMessage(role="assistant", content=content, refusal=None), False
        said = content if content.strip() else None
        return ChatMessage(role="assistant", content=said, refusal=None, tool_calls=calls), True

    async def events(
        self, deltas: Deltas, usage: UsageCounter, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        no_usage = {"usage": None} if include_usage else {}

        def chunk(
            index: int,
            delta: ChatDelta,
            logprobs: ChatLogprobs | None = None,
            reason: FinishReason | None = None,
        ) -> str:
            choice = ChatChunkChoice(
                index=index, delta=delta, logprobs=logprobs, finish_reason=reason
            )
            return self._event(choices=[choice], **no_usage)

        parsers: dict[int, ToolCallParser | None] = {}
        async for item in deltas:
            usage.add(item)
            if item.index not in parsers:
                parsers[item.index] = self._parser() if self._parser else None
                yield chunk(item.index, ChatDelta(role="assistant", content=""))
            parser = parsers[item.index]
            logprobs = self._logprobs(item.tokens) if item.tokens else None
            if parser is None:
                said = [ChatDelta(content=item.text)] if item.text else []
            else:
                pieces = parser.push(item.text)
                if item.finish_reason:
                    pieces += parser.finish()
                said = [_delta(piece) for piece in pieces]
            if logprobs and not said:
                said = [ChatDelta(content="")]
            for delta in said:
                yield chunk(item.index, delta, logprobs)
                logprobs = None  # with the first of them
            if item.finish_reason:
                reason = _reason(item.finish_reason, bool(parser and parser.num_calls))
                yield chunk(item.index, ChatDelta(), None, reason)
        if include_usage:
            yield self._event(choices=[], usage=usage.usage())
        yield DONE

    def _logprobs(self, tokens: Sequence[SampledToken]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, tokens) if self._with_logprobs else None

    def _event(self, **fields: Any) -> str:
        chunk = ChatChunk(**self._head, object="chat.completion.chunk", **fields)
        return event(chunk.model_dump_json(exclude_unset=True))


def _delta(piece: Piece) -> ChatDelta:
    match piece:
        case Text():
            return ChatDelta(content=piece.text)
        case CallStart():
            function = FunctionDelta(name=piece.name, arguments="")
            call = ToolCallDelta(
                index=piece.index, id=_call_id(), type="function", function=function
            )
        case ArgumentsPiece():
            call = ToolCallDelta(index=piece.index, function=FunctionDelta(arguments=piece.text))
    return ChatDelta(tool_calls=[call])


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _reason(reason: FinishReason | None, has_calls: bool) -> FinishReason | None:
    return "tool_calls" if has_calls and reason == "stop" else reason
