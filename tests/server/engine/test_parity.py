"""Every request of a mixed batch computes what HF peft computes for its adapter alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.engine.sequence import Sequence
from tests import tiny
from tests.recorder import Recorder, compare

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A model, and every method's adapter registered under its name."""
    model = getattr(tiny, request.param)()
    folder = tmp_path_factory.mktemp(request.param)
    runtime = tiny.runtime(model, folder / "data", max_num_batched_tokens=48, max_num_seqs=40)
    paths: dict[str, Path] = {}
    configs = tiny.peft_configs(model.config.model_type)
    for seed, (name, config) in enumerate(configs.items()):
        paths[name] = tiny.save_random_adapter(model, config, folder / name, seed)
        tiny.register(runtime, name, paths[name])
    yield model, runtime, paths
    runtime.close()


def prompts(seed: int, n: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(2, 70))] for _ in range(n)]


def test_mixed_batch_equals_peft_alone(world) -> None:
    """All methods, base rows and mixtures at once; prompts chunked; two rounds, the second of which
    finds prefixes of the first in the cache."""
    model, runtime, paths = world
    recorder = Recorder(runtime)
    mixture = [("lora-r4", 0.75), ("lora-r8-all", 0.5), ("lora-r16-rslora", -0.5)]
    requests = [(name, [(name, 1.0)]) for name in paths]
    requests += [("tiny", []), ("mixture", mixture), ("half", [("lora_bias", 0.5)])]
    errors = {}
    for round_ in range(2):
        sequences = []
        for (label, parts), prompt in zip(requests, prompts(1, len(requests)), strict=True):
            if label in ("mixture", "half"):
                lease = runtime.adapters.lease("tiny", parts)
            else:
                lease = runtime.adapters.lease(label)
            with lease:
                prompt = prompt + [7] * round_
                sequences.append((recorder.add(f"{label}-{round_}", prompt, lease), parts))
                if len(sequences) % 3 == 0:
                    recorder.engine.step()  # arrivals while others decode
        recorder.run()
        for seq, parts in sequences:
            oracle = tiny.PeftOracle(model, [(paths[name], weight) for name, weight in parts])
            errors[seq.key[0]] = compare(recorder, seq, oracle)
            if round_ and len(seq.prompt_token_ids) > 9:
                assert seq.num_cached >= 8, f"{seq.key}: no shared prefix"
    assert max(errors.values()) <= TOLERANCE, errors
    mixed = max(recorder.batches, key=lambda b: len({c.seq.cache_seed for c in b.chunks}))
    assert len({c.seq.cache_seed for c in mixed.chunks}) >= 10
    assert any(c.num_tokens > 1 and not c.samples for b in recorder.batches for c in b.chunks)
    runtime.check_integrity()


def test_methods_differ_from_base(world) -> None:
    """The oracle itself must not be the base: every adapter moves the logits."""
    model, _, paths = world
    prompt = prompts(5, 1)[0]
    base = tiny.PeftOracle(model).logits(prompt)
    for name, path in paths.items():
        moved = (tiny.PeftOracle(model, [(path, 1.0)]).logits(prompt) - base).abs().max()
        assert moved > 0.05, name


def test_a_row_does_not_depend_on_its_neighbours(world) -> None:
    """Every adapter by itself, and all of them at once among others."""
    _, runtime, paths = world
    recorder = Recorder(runtime)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    labels = ["tiny", *paths]

    def add(label: str, key: str, prompt: list[int]) -> Sequence:
        with runtime.adapters.lease(label) as lease:
            return recorder.add(key, prompt, lease, max_tokens=4)

    among = {}
    for i, label in enumerate(labels):
        among[label] = add(label, f"{label}, among", prompt)
        if i % 4 == 0:
            add(labels[-i], f"other {i}", prompts(i, 1)[0])
    recorder.run()
    for label, seq in among.items():
        sizes = [len(b.chunks) for b in recorder.batches if any(c.seq is seq for c in b.chunks)]
        assert max(sizes) > 8, f"{label} had few neighbours: {sizes}"
        alone = add(label, f"{label}, alone", prompt)
        recorder.run()
        assert alone.output_token_ids == seq.output_token_ids, label
        logits = (torch.stack(recorder.logits[s.key]) for s in (alone, seq))
        torch.testing.assert_close(
            *logits, atol=2e-5, rtol=0, msg=lambda m, label=label: f"{label}: {m}"
        )
