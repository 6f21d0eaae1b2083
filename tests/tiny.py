"""Tiny random models, tokenizers and PEFT adapters, made by code; and the oracle, HF peft."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from peftcore import AdapterConfig, config_from_dict
from server.adapters.info import AdapterInfo
from server.build import assemble
from server.models.loader import prepare_model
from server.runtime import Runtime
from server.settings import Settings
from server.tokenization import Tokenizer

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
VOCAB = 300
EOS = 256

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def llama(**changes: Any) -> PreTrainedModel:
    """A random llama: grouped heads, biases in attention, untied head."""
    torch.manual_seed(0)
    config = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "max_position_embeddings": 512, "attention_bias": True, "initializer_range": 0.2,
        "bos_token_id": 257, "eos_token_id": EOS, "pad_token_id": 258,
    }  # fmt: skip
    return _ready(LlamaForCausalLM(LlamaConfig(**(config | changes))))


def gpt2() -> PreTrainedModel:
    """A random GPT-2: Conv1D layers, LayerNorms with biases, learned positions, tied head."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=512, initializer_range=0.2,
        bos_token_id=257, eos_token_id=EOS,
    )  # fmt: skip
    return _ready(GPT2LMHeadModel(config))


def gemma3() -> PreTrainedModel:
    """A random Gemma 3: sliding windows of 16, QK norm, scaled embedding, tied head."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=24, vocab_size=VOCAB, max_position_embeddings=512,
        sliding_window=16, initializer_range=0.2, query_pre_attn_scalar=24,
        layer_types=[f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
        bos_token_id=257, eos_token_id=EOS, pad_token_id=258,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    # The head is tied: a large embedding would make every model repeat its last token.
    model.get_input_embeddings().weight.data.mul_(0.1)
    return _ready(model)


def bert(task: str = "SEQ_CLS") -> PreTrainedModel:
    """A random BERT with a head for the task: `SEQ_CLS`, `TOKEN_CLS` or `FEATURE_EXTRACTION`."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=VOCAB, max_position_embeddings=128, initializer_range=0.2, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    classes = {
        "SEQ_CLS": BertForSequenceClassification,
        "TOKEN_CLS": BertForTokenClassification,
        "FEATURE_EXTRACTION": BertModel,
    }
    return _ready(classes[task](config))


def for_task(base: PreTrainedModel, task: str, num_labels: int = 3) -> PreTrainedModel:
    """transformers' class for a task around a base's own backbone, its head random."""
    config = copy.deepcopy(base.config)
    config.num_labels = num_labels
    classes: dict[str, Any] = {
        "SEQ_CLS": AutoModelForSequenceClassification,
        "TOKEN_CLS": AutoModelForTokenClassification,
        "FEATURE_EXTRACTION": AutoModel,
    }
    torch.manual_seed(num_labels)
    model = classes[task].from_config(config)
    found = model.base_model.load_state_dict(base.base_model.state_dict(), strict=False)
    assert not found.missing_keys
    assert all(key.startswith("pooler.") for key in found.unexpected_keys)  # few heads read it
    return model.float().eval()


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """Random biases and norms too: zeros and ones would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name or "ln_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise, alpha=0.1)
    return model.float().eval()


def tokenizer() -> Tokenizer:
    """The server's, around `hf_tokenizer`."""
    return Tokenizer(hf_tokenizer())


def hf_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a few special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def settings(data_dir: Path, **changes: Any) -> Settings:
    """Small pools; `changes` in their place."""
    small = {"kv_memory": "8MiB", "adapter_memory": "4MiB", "block_size": 8}
    return Settings(
        data_dir=data_dir,
        **({"kv_cache_dtype": "float32", "adapter_dtype": "float"} | small | changes),
    )


def runtime(model: PreTrainedModel, data_dir: Path, **changes: Any) -> Runtime:
    """A runtime around a copy of `model`; not started.

    Nothing but its weights is rounded, so that it can be compared with other implementations.
    """
    quantization = changes.pop("quantization", "none")
    activations = changes.pop("activations", "float")
    base_name = changes.pop("base_name", "tiny")
    device = torch.device(os.environ.get("POLYPEFT_TEST_DEVICE", "cpu"))
    loaded = prepare_model(copy.deepcopy(model), quantization, device, activations)
    return assemble(settings(data_dir, **changes), loaded, tokenizer(), base_name)


#: Per architecture, the modules of attention and of the feed-forward block.
ATTENTION = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "gemma3_text": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
}
FEED_FORWARD = {
    "llama": ["down_proj"],
    "gpt2": ["mlp.c_proj"],
    "gemma3_text": ["down_proj"],
    "bert": ["intermediate.dense"],
}
EMBEDDING = {
    "llama": "embed_tokens",
    "gpt2": "wte",
    "gemma3_text": "embed_tokens",
    "bert": "word_embeddings",
}
#: Two norms, the last of them by its whole path.
NORMS = {
    "llama": ["layers.1.input_layernorm", "model.norm"],
    "gpt2": ["h.1.ln_2", "transformer.ln_f"],
    "gemma3_text": ["layers.1.self_attn.q_norm", "model.norm"],
    "bert": ["layer.1.output.LayerNorm", "embeddings.LayerNorm"],
}
#: Token ids whose rows are trained, in no order; many, so that some are in every text.
TOKEN_IDS = [7, 299, *range(90, 30, -1), 255]
LAYER = {"llama": "layers.1", "gpt2": "h.1", "gemma3_text": "layers.1", "bert": "layer.1"}


def peft_configs(model_type: str, task: str = "CAUSAL_LM") -> dict[str, peft.PeftConfig]:
    """Every method and its options, three ranks and more, by a name for messages."""
    return {
        **lora_configs(model_type, task),
        **low_rank_configs(model_type, task),
        **module_configs(model_type, task),
        **prompt_configs(task),
    }


def lora_configs(model_type: str, task: str) -> dict[str, peft.PeftConfig]:
    attention, feed_forward = ATTENTION[model_type], FEED_FORWARD[model_type]
    both = [*attention, *feed_forward]

    def lora(**options: Any) -> peft.LoraConfig:
        return peft.LoraConfig(**({"r": 4, "target_modules": both, "task_type": task} | options))

    layer = LAYER[model_type]
    patterns = {rf"{layer}\..*": 5}
    embedding, norms = EMBEDDING[model_type], NORMS[model_type]
    found = {
        "lora-r4": lora(lora_alpha=8),
        "lora-r8-all": lora(r=8, lora_alpha=16, target_modules="all-linear"),
        "lora-r16-rslora": lora(r=16, lora_alpha=4, use_rslora=True, target_modules=attention),
        "lora-patterns": lora(r=3, rank_pattern=patterns, alpha_pattern={rf"{layer}\..*": 11}),
        "lora-layers": lora(layers_to_transform=[0, 2]),
        "lora-regex": lora(target_modules=rf".*{layer}\..*({both[0]}|{both[-1]})"),
        "lora-exclude": lora(exclude_modules=rf".*{layer}.*"),
        "lora-dropout": lora(r=6, lora_dropout=0.3),
        "lora-gaussian": lora(init_lora_weights="gaussian"),
        "dora": lora(use_dora=True, lora_alpha=6),
        "dora-dropout": lora(use_dora=True, lora_dropout=0.3),
        "lora-bias-all": lora(bias="all"),
        "lora-bias-own": lora(bias="lora_only"),
        "lora_bias": lora(lora_bias=True, lora_alpha=7),
        "lora-embedding": lora(target_modules=[*attention, embedding], lora_alpha=12),
        "lora-saved": lora(modules_to_save=[embedding, *norms]),
        "lora-tokens": lora(trainable_token_indices=TOKEN_IDS),
    }
    if task == "CAUSAL_LM":
        found |= {
            "lora-head": lora(target_modules=[*attention, "lm_head"], lora_alpha=6),
            "lora-head-alone": lora(target_modules=r".*lm_head|.*v_proj", bias="lora_only"),
            "lora-head-saved": lora(modules_to_save=["lm_head"], bias="all"),
            "lora-tokens-tied": lora(
                trainable_token_indices={embedding: TOKEN_IDS, "lm_head": TOKEN_IDS}
            ),
            "lora-tokens-apart": lora(
                trainable_token_indices={embedding: TOKEN_IDS[:9], "lm_head": TOKEN_IDS[5:]}
            ),
        }
    return found


def low_rank_configs(model_type: str, task: str) -> dict[str, peft.PeftConfig]:
    """LoRA's kin. PEFT has no LoHa and LoKr on a Conv1D: there they are on the head."""
    attention, layer = ATTENTION[model_type], LAYER[model_type]
    both = [*attention, *FEED_FORWARD[model_type]]
    patterns = {rf"{layer}\..*": 5}
    own = ["lm_head"] if model_type == "gpt2" else both

    def make(cls: type[peft.PeftConfig], targets: Any, **options: Any) -> peft.PeftConfig:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # save_projection=False is meant
            return cls(target_modules=targets, task_type=task, **options)

    found = {
        "adalora": make(peft.AdaLoraConfig, both, init_r=6, target_r=3, total_step=20),
        "adalora-r3": make(
            peft.AdaLoraConfig, attention, init_r=3, total_step=9, lora_alpha=5, orth_reg_weight=0.1
        ),
        "adalora-bias": make(peft.AdaLoraConfig, both, bias="all", total_step=9, lora_dropout=0.1),
        "adalora-default": peft.AdaLoraConfig(task_type=task, total_step=9),
        "vera": make(peft.VeraConfig, both, r=24, d_initial=0.4),
        "vera-drawn": make(
            peft.VeraConfig, both, r=7, projection_prng_key=11, save_projection=False, bias="all"
        ),
        "vera-dropout": make(peft.VeraConfig, attention, r=16, vera_dropout=0.2, bias="vera_only"),
        "vera-layers": make(peft.VeraConfig, both, r=70, layers_to_transform=[0, 2]),
        "loha": make(peft.LoHaConfig, own, r=4, alpha=16),
        "loha-full": make(peft.LoHaConfig, own, r=9, init_weights=False),
        "loha-patterns": make(
            peft.LoHaConfig, own, r=3, rank_pattern=patterns, alpha_pattern={rf"{layer}\..*": 11}
        ),
        "loha-dropout": make(
            peft.LoHaConfig, own, r=6, alpha=24, rank_dropout=0.2, module_dropout=0.3
        ),
        "lokr": make(peft.LoKrConfig, own, r=2, alpha=8),
        "lokr-full": make(peft.LoKrConfig, own, r=8, alpha=16, init_weights="lycoris"),
        "lokr-both": make(
            peft.LoKrConfig, own, r=3, alpha=12, decompose_both=True, decompose_factor=16
        ),
        "lokr-patterns": make(
            peft.LoKrConfig, own, r=1, decompose_factor=4, init_weights=False,
            rank_pattern=patterns, alpha_pattern={rf"{layer}\..*": 11},
        ),
        "lokr-dropout": make(
            peft.LoKrConfig, own, r=6, alpha=9, rank_dropout=0.2, module_dropout=0.3,
            rank_dropout_scale=True,
        ),
    }  # fmt: skip
    if model_type == "gpt2":  # the head is at no layer; and PEFT fails where all there is drops out
        lycoris = {n for n, c in found.items() if isinstance(c, peft.LoHaConfig | peft.LoKrConfig)}
        not_there = {n for n in lycoris if n.endswith(("-patterns", "-dropout"))}
        found = {name: config for name, config in found.items() if name not in not_there}
    return found


def module_configs(model_type: str, task: str) -> dict[str, peft.PeftConfig]:
    """Methods that scale, rotate or replace. PEFT has no OFT on a Conv1D: it is on the head."""
    attention, feed_forward = ATTENTION[model_type], FEED_FORWARD[model_type]
    both = [*attention, *feed_forward]
    norms = NORMS[model_type]

    def oft(**options: Any) -> peft.OFTConfig:
        targets = ["lm_head"] if model_type == "gpt2" else both
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is told of no version that is too old
            return peft.OFTConfig(**({"target_modules": targets, "task_type": task} | options))

    found = {
        "ia3": peft.IA3Config(
            target_modules=both, feedforward_modules=feed_forward, task_type=task
        ),
        "ia3-default": peft.IA3Config(task_type=task),
        "oft": oft(oft_block_size=16),
        "oft-r": oft(r=4, oft_block_size=0, bias="all"),
        "oft-shared": oft(oft_block_size=7, block_share=True, bias="oft_only"),
        "oft-exact": oft(oft_block_size=8, use_cayley_neumann=False, init_weights=False),
        "oft-3-terms": oft(
            oft_block_size=8, num_cayley_neumann_terms=3, init_weights=False, module_dropout=0.3
        ),
        "coft": oft(oft_block_size=16, coft=True, eps=0.2),
        "coft-exact": oft(coft=True, eps=0.1, use_cayley_neumann=False, init_weights=False),
        "norms": peft.LNTuningConfig(target_modules=norms, task_type=task),
        "tokens": peft.TrainableTokensConfig(token_indices=TOKEN_IDS, task_type=task),
        "tokens-drawn": peft.TrainableTokensConfig(
            token_indices=TOKEN_IDS[:20],
            target_modules=[EMBEDDING[model_type]],
            init_weights=False,
            task_type=task,
        ),
    }
    if model_type != "bert":  # for which PEFT has no default
        found["norms-default"] = peft.LNTuningConfig(task_type=task)
    return found


def prompt_configs(task: str) -> dict[str, peft.PeftConfig]:
    return {
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=5, task_type=task),
        "prefix-long": peft.PrefixTuningConfig(
            num_virtual_tokens=21, task_type=task, prefix_projection=True, encoder_hidden_size=24
        ),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=11, task_type=task),
        "p-tuning": peft.PromptEncoderConfig(
            num_virtual_tokens=6, encoder_hidden_size=24, task_type=task
        ),
        "multitask": peft.MultitaskPromptTuningConfig(
            num_virtual_tokens=4, num_ranks=3, num_tasks=1, task_type=task
        ),
    }


def our_config(config: peft.PeftConfig) -> AdapterConfig:
    """The same config as one of ours, for a new adapter."""
    values = json.loads(json.dumps(config.to_dict(), default=_plain))
    return config_from_dict({k: v for k, v in values.items() if k != "inference_mode"})


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value.value


def register(runtime: Runtime, name: str, folder: Path) -> tuple[AdapterInfo, str]:
    """A saved adapter, as its upload registers it."""
    config = (folder / CONFIG_NAME).read_bytes()
    return runtime.adapters.register(name, config, folder / WEIGHTS_NAME)


def save_random_adapter(
    model: PreTrainedModel,
    config: peft.PeftConfig,
    folder: Path,
    seed: int = 0,
    scale: float = 0.2,
) -> Path:
    """An adapter by peft with random weights that matter (noise of `scale`), saved by peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=scale)
        wrapped.save_pretrained(folder)
    return folder


class PeftOracle:
    """HF peft on one adapter (or a weighted sum of some), one sequence at a time."""

    def __init__(self, model: PreTrainedModel, parts: Sequence[tuple[Path, float]] = ()) -> None:
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        if not parts:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = peft.PeftModel.from_pretrained(self.model, parts[0][0], "a0")
            for i, (folder, _) in enumerate(parts[1:], 1):
                self.model.load_adapter(folder, f"a{i}")
            if len(parts) > 1 or parts[0][1] != 1:
                self.model.base_model.set_adapter([f"a{i}" for i in range(len(parts))])
                layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
                for layer in layers:
                    for i, (_, weight) in enumerate(parts):
                        if f"a{i}" in layer.scaling:
                            layer.scaling[f"a{i}"] *= weight
        self.model.eval()

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """`[len(token_ids), vocab]`, of the given tokens alone."""
        ids = torch.tensor([list(token_ids)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(self.model, "peft_type", None) == "MULTITASK_PROMPT_TUNING":
            inputs["task_ids"] = torch.tensor([0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = self.model(**inputs)
        return out.logits[0, -len(token_ids) :]

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The likeliest continuation, one full forward pass a token."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]
