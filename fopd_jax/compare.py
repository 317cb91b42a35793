"""`python -m fopd_jax.compare OUT [OUT …] [--against=NAME --allow-unequal=guidance,… --out=FOLDER]`.

Tables of models that `fopd_jax.evaluate` kept images and scores of, in one folder or in several: every suite's columns
with intervals by bootstrap over prompts, and the lead of one model, `--against`, over each other one, paired image by
image, with p-values corrected for their number. Nothing is generated or scored. Writes `results.json`, `results.csv`,
`results.md` and `results.tex` into `--out`; of one OUT by default into OUT itself.

Models whose images differ in prompts, samples, seed, steps, guidance, or in anything else that moves scores, are
refused, unless `--allow-unequal` names what may differ. A score that failed is listed, never averaged. Models of one
name that are not the same in two OUTs are told apart by their folders, as FOLDER/NAME.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()

from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from fopd_jax.console import say
from fopd_jax.evaluation.comparison import CHOICES, check_choices, gathered
from fopd_jax.evaluation.results import results_of
from fopd_jax.evaluation.tables import cells_of, write_results
from fopd_jax.exits import Arguments, explained
from fopd_jax.files import check_writable, local_path


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with explained():
        allowed = [name for name in options.allow_unequal.split(",") if name]
        check_choices(allowed, "--allow-unequal")
        folders = list(dict.fromkeys(local_path("OUT", name) for name in options.folders))
        out = _out(options.out, folders)
        cells = gathered({folder: cells_of(folder) for folder in folders})
        results = results_of(cells, options.against, allowed)
        out.mkdir(parents=True, exist_ok=True)
        say(write_results(out, results).rstrip())
        say(f"see {out}")


def parse(arguments: Sequence[str] | None) -> Namespace:
    """The command line; exits with status 2 if it is wrong."""
    parser = Arguments(
        prog="python -m fopd_jax.compare",
        usage="%(prog)s OUT [OUT ...] [--against=NAME --allow-unequal=FIELD,... --out=FOLDER]",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", metavar="OUT", help="folder of an evaluation")
    parser.add_argument("--against", default="", help="model whose leads are told; default the last one")
    parser.add_argument("--allow-unequal", default="", help=f"what may differ, of {', '.join(CHOICES)}")
    parser.add_argument("--out", default="", help="folder for the tables; default OUT, where there is one")
    return parser.parse_args(arguments)


def _out(given: str, folders: Sequence[Path]) -> Path:
    """
    Raises:
      ValueError: it is missing, or cannot be written.
    """
    if not given and len(folders) > 1:
        raise ValueError(f"--out: missing, expected a folder for the tables of {len(folders)} evaluations")
    out = local_path("--out", given) if given else folders[0]
    check_writable(out, "--out")
    return out


if __name__ == "__main__":
    main()
