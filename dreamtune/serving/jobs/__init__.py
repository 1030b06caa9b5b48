"""Training jobs: photos and a prompt in, an adapter out; one process trains a wave of them."""
