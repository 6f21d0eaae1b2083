"""Tiny random models, tokenizers and PEFT adapters, made by code; and the oracle, HF peft."""

from __future__ import annotations

import copy
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
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

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


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """Random biases and norms too: zeros and ones would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name or "ln_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise, alpha=0.1)
    return model.float().eval()


def tokenizer() -> Tokenizer:
    """One token a byte, and a few special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return Tokenizer(fast)


def runtime(model: PreTrainedModel, data_dir: Path, **changes: Any) -> Runtime:
    """A runtime around a copy of `model`; not started."""
    quantization = changes.pop("quantization", "none")
    base_name = changes.pop("base_name", "tiny")
    settings = Settings(
        data_dir=data_dir,
        **({"kv_memory": "8MiB", "adapter_memory": "4MiB", "block_size": 8} | changes),
    )
    loaded = prepare_model(copy.deepcopy(model), quantization, torch.device("cpu"))
    return assemble(settings, loaded, tokenizer(), base_name)


#: Per architecture, the modules of attention and of the feed-forward block.
ATTENTION = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "gemma3_text": ["q_proj", "v_proj"]}
FEED_FORWARD = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "gemma3_text": ["down_proj"]}


def peft_configs(model_type: str) -> dict[str, peft.PeftConfig]:
    """Every method and option that is served, three ranks and more, by a name for messages."""
    attention, feed_forward = ATTENTION[model_type], FEED_FORWARD[model_type]
    both = [*attention, *feed_forward]

    def lora(**options: Any) -> peft.LoraConfig:
        return peft.LoraConfig(
            **({"r": 4, "target_modules": both, "task_type": "CAUSAL_LM"} | options)
        )

    layer = "h.1" if model_type == "gpt2" else "layers.1"
    patterns = {rf"{layer}\..*": 5}
    return {
        "lora-r4": lora(lora_alpha=8),
        "lora-r8-all": lora(r=8, lora_alpha=16, target_modules="all-linear"),
        "lora-r16-rslora": lora(r=16, lora_alpha=4, use_rslora=True, target_modules=attention),
        "lora-patterns": lora(r=3, rank_pattern=patterns, alpha_pattern={rf"{layer}\..*": 11}),
        "lora-layers": lora(layers_to_transform=[0, 2]),
        "lora-regex": lora(target_modules=rf".*{layer}\..*({both[0]}|{both[-1]})"),
        "lora-exclude": lora(exclude_modules=rf".*{layer}.*"),
        "dora": lora(use_dora=True, lora_alpha=6),
        "lora-bias-all": lora(bias="all"),
        "lora-bias-own": lora(bias="lora_only"),
        "lora_bias": lora(lora_bias=True, lora_alpha=7),
        "ia3": peft.IA3Config(
            target_modules=both, feedforward_modules=feed_forward, task_type="CAUSAL_LM"
        ),
        "ia3-default": peft.IA3Config(task_type="CAUSAL_LM"),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "prefix-long": peft.PrefixTuningConfig(
            num_virtual_tokens=21, task_type="CAUSAL_LM", prefix_projection=True,
            encoder_hidden_size=24,
        ),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=11, task_type="CAUSAL_LM"),
        "p-tuning": peft.PromptEncoderConfig(
            num_virtual_tokens=6, encoder_hidden_size=24, task_type="CAUSAL_LM"
        ),
    }  # fmt: skip


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = torch.tensor([list(token_ids)])
            out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return out.logits[0, -len(token_ids) :]

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The likeliest continuation, one full forward pass a token."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]
