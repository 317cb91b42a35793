"""The world of a converted folder: its text encoders, its autoencoder, and prompts from files."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from fopd_jax.conditioning.cache import ConditioningCache
from fopd_jax.conditioning.encoder import Conditioning, PromptEncoder, TextEncoder, Tokenize
from fopd_jax.config.schema import Encoding, Model
from fopd_jax.interop.files.converted import TOKENIZERS, Manifest, load_sharded
from fopd_jax.models.autoencoder import Autoencoder
from fopd_jax.models.clip import CLIPText
from fopd_jax.models.t5 import T5Encoder
from fopd_jax.parallel.distributed import barrier, is_main, local_mesh
from fopd_jax.parallel.sharding import batch_sharding, check_batch
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.world import World

ENCODING_TIMEOUT_S = 7200.0  # a host that has its prompts waits while another one encodes them all
CLIP_TOWERS = ("text_encoder", "text_encoder_2")


class Encodings(Protocol):
    """Where encoded prompts are kept; `ConditioningCache` on disk, `MemoryEncodings` in memory."""

    def missing(self, prompts: Iterable[str]) -> list[str]: ...
    def check_space(self, count: int) -> None: ...
    def write(self, prompts: Sequence[str], encoded: Conditioning) -> None: ...
    def read(self, prompts: Sequence[str]) -> Conditioning: ...


class MemoryEncodings:
    """Encoded prompts in memory, as they were computed."""

    def __init__(self) -> None:
        self._rows: dict[str, Conditioning] = {}

    def missing(self, prompts: Iterable[str]) -> list[str]:
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]

    def check_space(self, count: int) -> None:
        pass

    def write(self, prompts: Sequence[str], encoded: Conditioning) -> None:
        for row, prompt in enumerate(prompts):
            self._rows[prompt] = Conditioning(encoded.context[row], encoded.pooled[row])

    def read(self, prompts: Sequence[str]) -> Conditioning:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(self._rows[prompt] for prompt in prompts))


class FolderWorld:
    """Text encoders, autoencoder and prompt files around a converted folder's transformer.

    Each process encodes and decodes by itself, on its own devices.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        tasks: Mapping[str, Task],
        *,
        model: Model,
        encoding: Encoding,
        mesh: Mesh,
    ) -> None:
        self._folder, self._manifest, self._tasks = folder, manifest, tasks
        self._model, self._encoding = model, encoding
        self._mesh = local_mesh(mesh)
        for name in ("vae", *CLIP_TOWERS):
            if name not in manifest.components:
                raise ValueError(f"model.path: {folder} holds no {name}; convert it too")
        check_batch("run.encoding.batch_size", encoding.batch_size, self._mesh)
        vae, network = manifest.component("vae").config, manifest.transformer
        unit, side = vae.downsampling * network.patch_size, model.resolution
        largest = unit * network.table_size
        if not unit <= side <= largest or side % unit:
            raise ValueError(f"model.resolution: found {side}, expected a multiple of {unit}, at most {largest}")
        self._latent_shape = (side // vae.downsampling, side // vae.downsampling, network.channels)
        self._encodings: Encodings = self._cache(Path(encoding.cache)) if encoding.cache else MemoryEncodings()
        self._decode: Any = None

    def world(self) -> World:
        return World(self._latent_shape, self._tasks, self._encode, self._decode_images, self._prepare)

    def _cache(self, folder: Path) -> ConditioningCache:
        """Its fingerprint is all that an encoding depends on: encoders and tokenizers, precision, T5's length."""
        names = [name for name in TOKENIZERS if name in self._manifest.components]
        components = {name: self._manifest.components[name] for name in names}
        parts = {
            "source": {name: dict(each.source) for name, each in components.items()},
            "stored": {name: each.dtype for name, each in components.items()},
            "computed": self._model.dtype,
            "t5_length": self._model.t5_length,
        }
        fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        clip = [self._manifest.component(name).config for name in CLIP_TOWERS]
        shapes = Conditioning(
            (clip[0].max_length + self._model.t5_length, self._manifest.transformer.context_dim),
            (sum(each.projection_dim for each in clip),),
        )
        return ConditioningCache(folder, fingerprint, shapes)

    def _prepare(self, prompts: Iterable[str]) -> None:
        """Encode what is not there yet; the encoders are in memory only meanwhile.

        Every process encodes its share, then what others have encoded into folders that it does not see.
        """
        distinct, encoder = list(dict.fromkeys(prompts)), functools.cache(self._load_encoder)
        self._fill(distinct[jax.process_index() :: jax.process_count()], encoder)
        barrier("prompts are encoded", ENCODING_TIMEOUT_S)
        self._fill(distinct, encoder)

    def _fill(self, prompts: Iterable[str], encoder: Callable[[], PromptEncoder]) -> None:
        missing, size = self._encodings.missing(prompts), self._encoding.batch_size
        if not missing:
            return
        self._encodings.check_space(len(missing))
        title, encode = "encode prompts", encoder()
        with tqdm(total=len(missing), desc=title, unit="prompt", dynamic_ncols=True, disable=not is_main()) as bar:
            for start in range(0, len(missing), size):
                batch = missing[start : start + size]
                self._encodings.write(batch, encode(batch))
                bar.update(len(batch))

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        self._fill(prompts, self._load_encoder)
        return self._encodings.read(prompts)

    def _load_encoder(self) -> PromptEncoder:
        dtype = jnp.dtype(self._model.dtype)
        clip = []
        for name in CLIP_TOWERS:
            c = self._manifest.component(name).config
            clip.append(self._load_text(name, CLIPText(c, dtype=dtype), c.max_length))
        t5, length = None, self._model.t5_length
        if "text_encoder_3" in self._manifest.components:
            network = T5Encoder(self._manifest.component("text_encoder_3").config, dtype=dtype)
            t5 = self._load_text("text_encoder_3", network, length)
        return PromptEncoder(
            clip,
            t5,
            t5_length=length,
            context_dim=self._manifest.transformer.context_dim,
            batch_size=self._encoding.batch_size,
            sharding=batch_sharding(self._mesh),
        )

    def _load_text(self, name: str, network: nn.Module, length: int) -> TextEncoder:
        boxed = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, length), jnp.int32))["params"]
        dtype = jnp.dtype(self._model.dtype)
        params = load_sharded(self._folder, name, boxed, dtype, self._mesh)
        tokenize = load_tokenizer(self._folder / TOKENIZERS[name], length)
        return TextEncoder(lambda params, ids: network.apply({"params": params}, ids), params, tokenize)

    def _decode_images(self, latents: np.ndarray) -> np.ndarray:
        """Latents → images, one a device at a time: what a larger batch gains, its activations cost in memory."""
        if self._decode is None:
            self._decode = self._load_decoder()
        ways = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        images = []
        for start in range(0, len(latents), ways):
            chunk = latents[start : start + ways]
            filled = np.concatenate([chunk, np.zeros((ways - len(chunk), *chunk.shape[1:]), chunk.dtype)])
            placed = jax.device_put(filled, batch_sharding(self._mesh))
            images.append(jax.device_get(self._decode(placed))[: len(chunk)])
        return np.concatenate(images)

    def _load_decoder(self) -> Any:
        network = Autoencoder(self._manifest.component("vae").config)
        side = network.config.downsampling
        images = jnp.zeros((1, side, side, 3))
        boxed = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
        params = load_sharded(self._folder, "vae", boxed, jnp.float32, self._mesh)
        decode = jax.jit(lambda params, latents: network.apply({"params": params}, latents, method="decode"))
        return lambda latents: decode(params, latents)


def load_tokenizer(folder: Path, length: int) -> Tokenize:
    """A tokenizer by its local folder, padding and truncating to `length`.

    Raises:
      ValueError: the folder holds no tokenizer; names it.
    """
    from transformers import AutoTokenizer  # imports much, which the miniature does without

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: no tokenizer that can be read ({' '.join(str(error).split())[:200]})") from error

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
        return np.asarray(batch["input_ids"], np.int32)

    return tokenize
