"""The world of a converted folder: its text encoders, its autoencoder, and prompts from files."""

from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh

from fopd_jax.conditioning.cache import ConditioningCache
from fopd_jax.conditioning.converted import ConvertedText
from fopd_jax.conditioning.encoder import PromptEncoder
from fopd_jax.conditioning.kept import KeptPrompts, MemoryEncodings
from fopd_jax.conditioning.resident import ResidentPrompts
from fopd_jax.config.schema import Encoding, Model, Pairs
from fopd_jax.config.sizes import check_size
from fopd_jax.exits import CONVERTER
from fopd_jax.files import local_path
from fopd_jax.interop.files.converted import Manifest
from fopd_jax.parallel.distributed import local_mesh
from fopd_jax.parallel.sharding import batch_sharding, batch_ways, filled
from fopd_jax.tasks.images import read_image_tasks
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.codec import Codec
from fopd_jax.worlds.images import CaptionedImages, Draws
from fopd_jax.worlds.world import World


class FolderWorld:
    """Text encoders, autoencoder and prompt files around a converted folder's transformer.

    Each process decodes by itself, on its own devices; it also encodes so, unless the encoders are resident.
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
        self._folder, self._manifest, self._mesh, self._tasks = folder, manifest, local_mesh(mesh), tasks
        if "vae" not in manifest.components:
            raise ValueError(f"model.path: {folder} holds no vae; {CONVERTER} adds it, from a pipeline that has one")
        self._text = text = ConvertedText(folder, manifest, model.dtype, model.t5_length)
        if encoding.resident:
            self._prompts = ResidentPrompts(text.load, mesh)
        else:
            self._prompts = kept_prompts(text, encoding, self._mesh)
        vae, network = manifest.component("vae").config, manifest.transformer
        if vae.latent_channels != network.channels:
            raise ValueError(
                f"model.path: {folder}: found an autoencoder of {vae.latent_channels} latent channels, expected the "
                f"transformer's {network.channels}"
            )
        unit = vae.downsampling * network.patch_size
        check_size("model.resolution", model.resolution, unit, unit * network.table_size)
        self._size, self._codec = model.size, Codec(folder, manifest, self._mesh)
        self._latent_shape = (*(side // vae.downsampling for side in self._size), network.channels)

    def world(self) -> World:
        prompts = self._prompts
        return World(
            self._latent_shape, self._tasks, prompts.encode, self._codec.decode, prompts.prepare, prompts.embed,
            missing=prompts.missing, review=self._text.review, pairs=self._pairs, decoder=self._codec.decoder,
        )  # fmt: skip

    def _pairs(self, tasks: Mapping[str, Pairs], batch_size: int, empty_caption: float, seed: int) -> CaptionedImages:
        """Of the run's own tasks where these have images, else of the folders that `tasks` name."""
        own = all(name in self._tasks and self._tasks[name].images for name in tasks)
        draws = Draws(self._tasks if own else read_image_tasks(tasks), tasks, batch_size, empty_caption, seed)
        return CaptionedImages(draws, self._size, self._prompts.encode, self._codec.encode)


def kept_prompts(text: ConvertedText, encoding: Encoding, mesh: Mesh) -> KeptPrompts:
    """Prompts that are encoded once on this process's `mesh` and kept in the folder `cache`, or without one in memory.

    Some `encoding.batch_size` are encoded at once: what the mesh divides.
    """
    batch_size = filled(encoding.batch_size, batch_ways(mesh))
    kept = MemoryEncodings()
    if encoding.cache:
        kept = ConditioningCache(local_path("run.encoding.cache", encoding.cache), text.fingerprint(), text.shapes())
    return KeptPrompts(kept, lambda: PromptEncoder(text.load(mesh), batch_size, batch_sharding(mesh)), batch_size)
