"""Requests that are wrong, each in its own way, by name: bodies of /score, and whole requests."""

import base64
import io
import json
import os
import pickle
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.rewards.served.serving import good_body, images

Case = tuple[str, bytes]
SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Telling:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int = 8, height: int = 8, data: bytes | None = None, depth: int = 8, colour: int = 2, interlace: int = 0,
    before: bytes = b"",
) -> bytes:  # fmt: skip
    """A PNG of black pixels, or of whatever it is said to hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    content = zlib.compress(bytes(height * (1 + 3 * width)) if data is None else data, 9)
    return SIGNATURE + chunk(b"IHDR", header) + before + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def pillow(format: str, mode: str = "RGB", **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(images(1)[0]).convert(mode).save(buffer, format=format, **how)
    return buffer.getvalue()


def pictures() -> dict[str, bytes]:
    """Files that are not one plain RGB picture."""
    whole = png()
    noise = Image.fromarray(images(1)[0])
    animated = io.BytesIO()
    noise.save(animated, format="PNG", save_all=True, append_images=[noise.rotate(90), noise.rotate(180)])
    sixteen = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(sixteen, format="PNG")
    text = zlib.compress(bytes(10**7))
    return {
        "empty": b"",
        "text": b"not a picture",
        "jpeg": pillow("JPEG"),
        "gif": pillow("GIF"),
        "bmp": pillow("BMP"),
        "webp": pillow("WEBP"),
        "tiff": pillow("TIFF"),
        "animated": animated.getvalue(),
        "animated_forged": png(before=chunk(b"acTL", struct.pack(">II", 2, 0))),
        "grey_16": sixteen.getvalue(),
        "rgb_16": png(depth=16, data=bytes(8 * (1 + 6 * 8))),
        "palette": pillow("PNG", "P"),
        "grey": pillow("PNG", "L"),
        "alpha": pillow("PNG", "RGBA"),
        "one_bit": pillow("PNG", "1"),
        "interlaced": png(interlace=1),
        "bomb_of_size": png(50_000, 50_000, b"\0" * 1000),
        "bomb_of_width": png(2**31 - 1, 1, b"\0"),
        "bomb_of_height": png(1, 2**31 - 1, b"\0"),
        "bomb_of_data": png(data=bytes(10**7)),
        "bomb_behind": png(data=bytes(8 * 25) + bytes(10**6)),
        "bomb_of_text": png(before=chunk(b"zTXt", b"a\0\0" + text), data=b""),
        "no_rows": png(0, 8, b""),
        "no_columns": png(8, 0, b""),
        "too_few_rows": png(data=bytes(7 * 25)),
        "filter": png(data=bytes([9]) * (8 * 25)),
        "data_no_zlib": SIGNATURE + whole[8:33] + chunk(b"IDAT", b"abc") + chunk(b"IEND", b""),
        "no_data": SIGNATURE + whole[8:33] + chunk(b"IEND", b""),
        "no_end": whole[:-12],
        "signature_alone": whole[:8],
        "header_alone": whole[:33],
        "header_cut": whole[:20],
        "checksum": whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:],
        "behind_the_end": whole + b"GIF89a",
        "chunk_of_4_GB": whole[:33] + struct.pack(">I", 2**32 - 1) + b"IDAT" + bytes(100),
        "pickle": pickle.dumps({"image": 1}),
    }


def message(**changes: Any) -> bytes:
    """A good request but for some fields; `...` leaves one out."""
    fields = json.loads(good_body()) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


def bodies(told: Path) -> Iterator[Case]:
    """Bodies of /score; `told` would appear if something were unpickled."""
    good, image = good_body(), json.loads(good_body())["images"][0]
    for name, data in pictures().items():
        yield f"picture_{name}", message(images=[base64.b64encode(data).decode()])
    for name in ("reward", "images", "prompts", "metadata"):
        yield f"without_{name}", message(**{name: ...})
        for kind, value in {"null": None, "number": 3, "true": True, "object": {}, "nested": [[]]}.items():
            yield f"{name}_is_{kind}", message(**{name: value})
    for name in ("images", "prompts", "metadata"):
        yield f"{name}_is_text", message(**{name: "a cat"})
        yield f"no_{name}", message(**{name: []})
        for kind, value in {"null": None, "number": 3, "list": [], "false": False}.items():
            yield f"{name}_of_{kind}", message(**{name: [value]})
    yield "metadata_of_text", message(metadata=["a"])
    yield "prompts_of_object", message(prompts=[{}])
    yield "two_prompts", message(prompts=["a", "b"])
    yield "two_metadata", message(metadata=[{}, {}])
    yield "two_images", message(images=[image] * 2)
    yield "nothing", message(images=[], prompts=[], metadata=[])
    yield "too_many", message(images=[image] * 257, prompts=["a"] * 257, metadata=[{}] * 257)
    yield "unknown_field", message(pickle="gASVAAAA")
    yield "unknown_reward", message(reward="Toy")
    yield "reward_empty", message(reward="")
    yield "long_prompt", message(prompts=["a" * 20_001])
    yield "half_a_character", message(prompts=["\ud800"])
    yield "half_a_character_in_metadata", message(metadata=[{"a": ["\udfff"]}])
    yield "base64_signs", message(images=["!!!!"])
    yield "base64_cut", message(images=[image[:-3]])
    yield "base64_line_ends", message(images=[image[:8] + "\n" + image[8:]])
    yield "base64_url", message(images=["data:image/png;base64," + image])
    yield "base64_not_ascii", message(images=["é" * 8])
    for name, number in {"nan": "NaN", "inf": "Infinity", "minus_inf": "-Infinity", "large": "1e999"}.items():
        yield f"metadata_{name}", good.replace(b'"metadata": [{}]', f'"metadata": [{{"a": {number}}}]'.encode())
    yield "metadata_digits", good.replace(b'"metadata": [{}]', b'"metadata": [{"a": ' + b"9" * 5000 + b"}]")
    for depth in (40, 1000, 10_000, 100_000):
        nested = b'{"a":' * depth + b"1" + b"}" * depth
        yield f"objects_{depth}_deep", good.replace(b'"metadata": [{}]', b'"metadata": [' + nested + b"]")
        yield f"lists_{depth}_deep", b"[" * depth + b"]" * depth
    yield "lists_that_do_not_end", b"[" * 100_000
    yield "name_twice", good.replace(b'"reward": "toy"', b'"reward": "toy", "reward": "toy"')
    for name, body in {
        "empty": b"", "null": b"null", "number": b"3", "text": b'"toy"', "list": b"[]", "object": b"{}",
        "bytes": bytes(range(256)), "zeros": bytes(100), "bom": b"\xef\xbb\xbf" + good,
        "utf16": good.decode().encode("utf-16"), "latin1": message(prompts=["x"]).replace(b'"x"', b'"\xe9"'),
        "twice": good + good, "xml": b"<a/>", "form": b"reward=toy&images=", "quotes": good.replace(b'"', b"'"),
        "pickled": pickle.dumps(Telling(told)), "pickled_old": pickle.dumps(Telling(told), protocol=0),
        "zlib": zlib.compress(good), "control": message(prompts=["x"]).replace(b'"x"', b'"\x01"'),
    }.items():  # fmt: skip
        yield f"body_{name}", body
    yield "pickled_picture", message(images=[base64.b64encode(pickle.dumps(Telling(told))).decode()])
    yield "pickled_metadata", message(metadata=[base64.b64encode(pickle.dumps(Telling(told))).decode()])
    yield from fuzzed(good)


def fuzzed(good: bytes, count: int = 60) -> Iterator[Case]:
    """A good request cut off, or with bytes that are no JSON put somewhere into what is no text."""
    draw = random.Random(0)
    for i in range(count // 2):
        yield f"cut_{i}", good[: draw.randrange(1, len(good) - 1)]
        at = draw.choice([place for place, byte in enumerate(good) if byte in b"{[]}:,"])
        yield f"put_{i}", good[:at] + bytes(draw.choices(range(128, 256), k=4)) + good[at:]
