"""Convert Stable Diffusion 3 and 3.5 weights once, for every later run.

    python tools/convert_sd35_weights.py --src FOLDER --dst CONVERTED [--dtype bfloat16] [--components transformer,vae]
    python tools/convert_sd35_weights.py --src sd3.5_medium.safetensors --dst CONVERTED
    python tools/convert_sd35_weights.py --reverse --src CONVERTED --dst FOLDER/transformer

FOLDER is a diffusers pipeline (`model_index.json`, single or sharded safetensors); a single file is the original layout
of the transformer. A destination that is already converted from the same files is left alone, so the command may stand
in a job's script; a component that is missing there, or whose files changed, is converted. The autoencoder, which runs
in float32, is kept in float32. With --reverse a converted transformer is written back as diffusers reads it.

Exit codes: 0 done (or nothing to do), 2 something is wrong with the command line, source or destination, 1 any other
error, as a full disk (one line says what), 130 interrupted. Whatever happens, the destination is whole or as it was
before.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # converting needs no accelerator, and must not occupy one

from fopd_jax.exits import Arguments, report
from fopd_jax.files import local_path
from fopd_jax.interop.sd3.convert import OUTPUT_DTYPES, byte_bar, convert, write_transformer


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 if it is wrong."""
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True)
    parser.add_argument("--dst", required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(OUTPUT_DTYPES))
    parser.add_argument("--components", help="comma-separated; default: all that the source has")
    parser.add_argument("--reverse", action="store_true", help="write a converted transformer as a diffusers folder")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> str:
    """Convert; returns what was done, in words."""
    src, dst = local_path("src", args.src), local_path("dst", args.dst)
    if args.reverse:
        write_transformer(src, dst, progress=byte_bar)
        return f"wrote the transformer of {src} to {dst}"
    components = args.components.split(",") if args.components else None
    done = convert(src, dst, dtype=args.dtype, components=components, progress=byte_bar)
    return f"converted {', '.join(done)} into {dst}" if done else f"{dst}: already converted, unchanged"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    report(args.dst, lambda: run(args))


def silence_libraries() -> None:
    """Orbax logs each save at length. An error is raised too, and this program's one line must not drown in the
    tracebacks that its threads and unfinished tasks print meanwhile and at exit."""
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop cleans up as Ctrl-C does
    silence_libraries()
    main()
