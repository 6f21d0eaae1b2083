"""What a step looks at on the host: on a GPU each look waits for all that was queued before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine import sampler as module
from server.engine.sampler import Sampler
from server.engine.scheduler import Batch, Chunk
from server.engine.sequence import SamplingParams, Sequence
from server.engine.step_inputs import StepInputs, chunk_rows

VOCAB = 4000
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {"temperature": 0.9},
    "top_k": {"top_k": 40, "temperature": 0.7},
    "top_p": {"top_p": 0.5, "temperature": 0.3},
    "flat": {"top_p": 0.9, "temperature": 50.0},  # its 90 % are not among the candidates
    "flat and min_p": {"top_p": 0.95, "temperature": 40.0, "min_p": 0.1},
    "large top_k": {"top_k": 3000, "temperature": 30.0},
    "penalties": {
        "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2,
        "logit_bias": ((5, 3.0), (9, -1.0)), "min_tokens": 9, "temperature": 1.5,
    },
    "logprobs": {"logprobs": 3},
    "no logprobs but one's own": {"logprobs": 0, "temperature": 0},
}  # fmt: skip


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways in which tensors' values come to Python, and each time they do."""
    found: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "numpy"):
        original = getattr(Tensor, name)

        def watched(self: Tensor, *args: Any, name: str = name, original: Any = original) -> Any:
            found.append(name)
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, watched)
    return found


def sequences() -> list[Sequence]:
    found = []
    for i, params in enumerate(PARAMS.values()):
        seq = Sequence(("r", i), [1, 2, 3], SamplingParams(seed=7, **params))
        seq.token_ids += [4, 4, 8]
        found.append(seq)
    return found


def test_sampling_looks_at_tokens_alone(looks: list[str]) -> None:
    logits = torch.randn(len(PARAMS), VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    asking, plain = Sampler((3, 7)), Sampler((3, 7), looks_between=False)
    for _ in range(8):
        expected = asking.sample(logits, sequences())
        looks.clear()
        assert plain.sample(logits, sequences()) == expected
        # The tokens; those of the three flat rows; log probabilities, and the tokens they are of.
        assert looks == ["tolist"] * 4
        logits = logits.roll(1, dims=-1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_come_at_once(looks: list[str], temperature: float) -> None:
    logits = torch.randn(3, VOCAB)
    params = SamplingParams(temperature=temperature, top_p=0.9 if temperature else 1.0)
    rows = [Sequence(("r", i), [1], params) for i in range(3)]
    Sampler((), looks_between=False).sample(logits * 9, rows)
    assert looks == ["tolist"]


def test_the_flat_rows_are_flat() -> None:
    """Else nothing above is drawn again."""
    logits = torch.randn(len(PARAMS), VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    params = [SamplingParams(**{"temperature": 1.0} | p) for p in PARAMS.values()]
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    own = [params[i] for i in drawn]
    _, is_right = module.probabilities_among(logits[drawn], own, module._NUM_CANDIDATES)
    assert (~is_right).sum() == 3


def test_a_step_s_numbers_are_one_buffer() -> None:
    """Against positions and slots worked out one by one."""
    chunks = []
    for i, (start, n) in enumerate([(0, 5), (11, 1), (3, 9), (30, 1)]):
        seq = Sequence(("r", i), list(range(100 * i, 100 * i + 40)), SamplingParams())
        seq.token_ids = seq.token_ids[: start + n + (i == 2)]  # the third goes on
        seq.block_table = [7 + i, 40 + i, 3 + i, 90 + i]
        chunks.append(Chunk(seq, start, n))
    batch = Batch(chunks)
    inputs = StepInputs.of(batch, 8, torch.device("cpu"))
    positions = [(c.seq, p) for c in chunks for p in range(c.start, c.end)]
    assert inputs.token_ids.tolist() == [seq.token_ids[p] for seq, p in positions]
    assert inputs.positions.tolist() == [p for _, p in positions]
    assert inputs.slots.tolist() == [seq.block_table[p // 8] * 8 + p % 8 for seq, p in positions]
    assert inputs.outputs.tolist() == [4, 5, 15]
    assert len({t.untyped_storage().data_ptr() for t in inputs}) == 1
    assert [(r.start, r.end, r.position, len(r.block_table)) for r in chunk_rows(batch, 8)] == [
        (0, 5, 0, 1), (5, 6, 11, 2), (6, 15, 3, 2), (15, 16, 30, 4),
    ]  # fmt: skip
