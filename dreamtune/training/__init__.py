"""The loop, and what it touches."""
