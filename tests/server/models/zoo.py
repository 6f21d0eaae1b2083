"""Tiny random models of many architectures, by name; made by code, the same each time."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

VOCAB = 64

_COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 256,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 8}

#: Architectures that the paged attention serves; after a slash a variant.
SERVED: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"attention_bias": True},
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 16},
    "qwen3_moe": _COMMON | _QWEN_MOE | {"head_dim": 16},
    "qwen2_moe": _COMMON | _QWEN_MOE | {"shared_expert_intermediate_size": 16},
    "mistral": _COMMON | {"sliding_window": 8},
    "mistral/long": _COMMON | {"sliding_window": 100},
    "mixtral": _COMMON | _MOE | {"sliding_window": 8},
    "gemma": _COMMON | {"head_dim": 8},
    "gemma2": _COMMON | _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3_text": _COMMON | _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    "phi": _COMMON,
    "phi3": _COMMON | {"sliding_window": 8},
    "gpt2": _GPT2,
    "gpt_neox": _COMMON,
    "opt": _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": _COMMON,
    "gpt_oss": _COMMON | _MOE | {
        "head_dim": 8, "sliding_window": 8, "rope_parameters": {"rope_type": "default"}
    },
    "olmo2": _COMMON,
    "olmo3": _COMMON | {"sliding_window": 8},
    "cohere": _COMMON,
    "cohere2": _COMMON | {"sliding_window": 8},
    "stablelm": _COMMON,
    "starcoder2": _COMMON | {"sliding_window": 8},
    "granite": _COMMON | {"attention_multiplier": 0.3},
    "smollm3": _COMMON,
    "glm4": _COMMON | {"head_dim": 8},
    "exaone4": _COMMON | {"sliding_window": 8},
    "deepseek_v3": _COMMON | {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 6, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
    },
}  # fmt: skip

_BERT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCAB, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip

#: Encoders that are served.
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT | {"pad_token_id": 1},
    "xlm-roberta": _BERT | {"pad_token_id": 1},
    "electra": _BERT | {"embedding_size": 16},
    "distilbert": {
        "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB,
        "max_position_embeddings": 128, "initializer_range": 0.2,
    },
}  # fmt: skip

#: Encoders that are not, with a part of the reason.
REFUSED_ENCODERS: dict[str, tuple[dict[str, Any], str]] = {
    "modernbert": (
        _BERT | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1,
                 "eos_token_id": 2, "local_attention": 8},
        "hides something",
    ),
    "mpnet": (_BERT, "0 call transformers' attention interface"),
    "albert": (_BERT | {"embedding_size": 16}, "each should, once"),
    "deberta-v2": (_BERT, "0 call transformers' attention interface"),
    "llama": (_COMMON, "hides something"),  # a decoder without its output embedding
}  # fmt: skip

_LLAMA4 = _COMMON | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
_WINDOWED_MOE = SERVED["qwen2_moe"] | {"use_sliding_window": True}
_NO_CALLS = "0 call transformers' attention interface"
_UNTOLD = "hides something"

#: Architectures that it does not serve, with a part of the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": (_GPT2, _NO_CALLS),
    "falcon": (_COMMON, _NO_CALLS),
    "falcon/new": (_COMMON | {"new_decoder_architecture": True, "alibi": False}, _NO_CALLS),
    "gptj": (_GPT2 | {"rotary_dim": 4}, _NO_CALLS),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB}, _NO_CALLS),
    "mamba2": (
        {
            "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "num_heads": 4,
            "head_dim": 16, "state_size": 8, "n_groups": 1,
        },
        _NO_CALLS,
    ),
    "qwen3_next": (
        _COMMON | _QWEN_MOE | {
            "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_hidden_layers": 4,
        },
        "of 4 layers, 1 call",
    ),
    "diffllama": (_COMMON, "each should, once"),
    "falcon_h1": (
        _COMMON | {
            "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
            "mamba_d_state": 8,
        },
        "differs from eager attention",
    ),
    # Windows and chunks by a mask alone, shorter and longer than the probe's sequences.
    "llama4_text/short": (_LLAMA4 | {"attention_chunk_size": 8}, _UNTOLD),
    "llama4_text/long": (_LLAMA4 | {"attention_chunk_size": 128}, _UNTOLD),
    "qwen2_moe/short": (_WINDOWED_MOE | {"sliding_window": 8}, _UNTOLD),
    "qwen2_moe/long": (_WINDOWED_MOE | {"sliding_window": 100}, _UNTOLD),
    "phimoe/long": (_COMMON | _MOE | {"sliding_window": 100}, _UNTOLD),
    "doge": (_COMMON, _UNTOLD),
}  # fmt: skip


def make(name: str, config: dict[str, Any] | None = None, **changes: Any) -> PreTrainedModel:
    """A model in fp32, with random biases and norms: ones and zeros would hide mistakes."""
    torch.manual_seed(0)
    if config is None:
        config = SERVED[name]
    described = AutoConfig.for_model(name.partition("/")[0], **(config | changes))
    model = AutoModelForCausalLM.from_config(described).float().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def make_encoder(name: str, config: dict[str, Any] | None = None) -> PreTrainedModel:
    """The encoder of that model type, its weights random."""
    torch.manual_seed(0)
    model_type = name.partition("/")[0]
    given = ENCODERS[name] if config is None else config
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **given))
    return model.float().eval()


__all__ = ["ENCODERS", "REFUSED", "REFUSED_ENCODERS", "SERVED", "VOCAB", "make", "make_encoder"]
