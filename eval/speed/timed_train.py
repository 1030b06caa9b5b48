"""`dreamtune ...` with a clock: seconds of what comes before the first step, as JSON. For `run.py`.

python eval/speed/timed_train.py PARTS.json train ...
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

began = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

parts = {"import torch": time.perf_counter() - began}


def clocked(owner: Any, name: str, label: str) -> None:
    """Times the first call of a function; the GPU is waited for."""
    original: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        parts.setdefault(label, time.perf_counter() - start)
        return result

    setattr(owner, name, call)


def main() -> int:
    from dreamtune.cli import main as command
    from dreamtune.evaluation import validation
    from dreamtune.training import run, train, wave

    start = time.perf_counter()
    import diffusers
    import transformers

    diffusers.StableDiffusionPipeline, transformers.CLIPTextModel  # noqa: B018  (loads them)
    parts["import diffusers and transformers"] = time.perf_counter() - start
    clocked(train, "base_of", "load the base")
    clocked(validation, "load_scorers", "load the scorers")
    clocked(run.Run, "fill_cache", "encode photos and prompts")
    clocked(wave.Wave, "pack", "inject, optimizer")
    clocked(wave.Wave, "score", "first scoring (counted there)")
    clocked(wave.Wave, "advance", "first step: kernels, warm-up, capture (counted with the steps)")
    clocked(run.Run, "finish", "last files and report")
    try:
        return command(sys.argv[2:])
    finally:
        Path(sys.argv[1]).write_text(json.dumps(parts))


if __name__ == "__main__":
    sys.exit(main())
