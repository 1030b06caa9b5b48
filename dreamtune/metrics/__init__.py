"""Scores of generated images: extractors (DINO, CLIP) and pure functions on their features."""

from dreamtune.words import without_identifier

from .extractors import Clip, Dino
from .scorers import References, Scorers, Scores

__all__ = ["Clip", "Dino", "References", "Scorers", "Scores", "without_identifier"]
