"""Scores of generated images. A new metric is a file in this folder and its line below.

A file holds an extractor where it needs one of its own, and registers its metric; the order of the
lines is that of records, pages and tables.
"""

# isort: off
from dreamtune.metrics import dino  # noqa: F401  (importing registers)
from dreamtune.metrics import clip  # noqa: F401
from dreamtune.metrics import siglip  # noqa: F401
from dreamtune.metrics import lpips  # noqa: F401
from dreamtune.metrics import dreamsim  # noqa: F401
# isort: on

from dreamtune.data.words import without_identifier
from dreamtune.metrics.clip import Clip
from dreamtune.metrics.dino import Dino
from dreamtune.metrics.extractor import Extractor, TextExtractor
from dreamtune.metrics.scorers import References, Scorers, Scores
from dreamtune.metrics.table import METRICS, Comparison, Features, Metric, find_metrics, register

__all__ = [
    "METRICS",
    "Clip",
    "Comparison",
    "Dino",
    "Extractor",
    "Features",
    "Metric",
    "References",
    "Scorers",
    "Scores",
    "TextExtractor",
    "find_metrics",
    "register",
    "without_identifier",
]
