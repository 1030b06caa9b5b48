"""Scores while training, the choice of the best, and the page."""
