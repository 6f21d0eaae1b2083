"""POST /v1/embeddings and /v1/classify: vectors and classes of texts."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from server.api.access import current_record
from server.api.classified import classified_text, classified_tokens
from server.api.pooling_schemas import (
    ClassifiedToken,
    ClassifyList,
    ClassifyRequest,
    ClassifyUsage,
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    PoolingUsage,
)
from server.api.state import metrics_of, runtime_of
from server.api.streaming import unless_gone
from server.engine.sequence import PoolingParams
from server.errors import BadRequest
from server.runtime import TextTokens
from server.tokenization import Tokenizer

if TYPE_CHECKING:
    from server.adapters.manager import Lease

router = APIRouter()


class _Input(NamedTuple):
    """An input in tokens. spans: each token's characters in its text; None for given token ids."""

    tokens: TextTokens
    spans: list[tuple[int, int]] | None


@router.post("/v1/embeddings")
async def create_embeddings(body: EmbeddingRequest, request: Request) -> EmbeddingList:
    """One vector for each input."""
    runtime = runtime_of(request)
    default = runtime.embedding
    pooling = PoolingParams(
        body.pooling or default.kind,
        default.normalize if body.normalize is None else body.normalize,
    )
    with runtime.adapters.lease(body.model, body.mixture()) as lease:
        inputs = await run_in_threadpool(_tokens, runtime.tokenizer, body.input)
        count = _counted(request, lease, inputs)
        work = runtime.pool([i.tokens for i in inputs], pooling, lease)
        results = await unless_gone(request.receive, work)
    as_base64 = body.encoding_format == "base64"
    return EmbeddingList(
        model=lease.label,
        data=[
            Embedding(index=i, embedding=_base64(r.values) if as_base64 else r.values.tolist())
            for i, r in enumerate(results)
        ],
        usage=PoolingUsage(prompt_tokens=count, total_tokens=count),
    )


@router.post("/v1/classify", response_model_exclude_none=True)
async def classify(body: ClassifyRequest, request: Request) -> ClassifyList:
    """The classes of each input, or of each of its tokens, by an adapter with a head of its own."""
    runtime = runtime_of(request)
    with runtime.adapters.lease(body.model) as lease:
        task = _class_task(lease)
        _check_aggregation(body, task)
        inputs = await run_in_threadpool(_tokens, runtime.tokenizer, body.input, body.text_pair)
        count = _counted(request, lease, inputs)
        problem_type = lease.problem_type if task == "SEQ_CLS" else None
        pooling = PoolingParams(task, problem_type=problem_type)
        work = runtime.pool([i.tokens for i in inputs], pooling, lease)
        results = await unless_gone(request.receive, work)
    values = [result.values.tolist() for result in results]
    if task == "SEQ_CLS":
        data = [classified_text(i, v, lease.labels, problem_type) for i, v in enumerate(values)]
    else:
        joins = body.aggregation == "simple"
        data = []
        for i, (given, probs) in enumerate(zip(inputs, values, strict=True)):
            tokens = _classified(given, probs, lease.labels, runtime.tokenizer)
            text = str(body.input[i]) if joins else None
            data.append(classified_tokens(i, tokens, text, len(lease.labels)))
    return ClassifyList(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=lease.label,
        data=data,
        usage=ClassifyUsage(prompt_tokens=count, total_tokens=count),
    )


def _class_task(lease: Lease) -> Literal["SEQ_CLS", "TOKEN_CLS"]:
    """What the head of the request's adapter classifies. Raises BadRequest where it has none."""
    if lease.task == "SEQ_CLS":
        return "SEQ_CLS"
    if lease.task == "TOKEN_CLS":
        return "TOKEN_CLS"
    raise BadRequest(
        f"model: {lease.label!r} has no classes: name an adapter that was trained for SEQ_CLS or "
        "TOKEN_CLS",
        param="model",
        code="model_does_not_classify",
    )


def _check_aggregation(body: ClassifyRequest, task: str) -> None:
    """Raises BadRequest where there are no entities to be found."""
    if body.aggregation == "none":
        return
    if task != "TOKEN_CLS":
        why = f"{body.model!r} classifies whole texts, not tokens"
    elif body.text_pair is not None or not all(isinstance(text, str) for text in body.input):
        why = "entities are parts of one text: send texts, without text_pair"
    else:
        return
    raise BadRequest(f"aggregation: {why}", param="aggregation")


def _tokens(
    tokenizer: Tokenizer,
    inputs: Sequence[str | list[int]],
    pairs: Sequence[str] | None = None,
) -> list[_Input]:
    """Raises BadRequest for pairs that are not one for each text."""
    if pairs is not None and len(pairs) != len(inputs):
        raise BadRequest(
            f"text_pair: {len(pairs)} texts for {len(inputs)} inputs", param="text_pair"
        )
    found = []
    for i, given in enumerate(inputs):
        if isinstance(given, str):
            ids, types, spans = tokenizer.encode_pair(given, None if pairs is None else pairs[i])
            found.append(_Input(TextTokens(ids, types), spans))
        elif pairs is not None:
            raise BadRequest("text_pair: goes beside texts, not token ids", param="text_pair")
        else:
            found.append(_Input(TextTokens(given), None))
    return found


def _counted(request: Request, lease: Lease, inputs: Sequence[_Input]) -> int:
    """The inputs' tokens, told to the metrics and to the log."""
    count = sum(len(given.tokens.token_ids) for given in inputs)
    metrics_of(request).begun(lease.names, count)
    record = current_record()
    record.adapter, record.num_prompt_tokens = ",".join(lease.names) or None, count
    return count


def _base64(vector: Any) -> str:
    """The float32 values' bytes, little-endian, as OpenAI encodes them."""
    return base64.b64encode(vector.cpu().numpy().astype("<f4").tobytes()).decode()


def _classified(
    given: _Input, probs: list[list[float]], labels: Sequence[str], tokenizer: Tokenizer
) -> list[ClassifiedToken]:
    """Each token's likeliest class; tokens that the tokenizer adds are left out."""
    tokens = []
    for i, token_id in enumerate(given.tokens.token_ids):
        if given.spans is not None and token_id in tokenizer.special:
            continue
        start, end = (None, None) if given.spans is None else given.spans[i]
        likeliest = max(range(len(labels)), key=probs[i].__getitem__)
        tokens.append(
            ClassifiedToken(
                token=tokenizer.token_text(token_id),
                start=start,
                end=end,
                label=labels[likeliest],
                score=probs[i][likeliest],
            )
        )
    return tokens
