"""What PEFT has and peftcore has not: by name, with what to do instead.

Knows names only.
"""

from __future__ import annotations

_FULL_RANK = "its update has full rank: merge it into a base model of its own"
_ROUTES = "it routes between adapters at run time: name a mixture in the request instead"
_LOW_RANK = "its low-rank updates are not implemented in this version: convert it to LoRA"

#: Methods: `peft_type` → why not, and what to do.
METHODS: dict[str, str] = {
    **dict.fromkeys(
        ["BOFT", "FOURIERFT", "WAVEFT", "C3A", "SHIRA", "RANDLORA", "HIRA", "SUPERTUNING", "OSF"],
        _FULL_RANK,
    ),
    **dict.fromkeys(["FROD", "GLORA", "PEANUT"], _FULL_RANK),
    **dict.fromkeys(["XLORA", "POLY"], _ROUTES),
    **dict.fromkeys(["VBLORA", "HRA", "MISS", "DELORA", "GRALORA"], _LOW_RANK),
    **dict.fromkeys(["ADAMSS", "DEFT", "PSOFT", "PVERA", "TINYLORA", "UNILORA"], _LOW_RANK),
    "ADAPTION_PROMPT": "it gates attention inside the layer: train prefix tuning instead",
    "BEFT": 'it trains biases alone: train LORA with bias="lora_only" instead',
    "CARTRIDGE": "its keys and values are a prefix's: train prefix tuning instead",
    "CPT": "its prompt is tied to a context's tokens: train prompt tuning from a text instead",
    "LILY": "it mixes its factors by what else is in the batch: train LORA instead",
    "ROAD": "it rotates outputs: train OFT, which rotates inputs, or merge it into a base model",
    "SHADOW": "it runs a network beside the model: train bottleneck adapters instead",
}

#: Task types: → what to do.
TASKS: dict[str, str] = {
    "SEQ_2_SEQ_LM": "models with an encoder and a decoder are not supported: train a CAUSAL_LM",
    "QUESTION_ANS": "train TOKEN_CLS, which marks the answer's tokens",
}

_SEQ_2_SEQ, _QUESTIONS = TASKS["SEQ_2_SEQ_LM"], TASKS["QUESTION_ANS"]
_CHANGES_BASE = "it changes the base's weights, which all adapters share: start LoRA without it"
_VARIANT = "this form of LoRA is not supported: train plain LORA"
_BY_PEFT = "let PEFT make such weights and save them: they are read here"

#: Classes and functions → what to do.
_NAMES: dict[str, str] = {
    "ArrowConfig": _ROUTES,
    "AutoPeftModelForQuestionAnswering": _QUESTIONS,
    "AutoPeftModelForSeq2SeqLM": _SEQ_2_SEQ,
    "BdLoraConfig": _VARIANT,
    "EvaConfig": _BY_PEFT,
    "KasaConfig": _VARIANT,
    "LoftQConfig": _CHANGES_BASE,
    "LoraGAConfig": _CHANGES_BASE,
    "MontecloraConfig": _VARIANT,
    "PeftMixedModel": "PeftModel takes adapters of several methods as it is",
    "PeftModelForQuestionAnswering": _QUESTIONS,
    "PeftModelForSeq2SeqLM": _SEQ_2_SEQ,
    "VeloraConfig": _VARIANT,
    "cast_mixed_precision_params": "adapters are float32, whatever the base is",
    "convert_to_lora": "methods are served as they are; PEFT itself converts its files",
    "get_layer_status": "PeftModel has active_adapters and peft_config",
    "get_model_status": "PeftModel has active_adapters and peft_config",
    "get_eva_state_dict": _BY_PEFT,
    "initialize_lora_eva_weights": _BY_PEFT,
    "inject_adapter_in_model": "get_peft_model(model, config).get_base_model() is such a model",
    "replace_lora_weights_loftq": _CHANGES_BASE,
    "save_as_lora": "methods are served as they are; PEFT itself converts its files",
}

#: PEFT's classes around a base, of the methods that are here.
_TUNERS = {
    *("AdaLoraModel", "IA3Model", "LNTuningModel", "LoHaModel", "LoKrModel", "LoraModel"),
    *("OFTModel", "TrainableTokensModel", "VeraModel"),
}


def refusal_of(name: str) -> str | None:
    """Why peftcore has not what PEFT exports by that name, and what to do; None: not known."""
    if name in _NAMES:
        return _NAMES[name]
    for suffix in ("Config", "Model"):
        method = name.removesuffix(suffix).upper()
        for peft_type, reason in METHODS.items():
            if name.endswith(suffix) and method == peft_type.replace("_", ""):
                return f"{peft_type} is not supported: {reason}"
    if name in _TUNERS:
        return "get_peft_model(model, config) makes a PeftModel, whatever the method"
    return None


__all__ = ["METHODS", "TASKS", "refusal_of"]
