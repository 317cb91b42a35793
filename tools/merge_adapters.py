"""Merge LoRA adapters of one base into one, to start training from or to compare with.

    python tools/merge_adapters.py --src text.safetensors composition.safetensors --dst merge.safetensors
        [--weights 0.5 0.5 --method=svd --rank=32 --alpha=64 --density=0.2 --seed=0]

The ways are those of `cold_start.merge` (fopd_jax/adapters/merging.py); by default all count alike and sum to 1, at the
first one's rank. How much of the exact sum that rank keeps is told. The new file's card names what it is of.

Sources and result are files of this project's own; tools/convert_adapter.py makes one of any. Takes seconds.

Exit status: 0 done; 2 bad input, 1 any other error, with one line that says what is wrong; 130 interrupted.
"""

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # merging needs no accelerator, and must not occupy one

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import conform, rank_of
from fopd_jax.adapters.merging import kept_energy, merge_measured
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.config.teaching import MERGES
from fopd_jax.exits import Arguments, explained
from fopd_jax.files import check_apart, local_file, local_path
from fopd_jax.interop.files.safetensors import CARD, load_adapter, save_adapter
from fopd_jax.interop.lora.cards import read_card


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with explained(options.dst):
        dst = local_file("dst", options.dst)
        sources = [local_path("src", name) for name in options.src]
        for source in sources:
            check_apart(source, dst)
        weights = _weights(options)
        read = [load_adapter(source) for source in sources]
        cards = [read_card(source) or AdapterCard() for source in sources]
        _check_bases(options.src, cards)
        first, metadata = read[0]
        adapters = [
            conform(name, adapter, first.weights, max(rank_of(adapter), rank_of(first)))
            for name, (adapter, _) in zip(options.src, read, strict=True)
        ]
        rank = options.rank or rank_of(first)
        lora = LoRAConfig(rank=rank, alpha=options.alpha or first.scale * rank)
        merged, energies = merge_measured(options.method, adapters, weights, lora, options.density, options.seed)
        card = AdapterCard(f"merge ({options.method})", base=cards[0].base, preset=cards[0].preset)
        kept = {name: value for name, value in metadata.items() if name not in ("scale", CARD)}
        save_adapter(dst, merged, kept, card)
    held = kept_energy(energies)
    told = "" if held is None else f"; rank {rank} keeps {held.overall:.1%} of the sum"
    print(f"{options.dst}: {options.method} of {len(adapters)} adapters{told}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 if it is wrong."""
    parser = Arguments(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--src", required=True, nargs="+", help="adapters, files of this project's own")
    parser.add_argument("--dst", required=True, help="file to write")
    parser.add_argument("--weights", type=float, nargs="+", default=[], help="one a source; default equal ones")
    parser.add_argument("--method", default="svd", choices=MERGES, help="default svd")
    parser.add_argument("--rank", type=int, default=0, help="of the result; default the first source's")
    parser.add_argument(
        "--alpha", type=float, default=0.0, help="its scale times its rank; default by the first's scale"
    )
    parser.add_argument("--density", type=float, default=0.2, help="of ties and dare")
    parser.add_argument("--seed", type=int, default=0, help="of what dare drops")
    return parser.parse_args(arguments)


def _weights(options: argparse.Namespace) -> list[float]:
    """
    Raises:
      ValueError: there is not one for each source, or a number is out of range.
    """
    if len(options.src) < 2:
        raise ValueError(f"--src: found {len(options.src)} adapter, expected at least 2")
    if options.weights and len(options.weights) != len(options.src):
        raise ValueError(f"--weights: found {len(options.weights)}, expected {len(options.src)}, one a source")
    if not 0 < options.density <= 1:
        raise ValueError(f"--density: found {options.density:g}, expected above 0, at most 1")
    for name in ("rank", "alpha"):
        if (found := getattr(options, name)) < 0:
            raise ValueError(f"--{name}: found {found:g}, expected 0, for the first source's, or more")
    return options.weights or [1 / len(options.src)] * len(options.src)


def _check_bases(names: Sequence[str], cards: Sequence[AdapterCard]) -> None:
    """
    Raises:
      ValueError: two adapters say that they are of different bases.
    """
    known = {name: card.base for name, card in zip(names, cards, strict=True) if card.base}
    if len({*known.values()}) > 1:
        told = ", ".join(f"{name} {base[:12]}…" for name, base in known.items())
        raise ValueError(f"--src: found adapters of different bases ({told}), expected one base")


if __name__ == "__main__":
    main()
