"""Talking with a model on this computer."""
