"""A request's life as the engine sees it. Imports no torch; knows nothing of HTTP or of text."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

FinishReason = Literal["stop", "length", "abort"]
PoolingKind = Literal["mean", "cls", "last", "SEQ_CLS", "TOKEN_CLS"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens of one sequence are chosen. Neutral values by default, greedy at temperature 0.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keeps the smallest set of tokens with this much probability together.
        top_k: keeps this many tokens; None keeps all.
        min_p: keeps tokens with at least this share of the likeliest one's probability.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt
            or output (Keskar et al. 2019, arXiv:1909.05858).
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: subtracted once for each time a token is in the output.
        seed: makes the sequence's draws repeatable; None draws a fresh one.
        stop: strings that end the sequence; they are not part of its text.
        stop_token_ids: tokens that end the sequence.
        min_tokens: no stop before this many tokens.
        ignore_eos: the model's end token does not stop the sequence.
        logprobs: report log probabilities of the sampled token and of this many likeliest ones.
        logit_bias: token ids and what is added to their logits.
        prompt_logprobs: report the same of the prompt's tokens.
        grammar: what the text must match; it ends the sequence where nothing more may come, before
            `min_tokens` and for all `ignore_eos` says.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Seq[str] = ()
    stop_token_ids: Seq[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Seq[tuple[int, float]] = ()
    prompt_logprobs: int | None = None
    grammar: CompiledGrammar | None = None


@dataclass(frozen=True)
class Constraint:
    """What a text must match, as a request says it.

    Attributes:
        source: a JSON schema or a structural tag of xgrammar as JSON, a regular expression, or a
            grammar in GBNF.
        param: the request's field, for errors.
    """

    kind: Literal["json_schema", "regex", "grammar", "structural_tag"]
    source: str
    param: str


@dataclass(frozen=True)
class PoolingParams:
    """What a sequence gives in place of new tokens: one vector, or its classes' probabilities.

    Attributes:
        kind: mean, cls, last: an embedding of the input's own tokens (virtual ones are left out),
            the mean of their hidden states, the first one's or the last one's. SEQ_CLS, TOKEN_CLS:
            the probabilities `[labels]`, or `[tokens, labels]`, by the adapter's own head; of a
            regression its values.
        normalize: scale an embedding to length 1.
        problem_type: what a text's classes are asked, by transformers' name; None: which one it is.
    """

    kind: PoolingKind
    normalize: bool = False
    problem_type: str | None = None

    @property
    def reads_last(self) -> bool:
        """In a decoder, is the last hidden state all that is read?"""
        return self.kind in ("last", "SEQ_CLS")


@dataclass(frozen=True)
class AdapterUse:
    """One adapter of a request: its identity, and its weight in the mixture."""

    digest: str
    weight: float = 1.0


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of one token, under the model's own distribution (no temperature)."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class SampledToken:
    """A token of the output or of a prompt, with log probabilities where the request asked."""

    token_id: int
    logprob: float | None = None
    top: Seq[TokenLogprob] = ()


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False)
class Sequence:
    """One choice of one request: its tokens, its place in the KV cache, its adapters.

    Positions count virtual tokens first: `token_ids` starts with `num_virtual_tokens` placeholders,
    so a token's index is its position. Invariant: `num_cached <= num_computed <= len(token_ids)`.

    Attributes:
        key: (request id, choice index).
        adapters: empty for the base; several for a mixture.
        virtual_kv: the virtual positions' keys and values are given (prefix tuning), not computed.
        pooling: what is wanted in place of tokens; None where tokens are generated.
        token_type_ids: of the prompt's tokens, where they are of two texts.
        pooled: the result, or what of it the chunks so far have given; the runner's.
        num_computed: positions whose keys and values are in the cache.
        block_table: the cache blocks of positions 0.., in order.
    """

    key: tuple[str, int]
    prompt_token_ids: list[int]
    params: SamplingParams
    adapters: tuple[AdapterUse, ...] = ()
    num_virtual_tokens: int = 0
    virtual_kv: bool = False
    max_len: int = 0
    pooling: PoolingParams | None = None
    token_type_ids: list[int] | None = None

    status: Status = Status.WAITING
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    num_cached: int = 0
    block_table: list[int] = field(default_factory=list)
    #: Content hashes of the full blocks, as far as they are computed; owned by the block manager.
    block_hashes: list[bytes] = field(default_factory=list)
    pooled: Any = None
    #: The prompt's tokens from the second on, with their log probabilities, as far as computed.
    prompt_logprobs: list[SampledToken] = field(default_factory=list)
    #: Does the sequence hold a pin on its adapters?
    pinned: bool = False
    #: Later requests that pinned adapters while this one waited for adapter memory.
    num_overtaken: int = 0

    def __post_init__(self) -> None:
        self.token_ids = [0] * self.num_virtual_tokens + self.prompt_token_ids
        if not self.prompt_token_ids:
            raise ValueError("a sequence needs at least one prompt token")

    @property
    def prompt_len(self) -> int:
        """Virtual and prompt tokens."""
        return self.num_virtual_tokens + len(self.prompt_token_ids)

    @property
    def next_scored(self) -> int | None:
        """The first position whose logits say a prompt token's probability that is still wanted.

        None where none is: once the prompt is scored, and in every request that does not ask.
        """
        if self.params.prompt_logprobs is None:
            return None
        position = self.num_virtual_tokens + len(self.prompt_logprobs)
        return position if position < self.prompt_len - 1 else None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def may_skip_cached(self) -> bool:
        """Is nothing wanted of positions whose keys and values are cached?"""
        return self.pooling is None or self.pooling.reads_last

    @property
    def cache_seed(self) -> bytes:
        """What keeps one adapter's cache blocks apart from another's: digests and weights."""
        return "|".join(f"{use.digest}:{use.weight!r}" for use in self.adapters).encode()

    def reset(self) -> None:
        """Forget the cache (preemption); tokens stay and are computed again."""
        self.num_computed = self.num_cached = 0
        self.block_table = []
        self.block_hashes = []
        self.pooled = None
        self.status = Status.WAITING
