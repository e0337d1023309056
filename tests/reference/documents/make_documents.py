"""Makes page.png, and layout.json: what RapidLayout finds on it.

It is run by hand, in an environment with rapid-layout 1.2.1, onnxruntime and Pillow. The page is grey, so that the
order of its colours, which RapidLayout swaps, is nothing to either.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rapid_layout import RapidLayout

FOLDER = Path(__file__).parent
LINE = "All rivers run into the sea, yet the sea is not full, and so on."


def page() -> Image.Image:
    """A heading, two paragraphs, a picture with its caption, and a table, on 640 x 640 pixels."""
    image = Image.new("L", (640, 640), 255)
    draw = ImageDraw.Draw(image)
    draw.text((60, 40), "A Report on Rivers", fill=0, font=ImageFont.load_default(size=28))
    for i in range(12):
        draw.text((60, 90 + 17 * i + 14 * (i > 5)), LINE, fill=0, font=ImageFont.load_default(size=14))
    draw.rectangle((60, 325, 330, 455), outline=0, width=2)
    draw.ellipse((100, 340, 280, 440), fill=120)
    draw.text((60, 462), "Figure 1. A grey lake in a frame.", fill=0, font=ImageFont.load_default(size=12))
    for row in range(5):
        for column in range(4):
            corner = (60 + 120 * column, 500 + 24 * row)
            draw.rectangle((*corner, corner[0] + 120, corner[1] + 24), outline=0)
            words = f"{row}.{column} km" if row else f"River {column}"
            draw.text((corner[0] + 8, corner[1] + 5), words, fill=0, font=ImageFont.load_default(size=12))
    return image


def main() -> None:
    """Writes both files."""
    page().save(FOLDER / "page.png", optimize=True)
    pixels = np.asarray(Image.open(FOLDER / "page.png").convert("RGB"))
    found = RapidLayout(conf_thresh=0.3, iou_thresh=0.5)(pixels)
    finds = [
        {"class": name, "score": round(score, 4), "box": [round(side, 2) for side in box]}
        for name, score, box in zip(found.class_names, found.scores, found.boxes, strict=True)
    ]
    (FOLDER / "layout.json").write_text(json.dumps(finds, indent=1) + "\n")


if __name__ == "__main__":
    main()
