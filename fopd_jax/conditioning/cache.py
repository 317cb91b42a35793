"""Encoded prompts on disk, by content: each distinct prompt is encoded once, whatever run asks for it.

One safetensors file per prompt, in bfloat16, named by the hash of the prompt and of everything that its encoding
depends on. Files appear by renaming, so several runs may share a folder.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fopd_jax.conditioning.encoder import Conditioning

Encode = Callable[[Sequence[str]], Conditioning]
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class ConditioningCache:
    """The encodings of one set of text encoders, named by `fingerprint`, under `folder`."""

    def __init__(self, folder: Path, fingerprint: str, shapes: Conditioning) -> None:
        """`shapes`: of one prompt's encoding, `[S, context_dim]` and `[P]`."""
        self._folder, self._fingerprint, self._shapes = folder, fingerprint, shapes

    def path(self, prompt: str) -> Path:
        name = hashlib.sha256(f"{self._fingerprint}\n{prompt}".encode()).hexdigest()
        return self._folder / name[:2] / f"{name}.safetensors"

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The distinct prompts that are not there yet, in their order."""
        return [prompt for prompt in dict.fromkeys(prompts) if not self.path(prompt).is_file()]

    def check_space(self, count: int) -> None:
        """Refuse to begin what cannot be finished.

        Raises:
          ValueError: the disk has no room for `count` more prompts; names folder, need and what is free.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        needed = count * sum(int(np.prod(shape)) for shape in jax.tree.leaves(self._shapes, is_leaf=_is_shape)) * 2
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise ValueError(
                f"conditioning cache {self._folder}: {count} prompts need {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free"
            )

    def write(self, prompts: Sequence[str], encoded: Conditioning) -> None:
        """Store the encodings of prompts, row by row."""
        for row, prompt in enumerate(prompts):
            path = self.path(prompt)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
            tensors = {"context": encoded.context[row], "pooled": encoded.pooled[row]}
            save_file(
                {name: np.ascontiguousarray(value.astype(_BFLOAT16)) for name, value in tensors.items()}, temporary
            )
            temporary.chmod(0o644)  # the library makes it private
            os.replace(temporary, path)

    def read(self, prompts: Sequence[str]) -> Conditioning:
        """The encodings of prompts, `[B, …]` in bfloat16.

        Raises:
          ValueError: a file is missing, damaged or of other shapes; names it and the prompt.
        """
        rows = [self._read(prompt) for prompt in prompts]
        return Conditioning(np.stack([row.context for row in rows]), np.stack([row.pooled for row in rows]))

    def _read(self, prompt: str) -> Conditioning:
        path = self.path(prompt)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: damaged encoding of {prompt!r} ({error}); delete it and start again") from error
        shapes = {name: value.shape for name, value in tensors.items()}
        expected = {"context": self._shapes.context, "pooled": self._shapes.pooled}
        if shapes != expected:
            raise ValueError(f"{path}: found {shapes}, expected {expected}; delete it and start again")
        return Conditioning(tensors["context"], tensors["pooled"])


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)
