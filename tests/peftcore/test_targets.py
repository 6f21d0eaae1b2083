"""Which modules, with what rank and factor: PEFT's own functions decide what is right."""

from __future__ import annotations

import copy
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import (
    TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
)
from peft.utils.other import get_pattern_key
from torch import nn

from peftcore import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    VeraConfig,
    config_from_json,
)
from peftcore.base import BaseModel, BaseModule
from peftcore.config import MAX_PATTERN_LEN, PatternMatcher
from peftcore.errors import ConfigError
from peftcore.methods import targets
from peftcore.methods.targets import lookup_pattern, resolve_targets
from tests import tiny
from tests.peftcore.worlds import World, quiet


def base_of(*paths: str) -> BaseModel:
    """A base that has linear modules at `paths`."""
    modules = {path: BaseModule(path, "linear", 8, 8, nn.Identity()) for path in paths}
    return BaseModel("llama", 8, ((1, 8, 8),), modules)


# -- whole adapters on whole models ------------------------------------------------------------

LLAMA: dict[str, dict[str, Any]] = {
    "one name": {"target_modules": ["q_proj"]},
    "no part of a name": {"target_modules": ["proj", "k_proj"]},
    "nested name": {"target_modules": ["self_attn.o_proj", "mlp.up_proj"]},
    "whole path": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "output": {"target_modules": ["v_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "alpha_pattern": {"q_proj": 3}},
    "embedding of its own rank": {
        "target_modules": ["embed_tokens", "q_proj"],
        "rank_pattern": {"embed_tokens": 3},
    },
    "embedding alone": {"target_modules": r".*embed_tokens"},
    "not what is saved": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "not in what is saved": {
        "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": ["layers.1.mlp", "2.self_attn.q_proj"],
    },
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.[02]\..*(q|down)_proj"},
    "regex matches the whole path": {"target_modules": r".*self_attn\.q_proj"},
    "exclude names": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    "exclude nested": {"target_modules": ["q_proj"], "exclude_modules": ["1.self_attn.q_proj"]},
    "exclude regex": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "no layers is all": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers spare a whole path": {
        "target_modules": ["lm_head", "q_proj"],
        "layers_to_transform": [1],
    },
    "layers by name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": "layers",
    },
    "layers by path": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": ["h", "model.layers"],
    },
    "layers by no name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": "",
    },
    "layers by regex": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "l[a-z]+s",
    },
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 3, r"layers\.2\..*": 5},
        "alpha_pattern": {r"^model\.layers\.0.*v_proj": 11, "down_proj": 2.5},
    },
    "first pattern wins": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"1.self_attn.q_proj": 2, "q_proj": 4},
        "alpha_pattern": {".*": 3, "q_proj": 7},
    },
    "no part of a name in patterns": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"proj": 3, "q_pro": 5, "self_attn": 6},
    },
    "rslora": {
        "target_modules": ["q_proj", "k_proj"],
        "use_rslora": True,
        "rank_pattern": {"k_proj": 9},
        "alpha_pattern": {"k_proj": 5},
    },
    "default": {},
}  # fmt: skip

GPT2: dict[str, dict[str, Any]] = {
    "one name": {"target_modules": ["c_attn"]},
    "shared name": {"target_modules": ["c_proj"], "rank_pattern": {"mlp.c_proj": 3}},
    "nested name": {"target_modules": ["mlp.c_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r"transformer\.h\.\d\.(attn|mlp)\.c_proj"},
    "embeddings": {"target_modules": ["wte", "wpe", "c_fc"], "alpha_pattern": {"wpe": 11}},
    "output": {"target_modules": ["lm_head", "c_fc"]},
    "layers": {"target_modules": ["c_fc"], "layers_to_transform": [0, 1], "layers_pattern": "h"},
    "default": {},
}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(make, options, id=f"{make.__name__}-{name}")
        for make, cases in [(tiny.llama, LLAMA), (tiny.gpt2, GPT2)]
        for name, options in cases.items()
    ],
)
def test_lora_is_attached_as_peft_attaches_it(make: Any, options: dict, tmp_path: Path) -> None:
    """Modules, rank and factor of each, from the config before and after peft completes it."""
    model = make()
    base = BaseModel.from_model(model)
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    config.save_pretrained(tmp_path / "given")  # it sorts the patterns, whose order counts
    with quiet():
        config = peft.PeftConfig.from_pretrained(tmp_path / "given")
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.peft_config["default"].save_pretrained(tmp_path / "completed")
    expected = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in wrapped.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert expected
    for folder in ("given", "completed"):
        parsed = config_from_json((tmp_path / folder / tiny.CONFIG_NAME).read_text())
        assert isinstance(parsed, LoraConfig)
        found = {t.module.path: (t.rank, t.scale) for t in parsed.targets(base)}
        assert found == expected, folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": []},
        # PEFT matches a listed feed-forward module by its bare ending.
        {"target_modules": ["k_proj", "down_proj", "n_proj"], "feedforward_modules": ["n_proj"]},
        {"target_modules": r".*(k|up)_proj", "feedforward_modules": r".*mlp\.up_proj"},
        {"target_modules": ["k_proj"], "exclude_modules": r".*\.0\..*", "feedforward_modules": []},
    ],
)
def test_ia3_is_attached_as_peft_attaches_it(
    llama_world: World, options: dict, tmp_path: Path
) -> None:
    config = peft.IA3Config(task_type="CAUSAL_LM", **options)
    config.save_pretrained(tmp_path)
    with quiet():
        wrapped = peft.get_peft_model(copy.deepcopy(llama_world.model), config)
    expected = {
        name.removeprefix("base_model.model."): layer.is_feedforward
        for name, layer in wrapped.named_modules()
        if isinstance(layer, peft.tuners.ia3.IA3Layer)
    }
    assert expected
    parsed = config_from_json((tmp_path / tiny.CONFIG_NAME).read_text())
    assert isinstance(parsed, IA3Config)
    assert {m.path: ff for m, ff in parsed.targets(llama_world.base)} == expected


def test_defaults_are_pefts() -> None:
    for ours, theirs in [
        (targets.LORA_TARGETS, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING),
        (targets.ADALORA_TARGETS, TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING),
        (targets.VERA_TARGETS, TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING),
    ]:
        for model_type, names in ours.items():
            assert set(names) == set(theirs[model_type]), model_type
    for model_type, (names, feedforward) in targets.IA3_TARGETS.items():
        assert set(names) == set(TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[model_type])
        assert set(feedforward) == set(
            TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[model_type]
        )


# -- any paths and names -----------------------------------------------------------------------

SEGMENTS = st.sampled_from(["model", "layers", "h", "0", "1", "12", "proj", "q_proj", "experts"])
PATHS = st.lists(SEGMENTS, min_size=1, max_size=7).map(".".join)
NAMES = st.lists(SEGMENTS, min_size=1, max_size=3).map(".".join)
REGEXES = st.sampled_from(
    [r".*q_proj", r"model\..*", r".*\.\d+\..*", r"(model|h)(\.\w+)*", ".*", "proj", r".*\.1\.[^.]*"]
)


@settings(max_examples=300, deadline=None)
@given(
    paths=st.lists(PATHS, min_size=1, max_size=12, unique=True),
    target=st.lists(NAMES, min_size=1, max_size=3) | REGEXES,
    exclude=st.none() | st.lists(NAMES, max_size=2) | REGEXES,
    layers=st.none() | st.integers(0, 2) | st.lists(st.sampled_from([0, 1, 12]), max_size=2),
    layers_pattern=st.none() | st.sampled_from(["layers", "h", "model.layers", "", "l.*s"]),
)
def test_any_targets_are_pefts(
    paths: list[str], target: Any, exclude: Any, layers: Any, layers_pattern: Any
) -> None:
    if isinstance(target, str) or layers is None:
        layers = layers_pattern = None
    config = peft.LoraConfig(
        target_modules=target, exclude_modules=exclude, layers_to_transform=layers,
        layers_pattern=layers_pattern,
    )  # fmt: skip
    expected = [path for path in paths if check_target_module_exists(config, path)]
    try:
        found = resolve_targets(
            base_of(*paths), PatternMatcher(), target_modules=target, exclude_modules=exclude,
            layers_to_transform=layers, layers_pattern=layers_pattern,
        )  # fmt: skip
    except ConfigError:
        found = []
    assert [module.path for module in found] == expected


@settings(max_examples=200, deadline=None)
@given(path=PATHS, keys=st.lists(NAMES | REGEXES, max_size=4, unique=True))
def test_any_pattern_lookup_is_pefts(path: str, keys: list[str]) -> None:
    patterns = {key: i for i, key in enumerate(keys)}
    expected = patterns.get(get_pattern_key(keys, path), -1)
    assert lookup_pattern(path, patterns, -1, "rank_pattern", PatternMatcher()) == expected


# -- what is refused ---------------------------------------------------------------------------


#: Configs of the methods that act on linear modules, and some on embeddings, but on nothing else.
TARGETED: dict[str, Any] = {
    "LORA": LoraConfig,
    "ADALORA": AdaLoraConfig,
    "LOHA": LoHaConfig,
    "LOKR": LoKrConfig,
    "VERA": VeraConfig,
    "OFT": OFTConfig,
    "IA3": lambda **options: IA3Config(feedforward_modules=[], **options),
    "TRAINABLE_TOKENS": lambda **options: TrainableTokensConfig(token_indices=[1], **options),
}


@pytest.mark.parametrize("method", TARGETED)
def test_a_target_must_be_a_layer_that_the_method_acts_on(
    method: str, llama_world: World, gpt2_world: World
) -> None:
    takes_embeddings = method in ("LORA", "TRAINABLE_TOKENS")
    for world, name in [
        (llama_world, "input_layernorm"),
        (llama_world, "model.norm"),
        (llama_world, "rotary_emb"),
        (llama_world, "self_attn"),
        (gpt2_world, "ln_1"),
        (gpt2_world, "act"),
        (llama_world, "embed_tokens"),
        (gpt2_world, "wte"),
        (gpt2_world, "wpe"),
    ]:
        config = TARGETED[method](target_modules=[name])
        if takes_embeddings and name in ("embed_tokens", "wte", "wpe"):
            parts = config.build(world.base)
            assert parts.modules[0].module.path.endswith(name)
            continue
        with pytest.raises(ConfigError, match=rf"{name}.*not a linear layer") as caught:
            config.build(world.base)
        assert caught.value.field == "target_modules"


def test_norms_are_tuned_whole_and_containers_are_not(llama_world: World) -> None:
    for name in ("input_layernorm", "embed_tokens", "q_proj"):
        parts = LNTuningConfig(target_modules=[name]).build(llama_world.base)
        assert all(part.module.path.endswith(name) for part in parts.modules)
    for name, message in [("self_attn", "holds other modules"), ("act_fn", "no parameters")]:
        with pytest.raises(ConfigError, match=rf"{name}.*{message}") as caught:
            LNTuningConfig(target_modules=[name]).build(llama_world.base)
        assert caught.value.field == "target_modules"


def test_a_target_that_matches_nothing_names_what_there_is(llama_world: World) -> None:
    for config in [
        LoraConfig(target_modules=["c_attn"]),
        LoraConfig(target_modules=r".*c_attn"),
        LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]),
        LoraConfig(target_modules=["q_proj"], layers_to_transform=[3]),
        IA3Config(target_modules=["c_attn"], feedforward_modules=[]),
    ]:
        with pytest.raises(ConfigError, match=r"matches no module .*lm_head.*q_proj") as caught:
            config.targets(llama_world.base)  # type: ignore[attr-defined]
        assert caught.value.field == "target_modules"


def test_no_targets_and_no_default_is_refused() -> None:
    base = BaseModel("unheard_of", 8, ((1, 8, 8),), base_of("a.q_proj").modules)
    for config in (LoraConfig(), IA3Config()):
        with pytest.raises(ConfigError, match=r"no default for model type 'unheard_of'") as caught:
            config.targets(base)
        assert caught.value.field == "target_modules"


#: Where a pattern is read from, and how to put one there.
PATTERN_FIELDS: dict[str, Any] = {
    "target_modules": lambda p: LoraConfig(target_modules=p),
    "exclude_modules": lambda p: LoraConfig(target_modules=["q_proj"], exclude_modules=p),
    "layers_pattern": lambda p: LoraConfig(
        target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=p
    ),
    "rank_pattern": lambda p: LoraConfig(target_modules=["q_proj"], rank_pattern={p: 4}),
    "alpha_pattern": lambda p: LoraConfig(target_modules=["q_proj"], alpha_pattern={p: 4.0}),
    "feedforward_modules": lambda p: IA3Config(target_modules=["q_proj"], feedforward_modules=p),
}


@pytest.mark.parametrize("field", PATTERN_FIELDS)
@pytest.mark.parametrize(
    "pattern",
    [
        "(q_proj",
        "*",
        "a{99999999999}",
        "(?P<x>a)(?P<x>b)",
        "[z-a]",
        "\\",
        "(" * 4000 + ")" * 4000,
        "a" * (MAX_PATTERN_LEN + 1),
        # Known to `regex` and not to `re`: a recursive pattern takes half a gigabyte to fail.
        "(?R)",
        r"(\w(?1)?)",
        r"\p{Foo}",
    ],
    ids=lambda p: p[:12],
)
def test_an_invalid_pattern_is_refused_by_field(
    field: str, pattern: str, llama_world: World
) -> None:
    with pytest.raises(ConfigError) as caught:
        PATTERN_FIELDS[field](pattern).targets(llama_world.base)
    assert caught.value.field == field


#: Back references: what `regex` does to tame the textbook's bombs does not help against these.
EXPONENTIAL = r"(?:(?P<a>.)|(?P<b>.).|(?P<c>.)..)+(?P=a)(?P=b)(?P=c)(?P=a)"


@pytest.mark.parametrize("field", PATTERN_FIELDS)
def test_a_pattern_that_blows_up_is_refused_in_bounded_time(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftcore.config.PATTERN_SECONDS", 0.1)
    base = base_of(*(f"model.layers.{i}.{'a' * 60}.q_proj" for i in range(20)))
    started = time.perf_counter()
    with pytest.raises(ConfigError, match="too long to match") as caught:
        PATTERN_FIELDS[field](EXPONENTIAL).targets(base)
    assert caught.value.field == field
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("field", PATTERN_FIELDS)
@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*a){25}", r"(\w+\.?)+!", r"(a|aa)+b", r"(.*)*x"])
def test_textbook_bombs_take_bounded_time(
    field: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftcore.config.PATTERN_SECONDS", 0.1)
    base = base_of(f"model.layers.0.{'a' * 200}!.q_proj")
    started = time.perf_counter()
    with suppress(ConfigError):  # it may match nothing, or be refused
        PATTERN_FIELDS[field](pattern).targets(base)
    assert time.perf_counter() - started < 5


def test_many_patterns_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is harmless; a config may hold a hundred thousand of them."""
    monkeypatch.setattr("peftcore.config.PATTERN_SECONDS", 0.2)
    base = base_of(*(f"model.layers.{i}.q_proj" for i in range(50)))
    text = json.dumps(
        {"peft_type": "LORA", "target_modules": ["q_proj"],
         "rank_pattern": {f"x{i}": 4 for i in range(60_000)}}
    )  # fmt: skip
    config = config_from_json(text)
    assert isinstance(config, LoraConfig)
    started = time.perf_counter()
    with pytest.raises(ConfigError, match="too long to match") as caught:
        config.targets(base)
    assert caught.value.field == "rank_pattern"
    assert time.perf_counter() - started < 5


def test_a_rank_for_every_module_of_a_large_model_is_in_time() -> None:
    """As EVA makes them: 80 layers of 7 modules, each named in rank_pattern."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    paths = [f"model.layers.{i}.block.{name}" for i in range(80) for name in names]
    config = LoraConfig(
        target_modules=paths, rank_pattern={path: 1 + i for i, path in enumerate(paths)}
    )
    assert [t.rank for t in config.targets(base_of(*paths))] == [*range(1, 561)]
