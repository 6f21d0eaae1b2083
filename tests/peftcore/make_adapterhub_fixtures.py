"""What AdapterHub's `adapters` computes: the tests' fixtures, and an oracle for adapters of ours.

It runs in a process of its own, with `adapters` and the transformers that it pins in a folder:

    pip install --no-deps --target DIR transformers==4.57.6 adapters==1.3.0 \\
        huggingface_hub==0.36.0 "tokenizers>=0.22,<=0.23.0"
    PYTHONPATH=DIR python tests/peftcore/make_adapterhub_fixtures.py make

writes `adapterhub/<model>.safetensors` and `.json` anew, and those of adapters with a head,
`heads`. With POLYPEFT_ADAPTERHUB=DIR in the
environment the tests also load what we write in `adapters`, by

    python tests/peftcore/make_adapterhub_fixtures.py outputs MODEL FOLDER…

Imports nothing of ours: it is the independent original.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialize
from torch import Tensor

FIXTURES = Path(__file__).with_name("adapterhub")
STEPS = 20
LEARNING_RATE = 3e-3

#: Sizes of every tiny model.
_SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 48, "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
_LLAMA = {**_SIZES, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {
    **_SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip

#: Model → its class, its config class, the config.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "vocab_size": 48,
            "n_positions": 96, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
            "resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", _BERT),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_BERT, "max_position_embeddings": 34, "pad_token_id": 1},
    ),
    "bert-body": ("BertModel", "BertConfig", _BERT),
}  # fmt: skip

#: Those of which three configs say enough: their code paths are those of another.
_FEW = ("qwen3", "roberta", "bert-body")

#: Configs whose adapters are also stored as they were before training: one of each kind of init.
INITIAL = ("seq_bn", "par_bn", "dropout")


def configs(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """AdapterHub's configs to be tried on a model, by a name: (name, keyword arguments)."""
    named = {"seq_bn": "SeqBnConfig", "double_seq_bn": "DoubleSeqBnConfig", "par_bn": "ParBnConfig"}
    for name, cls in named.items():
        yield name, {"cls": cls, "reduction_factor": 4}
    if model in _FEW:
        return
    every = {"mh_adapter": True, "output_adapter": True, "non_linearity": "gelu"}
    yield "learned", {"cls": "ParBnConfig", "scaling": "learned", "mh_adapter": True}
    yield "channel", {"cls": "SeqBnConfig", "scaling": "channel", "reduction_factor": 4, **every}
    yield "scaled-map", {
        "cls": "DoubleSeqBnConfig", "scaling": 0.5, "non_linearity": "leakyrelu",
        "reduction_factor": {"1": 0.5, "default": 8},
    }  # fmt: skip
    yield "left-out", {"cls": "DoubleSeqBnConfig", "leave_out": [0], "reduction_factor": 100}
    yield "norms", {
        "cls": "SeqBnConfig", "ln_before": True, "ln_after": True, "reduction_factor": 4,
        "adapter_residual_before_ln": True, **every,
    }  # fmt: skip
    yield "norm-after", {"cls": "DoubleSeqBnConfig", "ln_after": True, "reduction_factor": 4}
    yield "parallel-norm", {"cls": "ParBnConfig", "ln_after": True, "non_linearity": "tanh"}
    yield "residual-after", {
        "cls": "SeqBnConfig", "residual_before_ln": False, "reduction_factor": 4, **every,
    }  # fmt: skip
    yield "dropout", {
        "cls": "SeqBnConfig", "dropout": 0.2, "reduction_factor": 2, "init_weights": "houlsby",
        "init_weights_seed": 11,
    }  # fmt: skip
    open_end = {"original_ln_after": False, **every}
    yield (
        "open",
        {"cls": "SeqBnConfig", "residual_before_ln": False, "reduction_factor": 4, **open_end},
    )
    yield "open-branch", {"cls": "DoubleSeqBnConfig", **open_end, "reduction_factor": 4}
    yield "open-parallel", {"cls": "ParBnConfig", **open_end}
    if model == "bert":
        yield "post-add", {"cls": "SeqBnConfig", "residual_before_ln": "post_add", **every}


def base_model(model: str, state: dict[str, Tensor] | None = None) -> Any:
    """The tiny model, random from a seed or with the given parameters."""
    class_name, config_name, values = MODELS[model]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**values)
    config._attn_implementation = "eager"
    made = getattr(transformers, class_name)(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if state is not None:
            parameter.data.copy_(state[name])
        elif name.endswith("bias") or "norm" in name.lower() or "ln_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return made.eval()


def batch(model: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 48, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    if "CausalLM" in MODELS[model][0] or "LMHead" in MODELS[model][0]:
        found["labels"] = ids.masked_fill(mask == 0, -100)
    elif "Sequence" in MODELS[model][0]:
        found["labels"] = torch.tensor([0, 2, 1])
    return found


def outputs(made: Any, model: str) -> Tensor:
    inputs = {k: v for k, v in batch(model).items() if k != "labels"}
    with torch.no_grad():
        found = made(**inputs)
    return found.logits if "logits" in found else found.last_hidden_state


def exact_outputs(made: Any, model: str) -> Tensor:
    """`outputs`, computed in float64: float32's would be off by a machine's own order of sums."""
    try:
        return outputs(made.double(), model).float()
    finally:
        made.float()


def train(made: Any, model: str) -> list[float]:
    """The losses of a few steps on the one batch; afterwards `made` is in eval mode."""
    parameters = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    losses = []
    made.train()
    for step in range(STEPS):
        torch.default_generator.manual_seed(100 + step)
        optimizer.zero_grad()
        found = made(**batch(model))
        loss = found.loss if "labels" in batch(model) else found.last_hidden_state.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    made.eval()
    return losses


def save(made: Any, folder: Path, name: str = "tuned") -> dict[str, Tensor]:
    """The adapter as `adapters` saves it. It cannot save two names of one tensor, which it
    has under ln_before, in safetensors: that adapter goes through its pickle."""
    try:
        made.save_adapter(folder, name, use_safetensors=True, with_head=False)
        return load_file(folder / "adapter.safetensors")
    except RuntimeError:
        made.save_adapter(folder, name, with_head=False)
        loaded = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        return {key: tensor.clone() for key, tensor in loaded.items()}


def make(model: str) -> None:
    import adapters

    base = base_model(model)
    state = {name: p.detach().clone() for name, p in base.named_parameters()}
    tensors = {f"base/{name}": p for name, p in state.items()}
    tensors["outputs"] = exact_outputs(base, model)
    cases = {}
    for name, values in configs(model):
        values = dict(values)
        made = base_model(model, state)
        adapters.init(made)
        torch.manual_seed(3)
        made.add_adapter("tuned", config=getattr(adapters, values.pop("cls"))(**values))
        made.train_adapter("tuned")
        for key, parameter in made.named_parameters():  # it would train an untied lm_head too
            parameter.requires_grad_(".adapters.tuned." in key or key.startswith("classifier"))
        with tempfile.TemporaryDirectory() as scratch:
            initial = save(made, Path(scratch))
            losses = train(made, model)
            generator = torch.Generator().manual_seed(7)
            for key, parameter in made.named_parameters():
                if ".adapters.tuned." in key:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.data.add_(noise, alpha=0.2)
            head = {k: p for k, p in made.named_parameters() if k.startswith("classifier")}
            for key, parameter in head.items():
                parameter.data.copy_(state[key])
            trained = save(made, Path(scratch))
            config = json.loads((Path(scratch) / "adapter_config.json").read_text())
        cases[name] = {"config": config, "losses": losses}
        if name in INITIAL:
            tensors |= {f"{name}/initial/{key}": tensor for key, tensor in initial.items()}
        tensors |= {f"{name}/trained/{key}": tensor for key, tensor in trained.items()}
        tensors[f"{name}/outputs"] = exact_outputs(made, model)
    data = serialize({k: v.contiguous() for k, v in tensors.items()})
    (FIXTURES / f"{model}.safetensors").write_bytes(data)
    text = json.dumps(cases, indent=1, sort_keys=True)
    (FIXTURES / f"{model}.json").write_text(text + "\n")


#: Adapters that are saved with a head: the model, the head's method (None: transformers' own class
#: has it) and its options.
HEADS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "two-layers": ("bert", "add_classification_head", {}),
    "on-the-pooler": ("bert", "add_classification_head", {"layers": 1, "use_pooler": True}),
    "multi-label": ("bert", "add_classification_head", {"multilabel": True}),
    "one-number": ("bert", "add_classification_head", {"num_labels": 1}),
    "tags": ("bert", "add_tagging_head", {}),
    "transformers": ("bert", None, {}),
    "roberta": ("roberta", "add_classification_head", {}),
}


def make_heads() -> None:
    """`heads.safetensors`: for each case the tensors of both files and the logits of one row;
    `heads.json`: both configs."""
    import adapters

    tensors: dict[str, Tensor] = {}
    configs = {}
    for case, (model, method, options) in HEADS.items():
        made = base_model(model, base_state(model))
        if method is not None:
            made = getattr(adapters, MODELS[model][1].replace("Config", "AdapterModel"))(
                made.config
            )
            state = {k: v for k, v in base_state(model).items() if not k.startswith("classifier")}
            left = made.load_state_dict(state, strict=False)
            assert not left.unexpected_keys, left
        else:
            adapters.init(made)
        torch.manual_seed(4)
        made.add_adapter("tuned", config="double_seq_bn")
        if method is not None:
            names = {"num_labels": 3} | options
            id2label = {i: f"class {i}" for i in range(names["num_labels"])}
            getattr(made, method)("tuned", id2label=id2label, **names)
        made.set_active_adapters("tuned")
        for key, parameter in made.named_parameters():
            if ".adapters.tuned." in key or not key.startswith(model):
                parameter.data.add_(torch.randn(parameter.shape), alpha=0.3)
        made.eval()
        ids = batch(model)["input_ids"][:1]
        with torch.no_grad():
            tensors[f"{case}/logits"] = made(input_ids=ids).logits[0].clone()
        with tempfile.TemporaryDirectory() as scratch:
            made.save_adapter(scratch, "tuned", use_safetensors=True)
            for part in ("adapter", "model_head"):
                saved = load_file(Path(scratch) / f"{part}.safetensors")
                tensors |= {f"{case}/{part}/{key}": tensor for key, tensor in saved.items()}
            configs[case] = {
                part: json.loads((Path(scratch) / f"{part}.json").read_text())
                for part in ("adapter_config", "head_config")
            }
    (FIXTURES / "heads.safetensors").write_bytes(serialize(tensors))
    text = json.dumps(configs, indent=1, sort_keys=True)
    (FIXTURES / "heads.json").write_text(text + "\n")


def base_state(model: str) -> dict[str, Tensor]:
    """The fixture's base parameters."""
    tensors = load_file(FIXTURES / f"{model}.safetensors")
    return {k.removeprefix("base/"): v for k, v in tensors.items() if k.startswith("base/")}


def load(model: str, folder: str) -> None:
    """Write to FOLDER/adapters.safetensors what `adapters` computes with the adapter (and the head
    beside it) in the folder, and the tensors under which it saves it again."""
    import adapters

    made = base_model(model, base_state(model))
    adapters.init(made)
    info: dict[str, list[str]] = {}
    name = made.load_adapter(folder, use_safetensors=True, loading_info=info, set_active=True)
    assert not info.get("missing_keys"), info
    assert not info.get("unexpected_keys"), info
    tensors = {"outputs": outputs(made.eval(), model)}
    with tempfile.TemporaryDirectory() as scratch:
        again = save(made, Path(scratch), name)
    tensors |= {f"saved/{key}": tensor for key, tensor in again.items()}
    save_file(tensors, Path(folder) / "adapters.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["make"]:
        for chosen in sys.argv[2:] or [*MODELS, "heads"]:
            make_heads() if chosen == "heads" else make(chosen)
    elif sys.argv[1:2] == ["outputs"]:
        for path in sys.argv[3:]:
            load(sys.argv[2], path)
    else:
        sys.exit(__doc__)
