"""Converts a GGUF file to a folder of safetensors weights, config and tokenizer.

Knows the GGUF format and what transformers' own reader gets wrong or leaves out; nothing of where
a file comes from or where folders are kept.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType
from tokenizers import pre_tokenizers
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

__all__ = ["CONVERTER_VERSION", "ConversionError", "convert_gguf"]

logger = logging.getLogger(__name__)

# Raise it whenever `convert_gguf` comes to write something else: kept conversions are named by it.
CONVERTER_VERSION = 1

Metadata = dict[str, Any]  # the file's own keys, such as "tokenizer.ggml.bos_token_id"

# How text is split before a byte-level vocabulary's merges apply is known only by a name. These are
# llama.cpp's names for two rules that transformers has no entry for: GPT-2's own, to which it falls
# back whatever the name, and GPT-2's with every digit alone, which it therefore gets wrong: "2024"
# came out as one or two tokens, where SmolLM2 was trained on four.
_GPT2_SPLIT = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "exaone4", "trillion", "mellum"}
_DIGIT_SPLIT = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}

# Vocabularies in which a whole word that is a token stays one, whether or not the merges lead to
# it, and which begin a text with BOS unless the file says otherwise.
_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "tekken"}

# What ends a turn in the chat templates of common model families.
_TURN_ENDS = {"<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<turn|>"}

_PROBE = "def f(x):\n\treturn x * 2024.5\n\n\n  # Größe, naïve, 世界, Привет, 🙂  end "


class ConversionError(Exception):
    """The file cannot be converted, or not exactly; the message says why."""


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` to the existing folder `folder`.

    Semantics: float32 weights equal to the file's dequantized values, a tied head stored once, and
    a tokenizer that agrees with the file's metadata.
    Raises ConversionError, after which `folder` may hold a part.
    """
    logger.info("Converting %s, once; about a minute for 250 million parameters", gguf)
    try:
        reader = GGUFReader(gguf)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tokenizer = _load_tokenizer(gguf, metadata)
        model = _load_weights(gguf, reader)
    except (KeyError, ValueError, NotImplementedError) as error:
        raise ConversionError(f"{gguf} cannot be read: {error}") from error
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config = GenerationConfig(
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=_end_token_ids(metadata),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    converted: Any = AutoTokenizer.from_pretrained(folder)  # as every later start will load it
    if wrong := _disagreements(converted, metadata):
        raise ConversionError(f"The tokenizer made from {gguf} is not the file's: {wrong}")


def _load_weights(gguf: Path, reader: GGUFReader) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model, report = loaded
    # transformers drops a tensor it has no place for without a word, such as the rotary factors of
    # Llama 3.1, and the model is then wrong. `parameters()` counts a tied head once, like the file.
    stored = sum(int(tensor.n_elements) for tensor in reader.tensors)
    taken = sum(parameter.numel() for parameter in model.parameters())
    if report["missing_keys"] or stored != taken:
        outside = [tensor.name for tensor in reader.tensors if not tensor.name.startswith("blk.")]
        raise ConversionError(
            f"{gguf} would not convert exactly: it holds {stored} numbers and the model takes "
            f"{taken}. Missing: {sorted(report['missing_keys'])}; tensors outside the layers: "
            f"{outside}. Use the original model's folder instead."
        )
    return model


def _load_tokenizer(gguf: Path, metadata: Metadata) -> PreTrainedTokenizerFast:
    split = metadata.get("tokenizer.ggml.pre")
    options: dict[str, Any] = {}
    if split in _WHOLE_WORDS:
        options["add_bos_token"] = True  # what the file states wins
    # Not AutoTokenizer: a model's own class may build its splitting rule anew when it is loaded
    # again, where this class takes tokenizer.json as it is written.
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(
        gguf.parent, gguf_file=gguf.name, **options
    )
    backend = tokenizer.backend_tokenizer
    if metadata["tokenizer.ggml.model"] == "gpt2":
        if split in _DIGIT_SPLIT:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        elif split not in _GPT2_SPLIT and split not in GGUF_PRE_TOKENIZER_SPLITS:
            raise ConversionError(
                f"{gguf} splits text by the rule {split!r}, which is not known here; its tokens "
                "would be silently wrong. Use the original model's folder instead."
            )
        backend.model.ignore_merges = split in _WHOLE_WORDS
    else:
        # A run of spaces that the vocabulary holds is matched whole and longest first. transformers
        # leaves runs to the merges, which cut Gemma's long ones, of 32 spaces and more, elsewhere.
        runs = [run for run in _tokens(metadata, TokenType.USER_DEFINED) if not run.strip(" ")]
        tokenizer.add_tokens([AddedToken("▁" * len(run), normalized=True) for run in runs])
    return tokenizer


def _tokens(metadata: Metadata, kind: TokenType) -> list[str]:
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    tokens = zip(metadata["tokenizer.ggml.tokens"], kinds, strict=False)
    return [token for token, its_kind in tokens if its_kind == kind]


def _end_token_ids(metadata: Metadata) -> int | list[int] | None:
    """Where generation stops: the file's end tokens, and a turn's end that its template writes.

    Gemma's chat models end at `<eos>` and at `<end_of_turn>`, and the file names only one of them.
    """
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [metadata.get(f"tokenizer.ggml.{name}") for name in names]
    template = metadata.get("tokenizer.chat_template", "")
    ids += [
        index
        for index, token in enumerate(metadata["tokenizer.ggml.tokens"])
        if token in _TURN_ENDS and token in template
    ]
    known = [token_id for token_id in dict.fromkeys(ids) if token_id is not None]
    return known[0] if len(known) == 1 else known or None


def _disagreements(tokenizer: PreTrainedTokenizerFast, metadata: Metadata) -> str:
    """What of a converted tokenizer differs from the metadata it was made from; "" if nothing."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def stated(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    vocabulary = {token: index for index, token in enumerate(stated("tokens"))}
    control = _tokens(metadata, TokenType.CONTROL)
    split = stated("pre")
    adds_bos = stated("add_bos_token", stated("model") == "llama" or split in _WHOLE_WORDS)
    agrees = {
        "vocabulary size": len(tokenizer) == len(vocabulary),
        "BOS": stated("bos_token_id") in (None, tokenizer.bos_token_id),
        "EOS": stated("eos_token_id") in (None, tokenizer.eos_token_id),
        "padding": stated("padding_token_id") in (None, tokenizer.pad_token_id),
        "control tokens": all(encode(token) == [vocabulary[token]] for token in control),
        "BOS before a text": adds_bos == (tokenizer.encode("a")[0] == stated("bos_token_id")),
        "round trip of a text": tokenizer.decode(encode(_PROBE)) == _PROBE,
        "chat template": tokenizer.chat_template == metadata.get("tokenizer.chat_template"),
    }
    return ", ".join(name for name, does in agrees.items() if not does)
