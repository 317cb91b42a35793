"""CLIP from a converted file: pictures and texts → directions in one space, whose cosines many rewards rest on."""

import functools
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import path_aware_map
from jaxtyping import Array, Float, Int32, UInt8

from fopd_jax import console
from fopd_jax.interop.files.safetensors import Tree
from fopd_jax.interop.scorers.clip import NETWORK, read_shape
from fopd_jax.interop.scorers.weights import CONVERTER, load_weights
from fopd_jax.interop.scorers.words import END, make_tokenizer
from fopd_jax.models.clip import CLIPText
from fopd_jax.models.clip_vision import CLIPVision
from fopd_jax.parallel.parts import at_once, in_parts, own_mesh
from fopd_jax.parallel.sharding import replicated
from fopd_jax.rewards.preprocessing import TRANSFORMERS, Pictures, Preprocessing, preprocess, preprocess_within

DTYPES = ("float32", "bfloat16")
"""In which towers compute."""
_ROWS = 16
"""Pictures or texts at once on one accelerator."""


class Towers:
    """Both towers of one converted file, whole on each of this process's devices, and its tokenizer."""

    def __init__(self, shape: dict[str, Any], params: Tree, dtype: str) -> None:
        self.vision, self.text, merges = read_shape(shape)
        self.mesh = own_mesh()
        self.rows = at_once(self.mesh, _ROWS)
        self.logit_scale = float(np.exp(params["logit_scale"]))
        params = jax.device_put(_stored(params, dtype), replicated(self.mesh))
        self.params = {name: params[name] for name in ("vision", "text")}
        vision, text = CLIPVision(self.vision, jnp.dtype(dtype)), CLIPText(self.text, jnp.dtype(dtype))
        self.see_with = _program(lambda params, pixels: vision.apply({"params": params}, pixels.astype(dtype)), dtype)
        self.read_with = _program(lambda params, ids: text.apply({"params": params}, ids)[1], dtype)
        self.see = functools.partial(self.see_with, params["vision"])
        self.read = functools.partial(self.read_with, params["text"])
        self.tokenizer = make_tokenizer(merges) if merges else None


class Clip:
    """CLIP as one scorer uses it: `preprocessing` is the scorer's own; `field`, the config's, names it in messages.

    `dim` is the length of an embedding. `logit_scale` is what the network multiplies cosines by: e to the power of its
    parameter of that name, 100 of most published ones.
    """

    def __init__(self, towers: Towers, preprocessing: Preprocessing, field: str) -> None:
        self._towers, self._preprocessing, self._field = towers, preprocessing, field
        self.dim = towers.vision.projection_dim
        self.logit_scale = towers.logit_scale
        self._told = False

    def embed_images(self, images: Pictures) -> Float[np.ndarray, "n d"]:
        """Directions of pictures, of norm 1; RGB of any sizes.

        Raises:
          ValueError: a picture has no pixels.
        """
        towers = self._towers
        if not len(images):
            return np.zeros((0, self.dim), np.float32)
        pixels = preprocess(images, self._preprocessing, towers.vision.image_size, towers.mesh, towers.rows)
        return in_parts(towers.see, pixels, towers.mesh, towers.rows)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Directions of texts, of norm 1. What is longer than the tower reads is cut, as published, which is told once.

        Raises:
          ValueError: the converted file has no tokenizer.
        """
        towers = self._towers
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        return in_parts(towers.read, self.prepare(texts), towers.mesh, towers.rows)

    def params(self) -> Tree:
        """Both towers' parameters, `vision` and `text`, on this process's devices."""
        return self._towers.params

    def see(self, params: Tree, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """As `embed_images`, of pictures of one size within a program."""
        pixels = preprocess_within(images, self._preprocessing, self._towers.vision.image_size)
        return self._towers.see_with(params["vision"], pixels)

    def read(self, params: Tree, ids: Int32[Array, "b s"]) -> Float[Array, "b d"]:
        """As `embed_texts`, of what `prepare` made, within a program."""
        return self._towers.read_with(params["text"], ids)

    def prepare(self, texts: Sequence[str]) -> Int32[np.ndarray, "n s"]:
        """The ids of texts; says once that some are cut.

        Raises:
          ValueError: the converted file has no tokenizer.
        """
        ids, cut = self.tokenize(texts)
        if cut.any() and not self._told:
            self._told = True
            console.say(
                f"{self._field}: {np.count_nonzero(cut)} of {len(texts)} texts have more than {ids.shape[1]} tokens "
                "and are cut there, as published scorers do (told once)"
            )
        return ids

    def tokenize(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "n s"], Int32[np.ndarray, " n"]]:
        """Ids, filled up to the tower's length, and how many tokens of each text do not fit.

        What they are filled up with does not matter: attention is causal, and the state at the end mark is what counts.

        Raises:
          ValueError: the converted file has no tokenizer.
        """
        tokenizer = self.check_words()
        length, end = self._towers.text.max_length, tokenizer.token_to_id(END)
        ids, cut = np.full((len(texts), length), end, np.int32), np.zeros(len(texts), np.int32)
        for row, encoding in enumerate(tokenizer.encode_batch(list(texts))):
            kept = encoding.ids[: length - 1]  # whatever is cut, an end mark follows
            ids[row, : len(kept)] = kept
            cut[row] = max(len(encoding.ids) - length, 0)
        return ids, cut

    def check_words(self) -> Any:
        """The tokenizer, without which no text can be read.

        Raises:
          ValueError: the converted file has no tokenizer.
        """
        if self._towers.tokenizer is None:
            raise ValueError(f"{self._field}: its file holds no tokenizer; convert again with {CONVERTER} --tokenizer")
        return self._towers.tokenizer


_shared: weakref.WeakValueDictionary[tuple[Path, str], Towers] = weakref.WeakValueDictionary()


def load_clip(path: Path, field: str, preprocessing: Preprocessing = TRANSFORMERS, dtype: str = "float32") -> Clip:
    """CLIP from what `tools/convert_reward_weights.py` made, computing in `dtype`, one of `DTYPES`.

    Scorers that use one file share its towers, for as long as one of them lives.

    Raises:
      ValueError: there is no such file, or another network's; begins with `field`.
    """
    key = path.resolve(), dtype
    if (towers := _shared.get(key)) is None:
        shape, params = load_weights(path, NETWORK, field)
        towers = _shared[key] = Towers(shape, params, dtype)
    return Clip(towers, preprocessing, field)


def _stored(params: Tree, dtype: str) -> Tree:
    """Matrices in `dtype`; vectors, as those of norms, stay in float32."""
    wide = ("kernel", "embedding")
    return path_aware_map(lambda path, leaf: leaf.astype(dtype, copy=False) if path[-1] in wide else leaf, params)


def _program(apply: Callable[[Tree, Array], Any], dtype: str) -> Callable[[Tree, Array], Float[Array, "b d"]]:
    """`(params, inputs) → embeddings` of norm 1, compiled; float32 means float32 on every device."""

    @jax.jit
    def embed(params: Tree, inputs: Array) -> Float[Array, "b d"]:
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            projected = apply(params, inputs).astype(jnp.float32)
        return projected / jnp.linalg.norm(projected, axis=-1, keepdims=True)

    return embed
