"""What requests for embeddings and classes may say, and their answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator

from server.api.fields import NonEmpty, Refused, Strict, Text, TextsOrTokens, as_list
from server.api.schemas import MAX_MIXTURE, WeightedAdapter

#: OpenAI's bound.
MAX_INPUTS = 2048

Inputs = Annotated[list[str | list[int]], PlainValidator(TextsOrTokens("input", MAX_INPUTS))]


class PoolingRequest(Strict):
    """What embeddings and classification have in common."""

    model: NonEmpty
    input: Inputs = Field(
        json_schema_extra={"description": "text, texts, token ids, or lists of token ids"}
    )
    user: str | None = None  # a label that does not concern the answer

    # vLLM's, with the values that say what is done here anyway.
    add_special_tokens: Annotated[Any, Refused(True)] = None
    truncate_prompt_tokens: Annotated[Any, Refused()] = None


class EmbeddingRequest(PoolingRequest):
    """POST /v1/embeddings."""

    adapters: list[WeightedAdapter] | None = Field(None, min_length=1, max_length=MAX_MIXTURE)
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "cls", "last"] | None = Field(
        None, description="of the tokens' hidden states; by default what the model's files say"
    )
    normalize: bool | None = Field(None, description="scale to length 1; by default likewise")

    dimensions: Annotated[Any, Refused()] = None

    def mixture(self) -> list[tuple[str, float]] | None:
        if self.adapters is None:
            return None
        return [(part.name, part.weight) for part in self.adapters]


class ClassifyRequest(PoolingRequest):
    """POST /v1/classify."""

    text_pair: Annotated[list[Text] | None, BeforeValidator(as_list)] = Field(
        None, description="for each input a second text, which is joined to it"
    )
    aggregation: Literal["none", "simple"] = Field(
        "none", description="of an adapter that classifies tokens: simple joins them to entities"
    )


class PoolingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """The answer of /v1/embeddings."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: PoolingUsage


class ClassifiedToken(BaseModel):
    """One token of the text; `start` and `end` count its characters, null for given token ids."""

    token: str
    start: int | None
    end: int | None
    label: str
    score: float


class Entity(BaseModel):
    """Neighbouring tokens of one class: characters `start` to `end` of the text. `score` is the
    mean of theirs."""

    text: str
    start: int
    end: int
    label: str
    score: float


class Classified(BaseModel):
    """A text's classes; of an adapter that classifies tokens each token's, or its entities.

    One class of all: `label`, the likeliest, and `probs`. Each class by itself
    (multi_label_classification): `labels` too, those of probability 0.5 and more. Regression:
    `values`.
    """

    index: int
    label: str | None = None
    labels: list[str] | None = None
    probs: list[float] | None = None
    values: list[float] | None = None
    tokens: list[ClassifiedToken] | None = None
    entities: list[Entity] | None = None
    num_classes: int


class ClassifyUsage(PoolingUsage):
    completion_tokens: Literal[0] = 0
    prompt_tokens_details: None = None


class ClassifyList(BaseModel):
    """The answer of /v1/classify."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: ClassifyUsage
