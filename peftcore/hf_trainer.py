"""Makes transformers' `Trainer` treat our `PeftModel` as it treats PEFT's.

The Trainer asks in a few places whether a model is an adapter model, by the class of the `peft`
package: to read the base's signature, to save adapter files instead of the whole model, to resume
from them, and to allow a quantized base. Those questions are answered here for our class too; for
every other model they are answered as before.
"""

from __future__ import annotations

from typing import Any

from transformers import trainer, trainer_utils


def install(model_class: type) -> None:
    """Let the Trainer know `model_class`. Safe to call once; `peft` need not be installed."""
    before = trainer_utils._is_peft_model

    def _is_peft_model(model: Any) -> bool:
        return isinstance(model, model_class) or bool(before(model))

    trainer_utils._is_peft_model = _is_peft_model
    trainer._is_peft_model = _is_peft_model
    # Used as the second argument of isinstance, which takes nested tuples.
    known = getattr(trainer, "PeftModel", None)
    classes = model_class if known is None else (known, model_class)
    trainer.__dict__["PeftModel"] = classes
    trainer.is_peft_available = lambda: True
