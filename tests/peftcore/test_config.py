"""Configs in PEFT's JSON: read as PEFT reads them, written so that PEFT reads them, or refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest

from peftcore import (
    AdaLoraConfig,
    AdapterConfig,
    ConfigError,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    UnsupportedError,
    VeraConfig,
    config_from_dict,
    config_from_json,
    supported_methods,
)
from peftcore.config import CONFIG_NAME, MAX_CONFIG_BYTES
from tests import tiny
from tests.peftcore.worlds import World, quiet

SERVED: dict[str, tuple[type[AdapterConfig], type[peft.PeftConfig]]] = {
    "LORA": (LoraConfig, peft.LoraConfig),
    "IA3": (IA3Config, peft.IA3Config),
    "ADALORA": (AdaLoraConfig, peft.AdaLoraConfig),
    "LOHA": (LoHaConfig, peft.LoHaConfig),
    "LOKR": (LoKrConfig, peft.LoKrConfig),
    "VERA": (VeraConfig, peft.VeraConfig),
    "PREFIX_TUNING": (PrefixTuningConfig, peft.PrefixTuningConfig),
    "PROMPT_TUNING": (PromptTuningConfig, peft.PromptTuningConfig),
    "P_TUNING": (PromptEncoderConfig, peft.PromptEncoderConfig),
    "MULTITASK_PROMPT_TUNING": (MultitaskPromptTuningConfig, peft.MultitaskPromptTuningConfig),
    "OFT": (OFTConfig, peft.OFTConfig),
    "LN_TUNING": (LNTuningConfig, peft.LNTuningConfig),
    "TRAINABLE_TOKENS": (TrainableTokensConfig, peft.TrainableTokensConfig),
}
#: What a config must have: ours for prompts, PEFT's for AdaLoRA (ours only once it is trained).
REQUIRED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3},
}
#: Fields that our base class has and a config of PEFT's has not; they cannot be set.
NOT_IN_PEFT = {"TRAINABLE_TOKENS": {"modules_to_save"}}
HERE = Path(__file__)
CASES = json.loads(HERE.with_name("peft_configs.json").read_text())
SHARED = HERE.parents[2].parent / "shared" / "data" / "adapter_configs"
#: Configs of peft's own benchmarks; none where they are not at hand.
SHARED_FILES = sorted(SHARED.glob("**/*.json"))


def plain(value: Any) -> Any:
    """PEFT's enumerations as JSON has them; lists as the sets that they mean."""
    if isinstance(value, set | list):
        return sorted(set(value))
    return getattr(value, "value", value)


def fields_of(config: Any) -> set[str]:
    """But PEFT's stamp of its own version, which has its default there."""
    return {field.name for field in dataclasses.fields(config)} - {"peft_version"}


def assert_reads_as_in_peft(raw: dict[str, Any], ours: AdapterConfig) -> None:
    with quiet():
        theirs = peft.PeftConfig.from_peft_type(**raw)
    assert_same(ours, theirs)


def assert_same(ours: AdapterConfig, theirs: peft.PeftConfig) -> None:
    """Every field that we keep has the value that PEFT gives it."""
    missing = NOT_IN_PEFT.get(ours.peft_type, set())
    for name in fields_of(ours) - missing:
        assert plain(getattr(ours, name)) == plain(getattr(theirs, name)), name
    for name in missing:
        assert getattr(ours, name) is None
        assert not hasattr(theirs, name)


def refusal(raw: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config_from_json(raw if isinstance(raw, str | bytes) else json.dumps(raw))
    assert str(caught.value).startswith(f"{caught.value.field}: ")
    return caught.value


# -- real files --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in CASES])
def test_every_method_parses_or_is_refused_by_field(case: dict[str, Any]) -> None:
    raw = case["config"]
    if case["refused"] is None:
        ours = config_from_json(json.dumps(raw))
        assert type(ours) is SERVED[raw["peft_type"]][0]
        assert_reads_as_in_peft(raw, ours)
    else:
        error = refusal(raw)
        assert type(error) is UnsupportedError
        assert error.field == case["refused"]
        if error.field == "peft_type":
            assert raw["peft_type"] in str(error)
            assert all(method in str(error) for method in SERVED)


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in SHARED_FILES])
def test_pefts_benchmark_configs(path: Path) -> None:
    raw = json.loads(path.read_text())
    expected = None
    if raw["peft_type"] not in SERVED:
        expected = "peft_type"
    elif raw.get("init_lora_weights") == "mica":
        expected = "init_lora_weights"
    else:
        expected = next((k for k in ("use_bdlora", "kasa_config") if raw.get(k)), None)
    if expected is None:
        ours = config_from_json(path.read_bytes())
        assert type(ours) is SERVED[raw["peft_type"]][0]
        assert_reads_as_in_peft(raw, ours)
    else:
        error = refusal(path.read_bytes())
        assert type(error) is UnsupportedError
        assert error.field == expected


def test_supported_methods() -> None:
    assert supported_methods() == sorted([*SERVED, "BOTTLENECK"])  # which peft has not


@pytest.mark.parametrize("method", sorted({m.value for m in peft.PeftType} - SERVED.keys()))
def test_every_other_method_of_peft_is_refused_by_name(method: str) -> None:
    error = refusal({"peft_type": method, "target_modules": ["q_proj"]})
    assert type(error) is UnsupportedError
    assert error.field == "peft_type"
    assert method in str(error)
    assert all(served in str(error) for served in SERVED)


# -- round trips -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
def test_configs_go_to_peft_and_back(world: World, tmp_path: Path) -> None:
    """PEFT's file → ours → our file → PEFT: the same config; and once more through ours."""
    for name, folder in world.folders.items():
        ours = config_from_json((folder / CONFIG_NAME).read_bytes())
        ours.save_pretrained(tmp_path / name)
        original = peft.PeftConfig.from_pretrained(folder)
        reread = peft.PeftConfig.from_pretrained(tmp_path / name)  # it warns of keys it misses
        for field in fields_of(original) - ours.training_only:
            assert getattr(reread, field) == getattr(original, field), (name, field)
        assert config_from_json((tmp_path / name / CONFIG_NAME).read_bytes()) == ours


@pytest.mark.parametrize("method", SERVED)
def test_defaults_are_pefts(method: str, tmp_path: Path) -> None:
    ours_class, theirs_class = SERVED[method]
    given = REQUIRED.get(method, {})
    ours, theirs = ours_class(**given), theirs_class(**given)
    assert_same(ours, theirs)
    assert_reads_as_in_peft({"peft_type": method, **given}, ours)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == ours.to_dict()
    assert list(ours.to_dict()) == sorted(ours.to_dict())
    reread = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(reread) is theirs_class
    assert_same(ours, reread)


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SERVED)
def test_every_option_of_peft_has_a_verdict(method: str) -> None:
    """A field of PEFT's config is one of ours, or training only, or refused."""
    ours, theirs = SERVED[method]
    known = fields_of(ours)
    assert fields_of(theirs) - {"peft_type"} <= known | ours.training_only | set(ours.refused)
    assert not known & set(ours.refused)


@pytest.mark.parametrize(
    ("method", "option"), [(m, option) for m, (cls, _) in SERVED.items() for option in cls.refused]
)
def test_a_refused_option_says_what_to_do(method: str, option: str) -> None:
    error = refusal({"peft_type": method, **REQUIRED.get(method, {}), option: {"a": 1}})
    assert type(error) is UnsupportedError
    assert error.field == option
    why, _, what_to_do = str(error).removeprefix(f"{option}: ").partition(": ")
    assert why
    assert what_to_do


@pytest.mark.parametrize("method", SERVED)
def test_a_config_is_made_with_every_option_of_pefts(method: str) -> None:
    """At PEFT's defaults; what would compute something else is refused as in a file."""
    ours, theirs = SERVED[method]
    required = REQUIRED.get(method, {})
    with quiet():
        options = vars(theirs(**required)) | {"peft_version": None}
    assert ours(**options) == ours(**required)
    for option, why in ours.refused.items():
        with pytest.raises(UnsupportedError, match=re.escape(why)):
            ours(**required, **{option: {"a": 1}})
    with pytest.raises(UnsupportedError, match=f"new_option: not known for {method}"):
        ours(**required, new_option=1)
    with pytest.raises(ConfigError, match="peft_type: 'BOFT', where"):
        ours(**required, peft_type="BOFT")
    with pytest.raises(ConfigError, match="task_type: Input should be a valid string"):
        ours(**required, task_type=5)


def test_a_slip_of_the_pen_is_found() -> None:
    assert "did you mean lora_alpha?" in str(refusal({"peft_type": "LORA", "lora_aplha": 16}))
    assert "did you mean" not in str(refusal({"peft_type": "LORA", "banana": 16}))


@pytest.mark.parametrize("method", SERVED)
def test_an_unknown_option_is_refused_only_if_it_is_set(method: str) -> None:
    raw: dict[str, Any] = {"peft_type": method, **REQUIRED.get(method, {})}
    for neutral in (None, False, {}, [], ""):
        config_from_dict({**raw, "new_option": neutral})
    for value in (True, 0, 1, 0.5, "x", ["x"], {"x": 1}):
        error = refusal({**raw, "new_option": value})
        assert type(error) is UnsupportedError
        assert error.field == "new_option"
        assert method in str(error)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("r", ["8", 8.0, True, None, 0, -1, 10**400, [8]]),
        ("lora_alpha", ["16", True, None, 10**400, 1e7, -1e7]),
        ("target_modules", [1, [1], ["q_proj", None], {"q_proj": 1}]),
        ("exclude_modules", [1, [None]]),
        ("rank_pattern", [[], "q", {"q": 1.5}, {"q": 0}, {"q": -1}, {"q": "4"}, {"q": 10**400}]),
        ("alpha_pattern", [[], {"q": "4"}, {"q": True}, {"q": 1e300}]),
        ("layers_to_transform", ["1", True, [1.0], ["1"], {}]),
        ("layers_pattern", [1, [1]]),
        ("bias", ["some", None, True, ["all"]]),
        ("use_rslora", [1, "true", None]),
        ("use_dora", [1, "true"]),
        ("lora_bias", [0]),
        ("init_lora_weights", [1, ["gaussian"]]),
        ("lora_dropout", ["0.1"]),
        ("task_type", [5, ["CAUSAL_LM"]]),
        ("base_model_name_or_path", [5]),
        ("inference_mode", ["yes"]),
    ],
)
def test_a_wrong_type_names_the_field(field: str, values: list[Any]) -> None:
    for value in values:
        error = refusal({"peft_type": "LORA", field: value})
        assert error.field == field, value


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        *(
            ({"peft_type": method}, "num_virtual_tokens")
            for method, given in REQUIRED.items()
            if "num_virtual_tokens" in given
        ),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 10**4000}, "num_virtual_tokens"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": "5"}, "num_virtual_tokens"),
        (
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "token_dim": "8"},
            "token_dim",
        ),
        ({"peft_type": "IA3", "feedforward_modules": 5}, "feedforward_modules"),
        ({"peft_type": "LORA", "use_dora": True, "lora_bias": True}, "lora_bias"),
        (  # PEFT refuses these two as well
            {"peft_type": "LORA", "target_modules": ".*q", "layers_to_transform": [0]},
            "layers_to_transform",
        ),
        ({"peft_type": "LORA", "target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern"),
        ({"peft_type": "LORA", "modules_to_save": "lm_head"}, "modules_to_save"),
        ({"peft_type": "LORA", "trainable_token_indices": ["1"]}, "trainable_token_indices"),
        ({"peft_type": "LORA", "trainable_token_indices": {"x": 1}}, "trainable_token_indices"),
        ({"peft_type": "ADALORA", "init_r": 0}, "init_r"),
        ({"peft_type": "ADALORA", "rank_pattern": {"x": [True]}}, "rank_pattern"),
        ({"peft_type": "ADALORA", "rank_pattern": {"x": 4}}, "rank_pattern"),
        ({"peft_type": "LOHA", "alpha": "8"}, "alpha"),
        ({"peft_type": "LOHA", "r": 0}, "r"),
        ({"peft_type": "LOKR", "decompose_factor": 0}, "decompose_factor"),
        ({"peft_type": "LOKR", "init_weights": "other"}, "init_weights"),
        ({"peft_type": "VERA", "r": -1}, "r"),
        ({"peft_type": "VERA", "projection_prng_key": 2**64}, "projection_prng_key"),
        ({"peft_type": "OFT", "r": 4}, "oft_block_size"),  # beside the default of the other
        ({"peft_type": "OFT", "oft_block_size": 0}, "oft_block_size"),
        ({"peft_type": "OFT", "num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms"),
        ({"peft_type": "OFT", "eps": -0.1}, "eps"),
        ({"peft_type": "LN_TUNING", "target_modules": 5}, "target_modules"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1.5]}, "token_indices"),
        ({"peft_type": "TRAINABLE_TOKENS", "modules_to_save": ["x"]}, "modules_to_save"),
        (
            {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 5, "num_tasks": 0},
            "num_tasks",
        ),
        (
            {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 5, "num_ranks": "2"},
            "num_ranks",
        ),
    ],
)
def test_contradictions_and_missing_values_name_the_field(raw: dict, field: str) -> None:
    assert refusal(raw).field == field


def test_all_linear_is_no_list_of_names() -> None:
    assert LoraConfig(target_modules="all-linear").target_modules == "all-linear"
    assert LoraConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]  # type: ignore[arg-type]
    assert IA3Config(target_modules=("b", "a")).target_modules == ["a", "b"]  # type: ignore[arg-type]


# -- JSON --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"LORA"',
        "5",
        "NaN",
        "{'peft_type': 'LORA'}",
        b"\xff\xfe{",
        b"\x80",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}",
        '{"peft_type": "LORA", "\\ud800": 1}',
        '{"peft_type": "LORA", "base_model_name_or_path": "\\ud800"}',
        '{"peft_type": "LORA", "r": 4, "r": 8}',
        '{"peft_type": "LORA", "rank_pattern": {"q": 4, "q": 8}}',
        " " * MAX_CONFIG_BYTES + "{}",
        "\N{PILE OF POO}" * (MAX_CONFIG_BYTES // 4 + 1),
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_bad_json_is_refused(text: str | bytes) -> None:
    error = refusal(text)
    assert error.field == "config"
    assert len(str(error)) < 500
    str(error).encode()  # it goes into an answer


def test_a_duplicate_key_is_named() -> None:
    assert "'r' is given twice" in str(refusal('{"peft_type": "LORA", "r": 4, "r": 8}'))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["lora_alpha", "lora_dropout", "alpha_pattern"])
def test_numbers_are_finite(number: str, field: str) -> None:
    value = f'{{"q_proj": {number}}}' if field == "alpha_pattern" else number
    error = refusal(f'{{"peft_type": "LORA", "{field}": {value}}}')
    assert error.field == field


def test_bytes_are_read_as_text_is() -> None:
    text = '{"peft_type": "LORA", "target_modules": ["\u00e9"]}'
    expected = LoraConfig(target_modules=["\u00e9"])
    assert config_from_json(text) == expected
    assert config_from_json(text.encode()) == expected
    assert config_from_json(b"\xef\xbb\xbf" + text.encode()) == expected


@pytest.mark.parametrize("raw", [{}, {"peft_type": None}, {"peft_type": ["LORA"]}, {"r": 8}])
def test_a_missing_method_is_named(raw: dict[str, Any]) -> None:
    error = refusal(raw)
    assert error.field == "peft_type"
    assert all(method in str(error) for method in SERVED)
    assert "AdapterHub" not in str(error)


@pytest.mark.parametrize("method", ["lora", "Lora", "", "x" * 1000, "\u2603"])
def test_an_unknown_method_is_refused(method: str) -> None:
    error = refusal({"peft_type": method})
    assert type(error) is UnsupportedError
    assert error.field == "peft_type"


def test_an_adapterhub_config_is_recognised() -> None:
    raw = {
        "config": {"architecture": None, "use_gating": False, "non_linearity": "relu",
                   "reduction_factor": 16, "mh_adapter": False, "output_adapter": True},
        "hidden_size": 768, "model_class": "BertAdapterModel", "model_name": "bert-base-uncased",
        "model_type": "bert", "name": "sst-2", "version": "adapters.1.3.0",
    }  # fmt: skip
    assert config_from_dict(raw).peft_type == "BOTTLENECK"


def test_tiny_covers_every_method() -> None:
    """The matrix tests iterate over these configs: none may be forgotten there."""
    for model_type in ("llama", "gpt2"):
        configs = tiny.peft_configs(model_type).values()
        assert {config.peft_type.value for config in configs} == set(SERVED)
