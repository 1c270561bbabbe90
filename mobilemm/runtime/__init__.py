"""Talking with a bundle, or with a model on PyTorch, on this computer."""
