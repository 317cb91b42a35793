"""Pictures for a page: small, as data URIs, each kept under a short name once however often it is shown."""

import base64
import functools
import hashlib
import io
from pathlib import Path

from PIL import Image

from fopd_jax.reporting.reading import Problems

THUMBNAIL, WIDE = 192, 1400
"""Longest side in pixels: of an image of a gallery, of a picture that a run left."""
_EXACT = 64  # images up to that side stay as they are
_QUALITY = 80


class Album:
    """Data URIs by name, of at most so many bytes; `problems`: files that are no pictures, `full`: that did not fit."""

    def __init__(self, most: int) -> None:
        self.pictures: dict[str, str] = {}
        self.problems: Problems = []
        self._most, self._bytes, self.full = most, 0, 0

    @property
    def bytes(self) -> int:
        """Of all data URIs."""
        return self._bytes

    def add(self, path: Path, side: int = THUMBNAIL) -> str:
        """Its name on the page; empty where it cannot be read, or does not fit any more, which `full` counts."""
        try:
            found = path.stat()
            uri = _encoded(path, found.st_mtime_ns, found.st_size, side)
        except Exception as error:  # Pillow's are of many kinds, and a page has to be made without it
            self.problems.append(f"{path}: no picture ({' '.join(str(error).split())[:200]})")
            return ""
        name = hashlib.sha256(uri.encode()).hexdigest()[:12]
        if name not in self.pictures:
            if self._bytes + len(uri) > self._most:
                self.full += 1
                return ""
            self.pictures[name] = uri
            self._bytes += len(uri)
        return name


@functools.lru_cache(maxsize=20_000)
def _encoded(path: Path, changed: int, size: int, side: int) -> str:
    """`changed`, `size`: of the file, so that it is read again once it is another one."""
    del changed, size
    with Image.open(path) as image:
        image.draft("RGB", (side, side))
        small = max(image.size) <= _EXACT
        picture = image.convert("RGB")
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    made = io.BytesIO()
    picture.save(made, "WEBP", quality=_QUALITY, lossless=small, method=2)
    return "data:image/webp;base64," + base64.b64encode(made.getvalue()).decode()
