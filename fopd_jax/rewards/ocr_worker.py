"""A process that reads text in images by RapidOCR: `python -m fopd_jax.rewards.ocr_worker`, started by `recogniser`.

It is a process of its own because native code that crashes or hangs must not take a run along. On its standard input
come images (height and width, then RGB bytes), on its standard output goes a line of JSON each: {"lines": […]}, or
{"error": …}; {} comes first, once all is loaded. It ends when its input does: none outlives a run that was killed.
"""

import json
import os
import queue
import struct
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8

from fopd_jax.exits import spell_error

Read = Callable[[UInt8[np.ndarray, "h w 3"]], list[str]]
"""An image, RGB, to the lines of text in it."""
HEADER = struct.Struct("!II")
"""Height and width."""
_LONGEST_SIDE = 960  # in pixels, where lines are looked for; larger images are shrunk for that, as PaddleOCR does


def serve(load: Callable[[], Read]) -> None:
    """Load what reads, then answer until the input ends, which ends the process even while an image is being read."""
    images: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(images,), daemon=True).start()
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # what libraries print is no reply
        try:
            read = load()
        except Exception as error:
            _send(replies, {"error": _told(error)})
            return
        _send(replies, {})
        while True:
            _send(replies, _answer(read, images.get()))


def _send(replies: IO[bytes], reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()


def _answer(read: Read, image: UInt8[np.ndarray, "h w 3"]) -> dict[str, Any]:
    try:
        return {"lines": read(image)}
    except Exception as error:
        return {"error": _told(error)}


def _told(error: Exception) -> str:
    """In one line: what began it, for RapidOCR wraps errors in errors that tell less."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return spell_error(error)


def _receive(images: queue.SimpleQueue) -> None:
    stream = sys.stdin.buffer
    while len(header := stream.read(HEADER.size)) == HEADER.size:
        height, width = HEADER.unpack(header)
        data = stream.read(height * width * 3)
        if len(data) < height * width * 3:
            break
        images.put(np.frombuffer(data, np.uint8).reshape(height, width, 3))
    os._exit(0)


def load_rapidocr() -> Read:
    """RapidOCR with the models of its package, on one thread: with a process a core, more threads only wait.

    Raises:
      RuntimeError: it tries to download something.
    """
    sys.addaudithook(_offline)
    os.nice(5)  # whoever feeds the accelerator goes first
    import cv2  # after the hook
    from rapidocr import RapidOCR

    cv2.setNumThreads(1)
    engine = RapidOCR(
        params={
            "Global.use_cls": False,  # no text upside down, as the published reward
            "Global.log_level": "critical",
            "Det.limit_type": "max",  # never enlarge
            "Det.limit_side_len": _LONGEST_SIDE,
            "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,  # less time and memory
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )

    def read(image: UInt8[np.ndarray, "h w 3"]) -> list[str]:
        found: Any = engine(np.ascontiguousarray(image[..., ::-1]), use_det=True)  # it takes arrays as BGR
        return [str(line) for line in found.txts or ()]

    blank = np.full((64, 64, 3), 255, np.uint8)
    engine(blank, use_det=False)  # both networks are loaded when they are first needed
    read(blank)
    return read


def _offline(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError("nothing is downloaded, since rapidocr holds its models: install it again")


if __name__ == "__main__":
    serve(load_rapidocr)
