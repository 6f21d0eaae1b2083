"""Training data: what is read, which tokens are learned, what is refused and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from peftcore.train.collate import padded, side_by_side
from peftcore.train.rows import DataError, Row, read_rows
from peftcore.train.samples import (
    IGNORED,
    Reading,
    Sample,
    answer,
    conversation,
    labels_of,
    make_samples,
    packed,
)
from tests import tiny

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "chat"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny.hf_tokenizer()


def learned(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the tokens in the loss, with | between separate stretches."""
    assert isinstance(sample.labels, list)
    pieces: list[list[int]] = [[]]
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            if pieces[-1]:
                pieces.append([])
        else:
            pieces[-1].append(token)
    return "|".join(tokenizer.decode(p) for p in pieces if p)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def test_only_the_assistants_turns_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [user("one"), says("first"), user("two"), says("second", weight=0), user("three"),
                says("third", weight=1)]  # fmt: skip
    sample = conversation(messages, tokenizer)
    assert learned(sample, tokenizer) == "first|third"
    text = tokenizer.apply_chat_template(
        [{k: v for k, v in m.items() if k != "weight"} for m in messages], tokenize=False
    )
    assert tokenizer.decode(sample.input_ids) == text.rstrip()


def test_a_prompts_tokens_are_the_servers(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = answer("What?", "That.", tokenizer)
    prompt = tokenizer.apply_chat_template(
        [user("What?")], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert sample.input_ids[: len(ids)] == ids
    assert isinstance(sample.labels, list)
    assert set(sample.labels[: len(ids)]) == {IGNORED}
    assert learned(sample, tokenizer) == "That."
    everything = answer("What?", "That.", tokenizer, everything=True)
    assert isinstance(everything.labels, list)
    assert everything.labels[1:] == everything.input_ids[1:]
    assert everything.labels[0] == IGNORED, "nothing predicts the first token"


def test_without_a_template_texts_follow_each_other() -> None:
    plain = tiny.hf_tokenizer()
    plain.chat_template = None
    sample = answer("ab", "cd", plain)
    assert plain.decode(sample.input_ids) == "abcd<eos>"
    assert learned(sample, plain) == "cd<eos>"
    with pytest.raises(ValueError, match="no chat template"):
        conversation([user("a"), says("b")], plain)


BAD_MESSAGES: list[tuple[Any, str]] = [
    ("text", "a list of messages is expected"),
    ([], "a list of messages is expected"),
    ([1], r"messages\[0\]: an object is expected"),
    ([{"role": "boss", "content": "x"}, says("y")], r"messages\[0\].role: 'boss' is not one of"),
    ([{"content": "x"}, says("y")], r"messages\[0\].role: None"),
    ([{"role": "user"}, says("y")], r"messages\[0\].content: text is expected, not None"),
    ([user("x"), says(" ")], r"messages\[1\].content: is empty"),
    ([user("x"), {"role": "assistant", "content": 5}], r"messages\[1\].content: text is expected"),
    ([user("x"), says("y", mood="good")], r"messages\[1\].mood: not a field of a message"),
    ([user("x"), says("y", weight=2)], r"messages\[1\].weight: 0 or 1"),
    ([{**user("x"), "weight": 1}, says("y")], r"messages\[0\].weight: 0 or 1"),
    ([user("x")], "no turn of the assistant"),
    ([says("y")], "no message of the user"),
    ([user("x"), says("y", weight=0)], "every turn of the assistant has weight 0"),
    ([user("x"), says("y"), user("z")], "the last one is not the assistant's"),
    ([user("x"), says("", tool_calls=[{"id": "1"}])], r"tool_calls: .* leaves it out"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES)
def test_a_bad_conversation_is_refused(
    messages: Any, reason: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=reason):
        conversation(messages, tokenizer)


def test_tools_that_the_template_leaves_out_are_refused() -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    messages = [user("x"), says("y")]
    plain = tiny.hf_tokenizer()
    with pytest.raises(ValueError, match=r"^tools: the model's chat template leaves them out"):
        conversation(messages, plain, tools)
    plain.chat_template = "{{ tools | tojson if tools }}" + plain.chat_template
    sample = conversation(messages, plain, tools)
    assert "look" in plain.decode(sample.input_ids)
    assert learned(sample, plain) == "y"


def test_a_row_longer_than_the_models_context_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "abcdefgh"}\n')
    with pytest.raises(DataError, match=r"2: 9 tokens, over the 8 that the model has room for$"):
        samples_of(path, tokenizer, context=8)


def samples_of(path: Path, tokenizer: PreTrainedTokenizerBase, **reading: Any) -> list[Sample]:
    return make_samples(path, read_rows(path), tokenizer, Reading(**reading))


def test_every_bad_row_is_named_with_its_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"messages": [user("x"), says("y")]})
    path.write_text(
        "\n".join(
            [
                good,
                "{not json",
                "",
                json.dumps([1]),
                json.dumps({"messages": [user("x")]}),
                good,
                json.dumps({"messages": [user("x" * 90), says("y")]}),
            ]
        )
    )
    with pytest.raises(DataError) as caught:
        samples_of(path, tokenizer, max_len=64)
    assert [line for line, _ in caught.value.problems] == [2, 4, 5, 7]
    text = str(caught.value)
    assert f"{path}:2: not valid JSON" in text
    assert f"{path}:4: a JSON object is expected" in text
    assert f"{path}:5: messages: no turn of the assistant" in text
    assert f"{path}:7: " in text
    assert "tokens, over max_len of 64" in text


@pytest.mark.skipif(not SHARED.is_dir(), reason="OpenAI's example files are not at hand")
def test_openais_example_with_bad_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    path = SHARED / "openai-toy_chat_fine_tuning.jsonl"
    with pytest.raises(DataError) as caught:
        samples_of(path, tokenizer, max_len=2000)
    assert [line for line, _ in caught.value.problems] == [4, 5, 9, 10]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", 'q,a\n"one, two",x\nthree,y\n', ["x", "y"]),
        ("a.tsv", "q\ta\none\tx\nthree\ty\n", ["x", "y"]),
        ("a.jsonl", '{"q": "one", "a": "x"}\n\n{"q": 3, "a": 4}\n', ["x", "4"]),
    ],
)
def test_columns_fill_templates(
    name: str, text: str, expected: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    found = samples_of(path, tokenizer, prompt="Q: {q}", completion="{a}")
    assert [learned(s, tokenizer) for s in found] == expected


def test_texts_are_learned_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n')
    (sample,) = samples_of(path, tokenizer)
    assert tokenizer.decode(sample.input_ids) == "abc<eos>"
    assert learned(sample, tokenizer) == "bc<eos>"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", "q,a\n1,2,3\n", "2: 3 fields, where there are 2 columns"),
        ("a.csv", "q,b\n1,2\n", "2: no column 'a'"),
        ("a.csv", "q,a\n1,\n", "2: the completion is empty"),
        ("a.jsonl", '{"q": "x", "a": null}\n', "1: column 'a' holds null, which is no text"),
        ("a.jsonl", "\n", "1: there is no row"),
        ("a.txt", "x", "1: '.txt' is not one of .jsonl, .csv, .tsv"),
        ("a.jsonl", b'{"q": "\xff"}', "1: not UTF-8 text"),
    ],
)
def test_bad_tables(
    name: str, text: Any, reason: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        samples_of(path, tokenizer, prompt="{q}", completion="{a}")
    assert f"{path}:{reason}" in str(caught.value)


def test_what_cannot_be_told_apart_is_asked_for(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "x", "reply": "y"}\n')
    with pytest.raises(DataError, match="say with --prompt and --completion"):
        samples_of(path, tokenizer)
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"missing\.jsonl:1: no such file$"):
        read_rows("missing.jsonl")  # a bare name could be a hub data set's, but for its ending


def test_a_hub_name_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(name: str, split: str) -> None:
        raise ConnectionError(f"no route to {name}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"org/data:1: .* hub data set \(train\): no route to"):
        read_rows("org/data")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list([{"text": split}])
    )
    assert [r.values for r in read_rows("org/data", "test")] == [{"text": "test"}]


def test_labels_are_numbered_in_order(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("good film\t10\nbad film\t2\nfine\t10\n")
    rows = read_rows(path, columns=["text", "label"])
    labels = labels_of(rows, "label")
    assert labels == ["2", "10"]
    classes = [Row(1, {"label": name}) for name in ("zoo", "-1", 3, "apple", "10", "1", "", None)]
    assert labels_of(classes, "label") == ["-1", "1", "3", "10", "apple", "zoo"]
    found = make_samples(path, rows, tokenizer, Reading(), labels)
    assert [s.labels for s in found] == [1, 0, 1]
    others = read_rows(path, columns=["text", "label"])
    with pytest.raises(DataError, match=r"2: label '2' is not one of '10'"):
        make_samples(path, others, tokenizer, Reading(), ["10"])


def test_packing_fills_rows_and_loses_nothing() -> None:
    samples = [Sample(list(range(n)), [IGNORED, *range(1, n)]) for n in (2, 9, 3, 4, 7, 5, 2, 10)]
    rows = packed(samples, 10, seed=1)
    assert sorted(map(len, samples)) == sorted(len(s) for row in rows for s in row)
    assert all(sum(map(len, row)) <= 10 for row in rows)
    assert len(rows) <= 6
    assert packed(samples, 10, seed=1) == rows


def test_batches(tokenizer: PreTrainedTokenizerBase) -> None:
    a = {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}
    b = {"input_ids": [8, 9], "labels": [IGNORED, 9]}
    batch = padded([a, b], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    batch = side_by_side([{"samples": [a, b]}, {"samples": [b]}], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9], [IGNORED, 9, *[IGNORED] * 3]]
    batch = padded([{"input_ids": [5], "labels": 2}, {"input_ids": [6, 7], "labels": 0}])
    assert torch.equal(batch["labels"], torch.tensor([2, 0]))
