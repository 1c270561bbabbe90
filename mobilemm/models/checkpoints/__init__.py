"""Checkpoints of mobilemm and of other projects: read as published, written back so that they read them."""

from mobilemm.models.checkpoints.parts import compose
from mobilemm.models.checkpoints.reading import Loaded, load
from mobilemm.models.checkpoints.writing import save

__all__ = ["Loaded", "compose", "load", "save"]
