"""Render the pictures that the emoji model learns: every named single-code-point glyph of Noto Color Emoji.

    python emoji/render.py NotoColorEmoji.ttf emoji.npz

The font is Debian's package `fonts-noto-color-emoji` (2.042); needs `fonttools` and Pillow. `emoji.npz` holds
`pictures`, uint8 [N, 64, 64, 3] on white, and `names`, the Unicode names in lower case, which are the prompts.
"""

import sys
import unicodedata
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

STRIKE = 109  # the one size that the font's bitmaps have
SIZE = 64
BOX = (12, 8, 144, 140)  # all glyphs, drawn at (10, 10), lie in this square
PLAIN = set("#*0123456789")  # keycap bases: drawn in white outlines, and no pictures by themselves


def glyphs(font: Path) -> list[tuple[str, str]]:
    """The characters with a picture, and their names."""
    characters = [chr(point) for point in sorted(TTFont(font, lazy=True).getBestCmap())]
    named = [(character, unicodedata.name(character, "").lower()) for character in characters]
    return [(character, name) for character, name in named if name and character not in PLAIN]


def picture(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """64 x 64 RGB on white; None for a glyph without a mark, such as the space."""
    canvas = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
    if canvas.getchannel("A").getbbox() is None:
        return None
    white = Image.new("RGBA", canvas.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, canvas).convert("RGB").crop(BOX).resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main(font: Path, output: Path) -> None:
    face = ImageFont.truetype(str(font), STRIKE, layout_engine=ImageFont.Layout.BASIC)
    drawn = [(picture(face, character), name) for character, name in glyphs(font)]
    kept = [(np.asarray(image), name) for image, name in drawn if image is not None]
    np.savez_compressed(output, pictures=np.stack([image for image, _ in kept]), names=np.array([n for _, n in kept]))
    print(f"{len(kept)} pictures in {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
