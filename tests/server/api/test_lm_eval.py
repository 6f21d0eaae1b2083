"""lm_eval's `local-completions` on the server's adapter scores as its `hf` with peft's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.serving import Served

TASK = {
    "task": "colours", "dataset_path": "json", "test_split": "train",
    "output_type": "multiple_choice", "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}  # fmt: skip


def rows() -> list[dict[str, Any]]:
    things = ["sky", "grass", "snow", "coal", "blood", "the sun", "an orange", "a rose"]
    colours = ["blue", "green", "white", "black", "red", "yellow", "orange", "pink"]
    return [
        {"question": f"Q: What colour is {thing}{'?' * (i % 3)}\nA:", "answer": i % 4,
         "choices": [f" {colours[(i + j) % 8]}" for j in range(4)]}
        for i, thing in enumerate(things * 3)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["poet", "herald"])
def test_the_same_score(
    server: Served,
    adapter_folders: dict[str, Path],
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.models.openai_completions import LocalCompletionsAPI

    data, folder = tmp_path / "rows.jsonl", tmp_path / "tokenizer"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    tokenizer = tiny.hf_tokenizer()
    tokenizer.save_pretrained(folder)
    task = TASK | {"dataset_kwargs": {"data_files": {"train": str(data)}}}
    model = tiny.PeftOracle(server.model, [(adapter_folders[name], 1.0)]).model
    clients = {
        "hf": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"),
        "local-completions": LocalCompletionsAPI(
            model=name, base_url=f"{server.url}/v1/completions", tokenizer=str(folder),
            tokenizer_backend="huggingface", batch_size=8, max_length=512,
        ),
    }  # fmt: skip
    found = {}
    for kind, client in clients.items():
        result = simple_evaluate(model=client, tasks=[dict(task)], bootstrap_iters=0)
        samples = sorted(result["samples"]["colours"], key=lambda s: s["doc_id"])
        scores = result["results"]["colours"]
        found[kind] = (
            {key: value for key, value in scores.items() if key.startswith("acc")},
            [resp[0][0] for sample in samples for resp in sample["resps"]],
            [resp[0][1] for sample in samples for resp in sample["resps"]],
        )
        print(name, kind, found[kind][0])
    expected, ours = found["hf"], found["local-completions"]
    assert ours[0] == expected[0]
    assert len(ours[1]) == len(rows()) * 4
    assert ours[1] == pytest.approx(expected[1], abs=1e-3)
    assert ours[2] == expected[2], "greedy or not"
