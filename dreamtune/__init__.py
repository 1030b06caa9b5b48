"""dreamtune: photos of one subject in, an adapter and a LoRA file that stock diffusers loads out.

The public names are imported when they are first used: `import dreamtune` costs nothing beyond
Python.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dreamtune.version import __version__ as __version__

if TYPE_CHECKING:
    from dreamtune.adapters import METHODS as METHODS
    from dreamtune.adapters import Adapter as Adapter
    from dreamtune.adapters import register as register
    from dreamtune.config import Config as Config
    from dreamtune.evaluation.compare import compare as compare
    from dreamtune.evaluation.results import read_results as read_results
    from dreamtune.files.export import export as export
    from dreamtune.injection.inject import InjectedAdapter as InjectedAdapter
    from dreamtune.injection.inject import inject as inject
    from dreamtune.pipeline.load import load as load
    from dreamtune.pipeline.score import score as score
    from dreamtune.pipeline.speed import slow_down as slow_down
    from dreamtune.pipeline.speed import speed_up as speed_up
    from dreamtune.training.train import train as train
    from dreamtune.training.train import train_stacked as train_stacked


_PUBLIC = {
    "METHODS": "dreamtune.adapters",
    "Adapter": "dreamtune.adapters",
    "Config": "dreamtune.config",
    "InjectedAdapter": "dreamtune.injection.inject",
    "compare": "dreamtune.evaluation.compare",
    "export": "dreamtune.files.export",
    "inject": "dreamtune.injection.inject",
    "load": "dreamtune.pipeline.load",
    "read_results": "dreamtune.evaluation.results",
    "register": "dreamtune.adapters",
    "score": "dreamtune.pipeline.score",
    "slow_down": "dreamtune.pipeline.speed",
    "speed_up": "dreamtune.pipeline.speed",
    "train": "dreamtune.training.train",
    "train_stacked": "dreamtune.training.train",
}
__all__ = [
    "METHODS",
    "Adapter",
    "Config",
    "InjectedAdapter",
    "compare",
    "export",
    "inject",
    "load",
    "read_results",
    "register",
    "score",
    "slow_down",
    "speed_up",
    "train",
    "train_stacked",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module `dreamtune` has no attribute `{name}`")
    if name in ("inject", "InjectedAdapter"):
        importlib.import_module("dreamtune.files.native")  # gives `InjectedAdapter.save` its format
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
