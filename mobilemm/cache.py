"""Where mobilemm keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$MOBILEMM_CACHE`, else `$XDG_CACHE_HOME/mobilemm`, else `~/.cache/mobilemm`."""
    if own := os.environ.get("MOBILEMM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mobilemm")
