"""Ships a trained generator: python scripts/ship_generator.py runs/generator/student/generator

In half precision, into mobilemm/models/default/generator, beside its card; score it there with
`mobilemm eval --task drawing --steps 1 --steps 4 --json mobilemm/models/default/generator/score.json`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from mobilemm.generation.generator import load_generator, save_generator
from mobilemm.models.checkpoints.default import shipped_files


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    shipped = shipped_files() / "generator"
    kept = {path.name: path.read_bytes() for path in shipped.glob("*.md")} if shipped.is_dir() else {}
    generator = load_generator(Path(sys.argv[1]))
    shutil.rmtree(shipped, ignore_errors=True)
    save_generator(generator, shipped, torch.float16)
    for name, content in kept.items():
        (shipped / name).write_bytes(content)
    weights = sum(path.stat().st_size for path in shipped.rglob("*.safetensors"))
    print(f"{shipped}: {weights / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
