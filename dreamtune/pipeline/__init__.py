"""Adapters in a diffusers pipeline."""
