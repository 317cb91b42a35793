"""A reward of one's own, which programs import by its path."""

from typing import Any

import numpy as np


def darkness(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    return 1 - images.mean((1, 2, 3)) / 255
