"""Scores of generated images: extractors (DINO, CLIP) and pure functions on their features."""

from dreamtune.data.words import without_identifier
from dreamtune.metrics.extractors import Clip, Dino
from dreamtune.metrics.scorers import References, Scorers, Scores

__all__ = ["Clip", "Dino", "References", "Scorers", "Scores", "without_identifier"]
