"""The text encoders and tokenizers of a converted folder, and what their encodings depend on."""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
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
from fopd_jax.exits import CONVERTER
from fopd_jax.interop.files.converted import TOKENIZERS, Manifest, load_sharded
from fopd_jax.interop.files.tokenizers import open_tokenizer
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
                adds = f"{CONVERTER} adds it, from a pipeline that has one"
                raise ValueError(f"model.path: {self.folder} holds no {name}; {adds}")
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
        readers = [Reader(name, length, partial(self._tokenizer, name)) for name, length in self._lengths().items()]
        absent = [] if T5 in self.manifest.components else [f"{self.folder} holds no {T5}: CLIP alone reads them"]
        return absent + review(readers, prompts)

    def load(self, mesh: Mesh) -> TextEncoders:
        """The encoders, born in their shards on `mesh`; all tokenizers come first, since they take seconds.

        Raises:
          ValueError: weights or tokenizers are missing, damaged or another encoder's; names the folder.
        """
        tokenizers = {name: self._tokenizer(name, length) for name, length in self._lengths().items()}
        dtype, encoders = jnp.dtype(self.dtype), {}
        for name, tokenize in tokenizers.items():
            config = self.manifest.component(name).config
            network = T5Encoder(config, dtype=dtype) if name == T5 else CLIPText(config, dtype=dtype)
            params = load_sharded(self.folder, name, boxed_params(network), dtype, mesh)
            encoders[name] = TextEncoder(apply_of(network), params, tokenize)
        clip = [encoders[name] for name in CLIP_TOWERS]
        return TextEncoders(clip, encoders.get(T5), self.t5_length, self.context_dim)

    def _lengths(self) -> dict[str, int]:
        """Tokens that each encoder of the folder reads, in their order."""
        names = [name for name in (*CLIP_TOWERS, T5) if name in self.manifest.components]
        clip = {name: self.manifest.component(name).config.max_length for name in names if name != T5}
        return {name: clip.get(name, self.t5_length) for name in names}

    def _tokenizer(self, name: str, length: int) -> Tokenize:
        return load_tokenizer(self.folder / TOKENIZERS[name], self.manifest.components[name].config, length)


def boxed_params(network: nn.Module) -> Any:
    """Shapes of a text network's parameters, boxed with their logical axes."""
    return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def apply_of(network: nn.Module) -> Any:
    """`(params, ids) → states`."""
    return lambda params, ids: network.apply({"params": params}, ids)


def load_tokenizer(folder: Path, config: Mapping[str, Any], length: int) -> Tokenize:
    """A tokenizer by its local folder, padding and truncating to `length`; several threads may use it.

    `config`: its encoder's `config.json`.

    Raises:
      ValueError: as `open_tokenizer`.
    """
    tokenizer = open_tokenizer(folder, config)
    using = threading.Lock()  # it keeps its padding as state, and refuses a second user meanwhile

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        with using:
            batch = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np"
            )
        return np.asarray(batch["input_ids"], np.int32)

    return tokenize
