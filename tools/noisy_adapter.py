"""Spoil a LoRA adapter with gaussian noise, for experiments with teachers that are not worth following.

    python tools/noisy_adapter.py --src teacher_text.safetensors --dst noisy.safetensors --scale 4

To every factor of every layer is added N(0, (scale·rms)²), rms being the factor's own root mean square. Learned factors
add up where noise does not, so that scales below 1 hardly show: of the miniature's text teacher a scale of 2 takes a
third of what it learned, 3 all of it. The new file's card names the noise, and has no scores: they were the source's.

Source and result are files of this project's own; tools/convert_adapter.py makes one of any. Takes a second.

Exit status: 0 done; 2 bad input, 1 any other error, with one line that says what is wrong; 130 interrupted.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # adding noise needs no accelerator, and must not occupy one

import jax
import numpy as np

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import Adapter
from fopd_jax.exits import Arguments, explained
from fopd_jax.files import check_apart, local_file, local_path
from fopd_jax.interop.files.safetensors import CARD, load_adapter, save_adapter
from fopd_jax.interop.lora.cards import read_card

LARGEST = 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with explained(options.dst):
        src, dst = local_path("src", options.src), local_file("dst", options.dst)
        check_apart(src, dst)
        if not 0 <= options.scale <= LARGEST:
            raise ValueError(f"--scale: found {options.scale:g}, expected a number from 0 to {LARGEST:g}")
        if not 0 <= options.seed < 2**32:
            raise ValueError(f"--seed: found {options.seed}, expected a whole number from 0 to {2**32 - 1}")
        adapter, metadata = load_adapter(src)
        kept = {name: value for name, value in metadata.items() if name not in ("scale", CARD)}
        save_adapter(dst, noisy(adapter, options.scale, options.seed), kept, spoiled(read_card(src), options))
    print(f"{options.dst}: {options.src} with noise of {options.scale:g} of its factors' own size")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 if it is wrong."""
    parser = Arguments(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--src", required=True, help="adapter, a file of this project's own")
    parser.add_argument("--dst", required=True, help="file to write")
    parser.add_argument("--scale", type=float, required=True, help="deviation of the noise by the factors' own size")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    return parser.parse_args(arguments)


def noisy(adapter: Adapter, scale: float, seed: int) -> Adapter:
    """With noise in every factor, a function of the seed and of the factor's place."""
    leaves, tree = jax.tree.flatten(adapter.weights)
    found = []
    for place, leaf in enumerate(np.asarray(each) for each in leaves):
        noise = np.random.default_rng((seed, place)).standard_normal(leaf.shape, dtype=np.float32)
        found.append(leaf + np.float32(scale * np.sqrt(np.square(leaf, dtype=np.float64).mean())) * noise)
    return Adapter(jax.tree.unflatten(tree, found), adapter.scale)


def spoiled(card: AdapterCard | None, options: argparse.Namespace) -> AdapterCard:
    """What the new file says of itself."""
    card = card or AdapterCard()
    said = f"{card.algorithm or 'unknown'}, then gaussian noise of scale {options.scale:g}, seed {options.seed}"
    return dataclasses.replace(card, algorithm=said, scores={}, scored_at=None)


if __name__ == "__main__":
    main()
