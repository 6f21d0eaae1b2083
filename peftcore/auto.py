"""`AutoPeftModelFor…`: base and adapter by the adapter's name alone, as in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from peftcore.checkpoint import peft_format
from peftcore.config import AdapterConfig
from peftcore.errors import ConfigError
from peftcore.model import DOWNLOAD, LOADING, PeftModel

#: A tokenizer in an adapter's folder may know more tokens than its base.
_TOKENIZER_CONFIG = "tokenizer_config.json"

_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": AutoModel,
}


class AutoPeftModel:
    """The model that an adapter's config names, with the adapter, of the class of its task."""

    #: The only task whose adapters are loaded; None: whatever the config says.
    task: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base by transformers, then the adapter by `PeftModel.from_pretrained`.

        The base's embeddings grow where a tokenizer in the adapter's folder has more tokens.

        Args:
            kwargs: of the base (`dtype`, `device_map`, `quantization_config`, `num_labels`, …), and
                of both downloads (`token`, `cache_dir`, `local_files_only`); `revision` is the
                adapter's, the base's is in the config.

        Raises:
            ConfigError: no base is named, or the task is another or none.
            Otherwise as `PeftModel.from_pretrained`, and what transformers raises for the base.
        """
        loading = {name: kwargs.pop(name) for name in LOADING - DOWNLOAD if name in kwargs}
        revision = kwargs.pop("revision", None)
        download = {name: kwargs[name] for name in DOWNLOAD if name in kwargs}
        root = peft_format.locate(pretrained_model_name_or_path, revision=revision, **download)
        folder = root / subfolder if subfolder else root
        config = config or peft_format.read_config(folder)
        task = config.task_type or cls.task
        if task not in _CLASSES or task != (cls.task or task):
            wanted = cls.task or f"one of {', '.join(_CLASSES)}"
            raise ConfigError("task_type", f"{config.task_type!r}: {cls.__name__} loads {wanted}")
        if config.base_model_name_or_path is None:
            raise ConfigError(
                "base_model_name_or_path",
                "names no base: load one and call PeftModel.from_pretrained(base, …)",
            )
        base = _CLASSES[task].from_pretrained(
            config.base_model_name_or_path, revision=config.revision or "main", **kwargs
        )
        if (folder / _TOKENIZER_CONFIG).is_file():
            num_tokens = len(AutoTokenizer.from_pretrained(folder))
            if num_tokens > base.get_input_embeddings().weight.shape[0]:
                base.resize_token_embeddings(num_tokens)
        return PeftModel.from_pretrained(
            base, folder, adapter_name, is_trainable, config, **loading
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """A language model and an adapter of it."""

    task = "CAUSAL_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """A sequence classifier and an adapter of it."""

    task = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """A token classifier and an adapter of it."""

    task = "TOKEN_CLS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An encoder and an adapter of it."""

    task = "FEATURE_EXTRACTION"
