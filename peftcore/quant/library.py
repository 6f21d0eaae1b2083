"""bitsandbytes, imported where it is first needed.

Its import takes a second and a tenth of a gigabyte, most of it torch's compiler. A server on a CPU
needs none of it.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

# On some CPUs its import, maybe by transformers, warns of an optional kernel that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# On a GPU its 8-bit operator warns at every call that it computes bfloat16 in float16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def bitsandbytes() -> Any:
    """The package; its operators are torch's from then on."""
    import bitsandbytes as package

    return package


def linear_layers() -> tuple[type, ...]:
    """bitsandbytes' 4-bit and 8-bit layers: none before somebody imports it to make one."""
    if "bitsandbytes" not in sys.modules:
        return ()
    nn = bitsandbytes().nn
    return nn.Linear4bit, nn.Linear8bitLt
