"""Draws what the default model answers about the pictures of docs/drawings, which it was not trained on.

    python scripts/draw_answers.py docs/chat.png

They were drawn for this purpose; all are shown, the wrong answers too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import mobilemm
from mobilemm.runtime.pytorch import ChatSession, quiet
from mobilemm.runtime.sampling import Sampling

DRAWINGS = Path(__file__).parents[1] / "docs" / "drawings"
QUESTION = "What is in this picture?"
COLUMNS, CELL_WIDTH, CELL_HEIGHT, MARGIN = 6, 170, 200, 24


def main(target: str) -> None:
    quiet()
    paths = sorted(DRAWINGS.glob("*.png"))
    session = ChatSession(*mobilemm.load(), Sampling(max_new_tokens=24))
    sheet = Image.new(
        "RGB", (COLUMNS * CELL_WIDTH + 2 * MARGIN, 2 * CELL_HEIGHT + 3 * MARGIN + 16), "#f6f8fa"
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 16), f"> {QUESTION}", "#57606a", ImageFont.load_default(20))
    for index, path in enumerate(paths):
        session.reset()
        session.look_at(path)
        answer = session.reply(QUESTION).strip()
        left = MARGIN + index % COLUMNS * CELL_WIDTH
        top = 2 * MARGIN + 8 + index // COLUMNS * CELL_HEIGHT
        draw.rounded_rectangle(
            (left, top, left + CELL_WIDTH - 16, top + CELL_HEIGHT - 16), 10, "white", "#d0d7de"
        )
        with Image.open(path) as picture:
            small = picture.convert("RGB").resize((120, 120))
        sheet.paste(small, (left + (CELL_WIDTH - 16 - small.width) // 2, top + 12))
        draw.text(
            (left + (CELL_WIDTH - 16) // 2, top + CELL_HEIGHT - 38),
            answer,
            "#1f2328",
            ImageFont.load_default(18),
            anchor="mm",
        )
        print(f"{path.stem}: {answer}")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(64).save(target, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["docs/chat.png"])
