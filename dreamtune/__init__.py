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
    from dreamtune.injection.region import Region as Region
    from dreamtune.pipeline.adapters import get_adapters as get_adapters
    from dreamtune.pipeline.adapters import merge as merge
    from dreamtune.pipeline.adapters import route as route
    from dreamtune.pipeline.adapters import set_adapters as set_adapters
    from dreamtune.pipeline.adapters import unload as unload
    from dreamtune.pipeline.adapters import unmerge as unmerge
    from dreamtune.pipeline.load import load as load
    from dreamtune.pipeline.many import load_many as load_many
    from dreamtune.pipeline.score import score as score
    from dreamtune.pipeline.speed import slow_down as slow_down
    from dreamtune.pipeline.speed import speed_up as speed_up
    from dreamtune.training.train import train as train
    from dreamtune.training.train import train_stacked as train_stacked


_PUBLIC = {
    "Adapter": "dreamtune.adapters",
    "Config": "dreamtune.config",
    "InjectedAdapter": "dreamtune.injection.inject",
    "METHODS": "dreamtune.adapters",
    "Region": "dreamtune.injection.region",
    "compare": "dreamtune.evaluation.compare",
    "export": "dreamtune.files.export",
    "get_adapters": "dreamtune.pipeline.adapters",
    "inject": "dreamtune.injection.inject",
    "load": "dreamtune.pipeline.load",
    "load_many": "dreamtune.pipeline.many",
    "merge": "dreamtune.pipeline.adapters",
    "read_results": "dreamtune.evaluation.results",
    "register": "dreamtune.adapters",
    "route": "dreamtune.pipeline.adapters",
    "score": "dreamtune.pipeline.score",
    "set_adapters": "dreamtune.pipeline.adapters",
    "slow_down": "dreamtune.pipeline.speed",
    "speed_up": "dreamtune.pipeline.speed",
    "train": "dreamtune.training.train",
    "train_stacked": "dreamtune.training.train",
    "unload": "dreamtune.pipeline.adapters",
    "unmerge": "dreamtune.pipeline.adapters",
}
__all__ = [
    "Adapter",
    "Config",
    "InjectedAdapter",
    "METHODS",
    "Region",
    "compare",
    "export",
    "get_adapters",
    "inject",
    "load",
    "load_many",
    "merge",
    "read_results",
    "register",
    "route",
    "score",
    "set_adapters",
    "slow_down",
    "speed_up",
    "train",
    "train_stacked",
    "unload",
    "unmerge",
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
