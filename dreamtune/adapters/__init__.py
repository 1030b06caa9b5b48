"""The methods. A new one is a file in this folder and its line below.

A package of its own gives one through the entry-point group `dreamtune.methods`.
"""

from dreamtune.adapters import (  # noqa: F401  (importing registers)
    deft,
    delora,
    dora,
    ether,
    ether_plus,
    hra,
    lora,
    norm_bounded,
    oft,
)
from dreamtune.adapters.base import (
    METHODS,
    Adapter,
    WeightChange,
    find_method,
    register,
    registered_signatures,
    resolve_options,
)

__all__ = [
    "METHODS",
    "Adapter",
    "WeightChange",
    "find_method",
    "register",
    "registered_signatures",
    "resolve_options",
]
