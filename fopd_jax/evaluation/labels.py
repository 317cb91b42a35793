"""Labels of pictures in any script: in a font that has all of a label's letters, or escaped; never boxes."""

import dataclasses
import functools
import unicodedata

from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 13
LINE = FONT_SIZE + 4
MOST_LINES = 12
"""Of one paragraph; what is longer ends in three dots."""
_OTHER_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansArabic-Regular.ttf",
    "Arial Unicode.ttf", "arial.ttf",
)  # fmt: skip
_NO_LETTER = "\U0010ffff"  # that no font has: drawn as its box
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclasses.dataclass(frozen=True)
class Label:
    """Lines and the font that has their letters."""

    lines: tuple[str, ...]
    font: Font

    @property
    def width(self) -> int:
        """In pixels."""
        return int(max(self.font.getlength(line) for line in self.lines))

    @property
    def height(self) -> int:
        """In pixels."""
        return len(self.lines) * LINE

    def draw(self, canvas: ImageDraw.ImageDraw, x: int, y: int) -> None:
        """In black, its first line's top left at a place."""
        for i, line in enumerate(self.lines):
            canvas.text((x, y + i * LINE), line, "black", self.font)


def make_label(text: str, width: int) -> Label:
    """A label of lines up to `width` pixels, broken at the text's own line breaks, between words, then within them."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n")]
    readable, font = _readable("\n".join(paragraphs))
    lines = [line for part in readable.split("\n") for line in _shorten(_wrap(part, width, font))]
    return Label(tuple(lines), font)


def _readable(text: str) -> tuple[str, Font]:
    """The text, and the first font that has all of its letters; without one, what the first font lacks is escaped."""
    text = unicodedata.normalize("NFC", text)
    first = _default_font()
    if all(_has(first, letter) for letter in text):
        return text, first
    for font in _other_fonts():
        if all(_has(font, letter) for letter in text):
            return text, font
    return "".join(letter if _has(first, letter) else _escape(letter) for letter in text), first


def _escape(letter: str) -> str:
    code = ord(letter)
    return f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"


@functools.cache
def _default_font() -> Font:
    return ImageFont.load_default(FONT_SIZE)


@functools.cache
def _other_fonts() -> tuple[Font, ...]:
    """Those of the machine's that are there."""
    found = []
    for name in _OTHER_FONTS:
        try:
            found.append(ImageFont.truetype(name, FONT_SIZE))
        except OSError:
            continue
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _has(font: Font, letter: str) -> bool:
    """Whether a font draws a letter as something else than what it draws where it has none."""
    if letter in " \n":
        return True
    return letter.isprintable() and _drawn(font, letter) != _drawn(font, _NO_LETTER)


def _drawn(font: Font, letter: str) -> tuple[float, tuple[int, int], bytes]:
    box = font.getbbox(letter)
    size = (max(1, int(box[2])), max(1, int(box[3])))
    image = Image.new("L", size)
    ImageDraw.Draw(image).text((0, 0), letter, 255, font)
    return font.getlength(letter), size, image.tobytes()


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Lines of whole words; a word that is longer than a line is broken."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        first, *rest = _pieces(word, width, font)
        lines = [*lines, first] if lines[-1] else [first]
        lines += rest
    return lines


def _pieces(word: str, width: int, font: Font) -> list[str]:
    """Parts that are no longer than a line, a letter at least."""
    parts = [""]
    for letter in word:
        if parts[-1] and font.getlength(parts[-1] + letter) > width:
            parts.append("")
        parts[-1] += letter
    return parts


def _shorten(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."]
