"""The text encoders and tokenizers of a converted folder, and what their encodings depend on."""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fopd_jax.conditioning.encoder import Conditioning, TextEncoder, TextEncoders, Tokenize
from fopd_jax.conditioning.lengths import Reader, review
from fopd_jax.interop.files.converted import TOKENIZERS, Manifest, load_sharded
from fopd_jax.models.clip import CLIPText
from fopd_jax.models.t5 import T5Encoder

CLIP_TOWERS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"


@dataclasses.dataclass(frozen=True)
class ConvertedText:
    """A converted folder's text side; `dtype`: of parameters and computation, `t5_length`: tokens that T5 sees.

    Raises:
      ValueError: `t5_length` is below 1; or the folder lacks a tower.
    """

    folder: Path
    manifest: Manifest
    dtype: str
    t5_length: int

    def __post_init__(self) -> None:
        for name in CLIP_TOWERS:
            if name not in self.manifest.components:
                raise ValueError(f"model.path: {self.folder} holds no {name}; convert it too")
        if self.t5_length < 1:
            raise ValueError(f"t5_length: found {self.t5_length}, expected at least 1")

    @property
    def context_dim(self) -> int:
        return self.manifest.transformer.context_dim

    def fingerprint(self) -> str:
        """A hash of all that an encoding depends on: encoders and tokenizers, precision, T5's length."""
        names = [name for name in TOKENIZERS if name in self.manifest.components]
        components = {name: self.manifest.components[name] for name in names}
        parts = {
            "source": {name: dict(each.source) for name, each in components.items()},
            "stored": {name: each.dtype for name, each in components.items()},
            "computed": self.dtype,
            "t5_length": self.t5_length,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def shapes(self) -> Conditioning:
        """Of one prompt's encoding."""
        clip = [self.manifest.component(name).config for name in CLIP_TOWERS]
        length = clip[0].max_length + self.t5_length
        return Conditioning((length, self.context_dim), (sum(each.projection_dim for each in clip),))

    def review(self, prompts: Iterable[str]) -> list[str]:
        """What the encoders do not read of prompts, a line each, see `lengths.review`; loads no weights."""
        names = [name for name in (*CLIP_TOWERS, T5) if name in self.manifest.components]
        folders = {name: self.folder / TOKENIZERS[name] for name in names}
        lengths = {name: self.t5_length if name == T5 else self._clip_length(name) for name in names}
        return review([Reader(name, lengths[name], partial(load_tokenizer, folders[name])) for name in names], prompts)

    def _clip_length(self, name: str) -> int:
        return self.manifest.component(name).config.max_length

    def load(self, mesh: Mesh) -> TextEncoders:
        """The encoders, born in their shards on `mesh`.

        Raises:
          ValueError: weights or tokenizers are missing or damaged; names the folder.
        """
        clip = []
        for name in CLIP_TOWERS:
            config = self.manifest.component(name).config
            clip.append(self._load(name, CLIPText(config, dtype=jnp.dtype(self.dtype)), config.max_length, mesh))
        t5 = None
        if T5 in self.manifest.components:
            network = T5Encoder(self.manifest.component(T5).config, dtype=jnp.dtype(self.dtype))
            t5 = self._load(T5, network, self.t5_length, mesh)
        return TextEncoders(clip, t5, self.t5_length, self.context_dim)

    def _load(self, name: str, network: nn.Module, length: int, mesh: Mesh) -> TextEncoder:
        params = load_sharded(self.folder, name, boxed_params(network), jnp.dtype(self.dtype), mesh)
        tokenize = load_tokenizer(self.folder / TOKENIZERS[name], length)
        return TextEncoder(apply_of(network), params, tokenize)


def boxed_params(network: nn.Module) -> Any:
    """Shapes of a text network's parameters, boxed with their logical axes."""
    return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def apply_of(network: nn.Module) -> Any:
    """`(params, ids) → states`."""
    return lambda params, ids: network.apply({"params": params}, ids)


def load_tokenizer(folder: Path, length: int) -> Tokenize:
    """A tokenizer by its local folder, padding and truncating to `length`; several threads may use it.

    Raises:
      ValueError: the folder holds no tokenizer; names it.
    """
    from transformers import AutoTokenizer  # imports much, which the miniature does without

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: no tokenizer that can be read ({' '.join(str(error).split())[:200]})") from error
    using = threading.Lock()  # it keeps its padding as state, and refuses a second user meanwhile

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        with using:
            batch = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np"
            )
        return np.asarray(batch["input_ids"], np.int32)

    return tokenize
