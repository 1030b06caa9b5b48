"""Photos, and a subject's words."""
