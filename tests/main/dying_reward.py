"""A judge of one's own whose server may be away, by a file that says for how many more batches: $AWAY."""

import os
from pathlib import Path
from typing import Any

import numpy as np


def judge(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    path = Path(os.environ["AWAY"])
    left = int(path.read_text()) if path.exists() else 0
    if left:
        path.write_text(str(left - 1))
        raise ConnectionError("nobody answers")
    return images.mean((1, 2, 3)) / 255
