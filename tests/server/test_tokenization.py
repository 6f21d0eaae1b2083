"""Incremental text against whole decoding by transformers; stop strings against a plain search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from server.errors import BadRequest
from server.tokenization import Detokenizer, Tokenizer
from tests import tiny

TEXTS = [
    "Hello world, how are you? I am fine.",
    "  two spaces, a tab\tand\n\na line ",
    "日本語の文章と中文和한국어。",
    "emoji 👩‍👩‍👧‍👦 and 🇩🇪 and 👍🏽!",
    "mixed: naïve café — ≤ € 𝄞 end",
    "🙂",
    "a",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def wrap(raw: RawTokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2: some characters are whole tokens, some are several, and some tokens end within."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL.values()), show_progress=False,
    )  # fmt: skip
    raw.train_from_iterator(TEXTS * 2, trainer)
    return wrap(raw)


def sentencepiece(strip: bool) -> PreTrainedTokenizerFast:
    """As Llama 2 (`strip`) or Gemma: ▁ for spaces, unknown characters as bytes."""
    vocab = {token: i for i, token in enumerate(SPECIAL.values())}
    for token in [
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *dict.fromkeys(c.replace(" ", "▁") for c in "".join(TEXTS) if ord(c) < 128),
        "▁▁", "▁Hello", "▁world", "▁how", "ell", "日",
    ]:  # fmt: skip
        vocab.setdefault(token, len(vocab))
    merges = [("▁", "▁"), ("e", "l"), ("el", "l"), ("▁", "H"), ("▁H", "ell"), ("▁Hell", "o")]
    merges += [("▁", "w"), ("o", "r"), ("▁w", "or"), ("▁wor", "l"), ("▁worl", "d")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    raw = RawTokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if strip else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return wrap(raw)


def metaspace() -> PreTrainedTokenizerFast:
    """As T5 and many Unigram models: the decoder itself drops the first space."""
    pieces = [
        *SPECIAL.values(),
        "▁",
        "▁Hello",
        "▁world",
        "▁how",
        ",",
        *"abcdefghilmnorstuwyHI.?日本語",
    ]
    raw = RawTokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    return wrap(raw)


TOKENIZERS = {
    "bytes": tiny.tokenizer()._tokenizer,
    "byte-level": byte_level(),
    "llama-2": sentencepiece(strip=True),
    "gemma": sentencepiece(strip=False),
    "metaspace": metaspace(),
}


@pytest.fixture(params=TOKENIZERS)
def original(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


def whole(original: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The oracle."""
    return original.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )  # fmt: skip


def in_order(original: PreTrainedTokenizerFast, ids: Sequence[int]) -> tuple[str, str]:
    """The oracle for text that grows: whole characters, and what is left of the last one.

    Decoders of bytes turn a run of them that ends within a character into replacement characters,
    all of it, though those before were whole.
    """
    for end in range(len(ids), -1, -1):
        text = whole(original, ids[:end])
        if not text.endswith("\ufffd"):
            return text, whole(original, ids[end:])
    raise AssertionError


def pieces(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


# -- incremental text ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_whole(original: PreTrainedTokenizerFast, text: str) -> None:
    """Also where it ends within a character, after each of its tokens."""
    ids = original(text, add_special_tokens=False)["input_ids"]
    for end in range(len(ids) + 1):
        detokenizer = Tokenizer(original).detokenizer()
        assert "".join(pieces(detokenizer, ids[:end])) == "".join(in_order(original, ids[:end]))
        if end == len(ids):
            assert "".join(in_order(original, ids)) == whole(original, ids)


def test_characters_are_given_out_whole_and_at_once(original: PreTrainedTokenizerFast) -> None:
    """No replacement character before the end, and no character later than its last token."""
    for text in TEXTS:
        ids = original(text, add_special_tokens=False)["input_ids"]
        detokenizer, given = Tokenizer(original).detokenizer(), ""
        for end, token_id in enumerate(ids, 1):
            given += detokenizer.push(token_id)
            texts = [whole(original, ids[:n]).rstrip("\ufffd") for n in range(end + 1)]
            assert given == max(texts, key=len)


@pytest.mark.parametrize("name", ["bytes", "byte-level"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_bytes_add_up_to_the_whole(name: str, data: st.DataObject) -> None:
    """What a model may say that no text encodes to: torn characters, special tokens anywhere."""
    original = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(original) - 1), max_size=40))
    assert "".join(pieces(Tokenizer(original).detokenizer(), ids)) == whole(original, ids)


@pytest.mark.parametrize("name", ["llama-2", "gemma"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_byte_tokens_are_survived(name: str, data: st.DataObject) -> None:
    """A torn character makes these decoders spoil whole ones beside it, which were given out: then
    pieces cannot add up to the whole, but every ordinary token's text still comes, in order."""
    original = TOKENIZERS[name]
    tokens = st.sampled_from(
        ["<0xE4>", "<0xB8>", "<0xAD>", "<0xFF>", "<0x41>", "▁Hello", "日", "l"]
    )
    ids = original.convert_tokens_to_ids(data.draw(st.lists(tokens, min_size=1, max_size=14)))
    hello, end = original.convert_tokens_to_ids(["▁Hello", "."])
    text = "".join(pieces(Tokenizer(original).detokenizer([hello]), [*ids, end]))
    assert text.endswith(".")
    assert text.count("Hello") == ids.count(hello)
    if "\ufffd" not in whole(original, ids):
        assert text == whole(original, [hello, *ids, end])[len(whole(original, [hello])) :]


def test_a_torn_character_spoils_nothing_that_follows() -> None:
    """The decode streams of `tokenizers` raise here."""
    original = TOKENIZERS["llama-2"]
    ids = original.convert_tokens_to_ids(["<0xE4>", "<0xB8>", "<0xAD>", "<0xFF>", "▁Hello", "l"])
    assert pieces(Tokenizer(original).detokenizer(), ids) == [
        "",
        "",
        "中",
        "",
        "\ufffd Hello",
        "l",
        "",
    ]


def test_special_tokens_have_no_text(original: PreTrainedTokenizerFast) -> None:
    ids = original("Hello how", add_special_tokens=False)["input_ids"]
    mixed = [original.bos_token_id]
    for token_id in ids:
        mixed += [token_id, original.eos_token_id, original.bos_token_id]
    parts = pieces(Tokenizer(original).detokenizer(), mixed)
    assert "".join(parts) == whole(original, ids) == "Hello how"


def test_many_special_tokens_cost_nothing() -> None:
    """As where a finished model is told to ignore its end."""
    original = TOKENIZERS["byte-level"]
    calls = 0

    def counting(ids: list[int]) -> str:
        nonlocal calls
        calls += len(ids)
        return whole(original, ids)

    detokenizer = Tokenizer(original).detokenizer()
    detokenizer._decode = counting
    for _ in range(1000):
        assert detokenizer.push(original.eos_token_id) == ""
    assert calls < 1000


# -- after a prompt ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_text_goes_on_where_the_prompt_ends(original: PreTrainedTokenizerFast, text: str) -> None:
    """Prompt and completion, put together, are the text of all tokens: no space is lost."""
    ids = original(f"Hello world {text}")["input_ids"]
    for cut in range(1, len(ids)):
        prompt, output = ids[:cut], ids[cut:]
        if "\ufffd" in whole(original, prompt) or not whole(original, prompt):
            continue
        parts = pieces(Tokenizer(original).detokenizer(prompt), output)
        assert whole(original, prompt) + "".join(parts) == whole(original, ids)


@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [
        ("llama-2", ["▁how"], " Hello"),
        ("llama-2", ["<s>", "▁how", "</s>"], " Hello"),
        ("llama-2", ["<0xE4>", "<0xB8>", "<0xAD>"], " Hello"),
        ("llama-2", ["<s>"], "Hello"),
        ("llama-2", [], "Hello"),
        ("gemma", ["<s>"], " Hello"),
        ("metaspace", ["▁how"], " Hello"),
        ("metaspace", [], "Hello"),
    ],
)
def test_the_space_of_the_first_word(name: str, prompt: list[str], expected: str) -> None:
    """It is dropped only where the text begins."""
    original = TOKENIZERS[name]
    detokenizer = Tokenizer(original).detokenizer(original.convert_tokens_to_ids(prompt))
    assert detokenizer.push(original.convert_tokens_to_ids("▁Hello")) == expected


@pytest.mark.parametrize("name", ["bytes", "byte-level", "llama-2", "gemma"])
def test_a_prompt_of_many_bytes_is_cut_between_characters(name: str) -> None:
    original = TOKENIZERS[name]
    prompt = original("中" * 30, add_special_tokens=False)["input_ids"]
    output = original("文a", add_special_tokens=False)["input_ids"]
    output = output[1:] if name == "llama-2" else output  # its leading ▁
    for shift in range(8):
        detokenizer = Tokenizer(original).detokenizer([*prompt, *output[-1:] * shift])
        assert "".join(pieces(detokenizer, output)) == "文a"


def test_a_prompt_that_ends_within_a_character() -> None:
    """Token ids may; the rest of it is no character by itself, and what follows is right."""
    original = TOKENIZERS["bytes"]
    ids = original("é!", add_special_tokens=False)["input_ids"]
    parts = pieces(Tokenizer(original).detokenizer(ids[:1]), ids[1:])
    assert "".join(parts).endswith("!")


# -- stop strings --------------------------------------------------------------------------------


def spelled(stop: Sequence[str] = ()) -> tuple[dict[str, int], Detokenizer]:
    """A vocabulary that grows as it is used, any piece of text a token; its detokenizer."""

    class Ids(dict[str, int]):
        def __missing__(self, piece: str) -> int:
            self[piece] = len(self)
            return self[piece]

    ids = Ids()

    def decode(token_ids: list[int]) -> str:
        return "".join(list(ids)[i] for i in token_ids)

    return ids, Detokenizer(decode, frozenset(), [], stop)


def say(stop: Sequence[str], *parts: str) -> tuple[list[str], bool]:
    """What each piece gives out, and at last the end; pieces after a stop are not pushed."""
    ids, detokenizer = spelled(stop)
    given = []
    for part in parts:
        given.append(detokenizer.push(ids[part]))
        if detokenizer.stopped:
            break
    return [*given, detokenizer.finish()], detokenizer.stopped


@pytest.mark.parametrize(
    ("stop", "parts", "given", "stopped"),
    [
        # across tokens, and within one
        (["END"], ["go", " E", "N", "D", "x"], ["go", " ", "", "", ""], True),
        (["END"], ["go END on"], ["go ", ""], True),
        # held back, then released: by what follows, or at the end
        (["END"], ["a E", "N", "C"], ["a ", "", "ENC", ""], False),
        (["END"], ["a E", "N"], ["a ", "", "EN"], False),
        (["END"], ["a E", "E", "N"], ["a ", "E", "", "EN"], False),
        # overlapping prefixes
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", "", ""], True),
        (["abab"], ["ab", "a", "a", "bac"], ["", "", "aba", "abac", ""], False),
        (["abab", "aabx"], ["ab", "a", "abx"], ["", "", "ab", ""], True),
        # several: the one that begins first
        (["you", "are"], ["how are you"], ["how ", ""], True),
        (["are you", "you"], ["how are", " ", "you"], ["how ", "", "", ""], True),
        (["re", "are you"], ["how are"], ["how a", ""], True),
        (["b", "abc"], ["a", "b"], ["", "a", ""], True),
        # at the very start; all there is
        (["\n"], ["\n", "x"], ["", ""], True),
        (["He"], ["Hello"], ["", ""], True),
        (["x"], ["x"], ["", ""], True),
        # only text, and no stops
        ([], ["any", "thing"], ["any", "thing", ""], False),
        (["zz"], ["any", "thing"], ["any", "thing", ""], False),
        # a line break after text
        (["\n\n"], ["one\n", "two\n", "\nthree"], ["one", "\ntwo", "", ""], True),
    ],
)  # fmt: skip
def test_stop_strings(
    stop: list[str], parts: list[str], given: list[str], stopped: bool
) -> None:  # fmt: skip
    assert say(stop, *parts) == (given, stopped)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    parts=st.lists(st.text("abc", min_size=1, max_size=3), max_size=12),
)
def test_text_is_given_out_when_no_stop_can_begin_in_it(stop: list[str], parts: list[str]) -> None:
    """Never too early: no stop string, nor a part of one that is completed later. Never too late:
    what is held back begins a stop string."""
    ids, detokenizer = spelled(stop)
    text = given = ""
    for part in parts:
        text += part
        given += detokenizer.push(ids[part])
        starts = [i for s in stop if (i := text.find(s)) >= 0]
        assert detokenizer.stopped == bool(starts)
        if starts:
            assert given == text[: min(starts)]
            break
        held = [i for i in range(len(text)) if any(s.startswith(text[i:]) for s in stop)]
        assert given == text[: min(held, default=len(text))]
    given += detokenizer.finish()
    if not detokenizer.stopped:
        assert given == text
    assert not any(s in given for s in stop)


def test_no_stop_before_it_is_allowed() -> None:
    """Text of the tokens before is given out at once, whole stop strings with it; one that began
    there does not count."""
    ids, detokenizer = spelled(["END"])
    assert detokenizer.push(ids["xEND"], may_stop=False) == "xEND"
    assert detokenizer.push(ids["yEN"], may_stop=False) == "yEN"
    assert not detokenizer.stopped
    assert detokenizer.push(ids["D"]) == "D"
    assert detokenizer.push(ids["zEND"]) == "z"
    assert detokenizer.stopped
    assert detokenizer.finish() == ""


def test_a_stop_string_of_several_bytes_a_character() -> None:
    original = TOKENIZERS["bytes"]
    ids = original("go 中文!", add_special_tokens=False)["input_ids"]
    detokenizer = Tokenizer(original).detokenizer((), ["中文"])
    given = ""
    for token_id in ids[:-2]:
        given += detokenizer.push(token_id)
    assert not detokenizer.stopped
    given += detokenizer.push(ids[-2])
    assert detokenizer.stopped, "not stopped with its last byte"
    assert given + detokenizer.finish() == "go "


def test_a_stop_string_before_a_torn_character() -> None:
    """One token may hold both: the text must not come out with the rest at the end."""
    tokens = [b"go END\xf0", b"\x9f", b"\x99\x82"]

    def decode(ids: list[int]) -> str:
        return b"".join(tokens[i] for i in ids).decode(errors="replace")

    stopping = Detokenizer(decode, frozenset(), [], ["END"])
    assert stopping.push(0) == "go "
    assert stopping.stopped
    assert stopping.finish() == ""
    going = Detokenizer(decode, frozenset(), [], ["ENDE"])
    assert [going.push(i) for i in range(3)] == ["go ", "", "END🙂"]
    torn = Detokenizer(decode, frozenset(), [], ["x"])
    assert [torn.push(0), torn.push(1), torn.finish()] == ["go END", "", "\ufffd"]


def test_the_prompt_s_end_is_no_part_of_a_stop_string() -> None:
    original = TOKENIZERS["bytes"]
    prompt = original("EN", add_special_tokens=False)["input_ids"]
    output = original("D.", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(Tokenizer(original).detokenizer(prompt, ["END"]), output)) == "D."


# -- prompts -------------------------------------------------------------------------------------


@pytest.fixture
def chatty() -> Tokenizer:
    original = sentencepiece(strip=False)
    original.chat_template = (
        "<s>{% for m in messages %}"
        "{% if m.role == 'nobody' %}{{ raise_exception('no role nobody') }}{% endif %}"
        "{{ m.role + ': ' + m.content }}\n{% endfor %}"
        "{% if tools %}{{ tools | length }} tools\n{% endif %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return Tokenizer(original)


def test_chat_is_the_template_s_text(chatty: Tokenizer) -> None:
    """With one leading token, though plain text gets one from the tokenizer."""
    original = chatty._tokenizer
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "how"}]
    text = "user: Hello\nassistant: how\nassistant:"
    ids = original(text)["input_ids"]
    assert chatty.chat(messages) == ids == chatty.encode(text)
    assert ids.count(original.bos_token_id) == 1
    assert chatty.chat(messages, [{"type": "function"}]) != ids


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "nobody", "content": "x"}, "no role nobody"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": {"a": 1}}, "str"),
        ({}, "role"),
    ],
    ids=str,
)
def test_a_template_that_refuses(chatty: Tokenizer, message: dict, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason) as caught:
        chatty.chat([message])
    assert caught.value.param == "messages"


def test_a_model_without_a_template() -> None:
    with pytest.raises(BadRequest, match="no chat template") as caught:
        Tokenizer(byte_level()).chat([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_a_broken_template_is_no_crash() -> None:
    original = byte_level()
    for template in ("{% for %}", "{{ messages.nothing.at.all }}", "{{ 'a' + 1 }}"):
        original.chat_template = template
        with pytest.raises(BadRequest):
            Tokenizer(original).chat([{"role": "user", "content": "x"}])


def test_from_a_folder(original: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    original.save_pretrained(tmp_path)
    loaded = Tokenizer.from_folder(tmp_path)
    assert loaded.vocab_size == len(original)
    assert loaded.eos_token_id == original.eos_token_id
    for text in TEXTS[:3]:
        ids = loaded.encode(text)
        assert ids == original(text)["input_ids"]
        assert loaded.decode(ids) == whole(original, ids)
    assert loaded.token_text(original.eos_token_id) == original.eos_token
