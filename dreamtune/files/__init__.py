"""Tensors and files: one format a file, the fingerprint of a base, and which file a path means."""
