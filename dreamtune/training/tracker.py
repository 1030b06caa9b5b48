"""What a run tells a tracker while it goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


class Tracker:
    """TensorBoard through accelerate's tracker, or nothing."""

    def __init__(self, kind: str, run_dir: Path) -> None:
        self.inner: Any = None
        if kind == "tensorboard":
            try:
                from accelerate import PartialState
                from accelerate.tracking import TensorBoardTracker

                PartialState()
                logging.getLogger("tensorboard").setLevel(logging.ERROR)
                self.inner = TensorBoardTracker("tensorboard", str(run_dir / "logs"))
                if hasattr(self.inner, "start"):
                    self.inner.start()
            except ImportError as error:
                raise ValueError(
                    "`report_to` tensorboard needs it installed: pip install "
                    "'dreamtune[tensorboard]' "
                    f"({error})."
                ) from None

    def log(self, values: dict[str, Any], step: int, images: Sequence[Image.Image] = ()) -> None:
        if self.inner is None:
            return
        import numpy as np

        self.inner.log(
            {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"},
            step=step,
        )
        if images:
            self.inner.writer.add_images(
                "samples", np.stack([np.asarray(i) for i in images]), step, dataformats="NHWC"
            )

    def close(self) -> None:
        """May be called twice."""
        if self.inner is not None:
            self.inner.finish()
            self.inner = None
