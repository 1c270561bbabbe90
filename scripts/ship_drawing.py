"""Ships how the default model asks for pictures: python scripts/ship_drawing.py runs/drawing-projector/model

Signal tokens and output projector, in half precision, into mobilemm/models/default/drawing.safetensors; what
they are into config.json there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from mobilemm.models.checkpoints.default import CONFIG, DRAWING, shipped_files

PREFIXES = ("signal_tokens.", "output_projector.")
KEYS = ("image_token_id", "output_projector", "signal_token_ids")


def main() -> None:
    """Reads the command line; says what was written."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    trained, shipped = Path(sys.argv[1]), shipped_files()
    with safe_open(trained / "model.safetensors", "pt") as weights:
        names = [name for name in weights.keys() if name.startswith(PREFIXES)]  # noqa: SIM118
        kept = {name: weights.get_tensor(name).half() for name in names}
    save_file(kept, shipped / DRAWING)
    settings = json.loads((trained / CONFIG).read_text(encoding="utf-8"))
    config = json.loads((shipped / CONFIG).read_text(encoding="utf-8"))
    config |= {key: settings[key] for key in KEYS}
    (shipped / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{shipped / DRAWING}: {(shipped / DRAWING).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
