"""A judge of one's own whose server may be away: for as many batches as there are files in the folder $AWAY."""

import os
from pathlib import Path
from typing import Any

import numpy as np


def judge(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    if left := sorted(Path(os.environ["AWAY"]).glob("*")):
        left[0].unlink()
        raise ConnectionError("nobody answers")
    return images.mean((1, 2, 3)) / 255


def away_for(folder: Path, batches: int) -> None:
    """Let it be away for so many batches from now on."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for number in range(batches):
        (folder / str(number)).touch()
