"""A slow judge that never says the same twice of an image, and writes down which images it has judged."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np


def counted(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    """Of images whose digests are noted in $COUNTED as soon as they are judged."""
    path = Path(os.environ["COUNTED"])
    before = path.read_text().split() if path.exists() else []
    names = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    seeds = [(int(name[:8], 16), before.count(name)) for name in names]
    time.sleep(0.3)
    with path.open("a") as file:
        file.write("".join(f"{name}\n" for name in names))
    return np.array([np.random.default_rng(seed).random() for seed in seeds])
