"""The methods. A new one is a file in this folder and its line below."""

from dreamtune.adapters import delora, ether, ether_plus, lora  # noqa: F401  (importing registers)
from dreamtune.adapters.base import METHODS, Adapter, find_method, register, resolve_options

__all__ = ["METHODS", "Adapter", "find_method", "register", "resolve_options"]
