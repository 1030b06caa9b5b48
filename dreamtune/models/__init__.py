"""The frozen base: load it, encode with it, sample from it. One family a file."""
