"""`python -m fopd_jax.report --runs DIR [DIR …] [--evaluations OUT …] [--out=report.html] [--serve]`.

Makes one HTML file of what runs and evaluations left: scores with intervals, galleries of the same prompt and noise by
every model, skills against images seen, training curves, gaps to the teachers, cost, and where configs differ. The file
holds all that it shows and asks nothing of any machine. `NAME=DIR` gives a run another name than its folder's.

`--serve` follows runs that go on: the page is at http://127.0.0.1:PORT and brings itself up to date; Ctrl-C ends it.
What is damaged or missing in a folder is told, on the page as well, and the rest is shown.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fopd_jax.exits import Arguments, explained

if TYPE_CHECKING:
    from fopd_jax.reporting.content import Sources

LEAST_ROWS, MOST_ROWS = 1, 5000
MOST_MEGABYTES = 500


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with explained(options.out):
        if options.serve:
            serve(options)
        else:
            write(options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 if it is wrong."""
    head, _, rest = (__doc__ or "").partition("\n")
    parser = Arguments(usage=head.strip("`."), description=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", action="extend", default=[], metavar="DIR", help="folders of runs")
    parser.add_argument(
        "--evaluations", nargs="+", action="extend", default=[], metavar="OUT", help="folders that evaluations filled"
    )
    parser.add_argument("--out", default="report.html", metavar="FILE", help="file to write (default: report.html)")
    parser.add_argument("--title", default="Flow-OPD report", help="heading of the page")
    parser.add_argument(
        "--gallery-rows", type=int, default=200, metavar="N", help="most rows of a gallery (default: 200)"
    )
    parser.add_argument(
        "--megabytes", type=float, default=24, metavar="N", help="most of all pictures together (default: 24)"
    )
    parser.add_argument("--serve", action="store_true", help="follow running workdirs, and write no file")
    parser.add_argument("--port", type=int, default=8717, help="of --serve; 0: any free one (default: 8717)")
    return parser.parse_args(arguments)


def write(options: argparse.Namespace) -> None:
    """
    Raises:
      ValueError: a folder or a flag is wrong.
      OSError: the file cannot be written.
    """
    from fopd_jax.console import note, say
    from fopd_jax.files import local_file, write_text
    from fopd_jax.reporting.content import gather
    from fopd_jax.reporting.page import render

    out, sources = local_file("--out", options.out), sources_of(options)
    content = gather(sources)
    text = render(content)
    write_text(out, text)
    for line in content.problems:
        note(f"note: {line}")
    say(f"{out}: {len(text.encode()) / 1e6:.1f} MB; opens in any browser")


def serve(options: argparse.Namespace) -> None:
    """Until it is interrupted.

    Raises:
      ValueError: a folder or a flag is wrong, or the port is taken.
    """
    from fopd_jax.console import say
    from fopd_jax.exits import need
    from fopd_jax.reporting.serving import HOST, Fresh, bind

    need("report", "report", "jinja2")
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port: found {options.port}, expected a number from 0 to 65535")
    fresh = Fresh(sources_of(options))
    with bind(options.port, fresh) as server:
        say(f"http://{HOST}:{server.server_port} follows its folders; Ctrl-C ends it")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("ended")


def sources_of(options: argparse.Namespace) -> "Sources":
    """What the command line names, checked.

    Raises:
      ValueError: nothing is named, a folder is none of a run or an evaluation, or a number is out of range.
    """
    from fopd_jax.files import local_path
    from fopd_jax.reporting.content import Sources
    from fopd_jax.reporting.entities import named_folder

    if not options.runs and not options.evaluations:
        raise ValueError("--runs: missing, expected the folder of a run, or --evaluations")
    if not LEAST_ROWS <= options.gallery_rows <= MOST_ROWS:
        raise ValueError(f"--gallery-rows: found {options.gallery_rows}, expected {LEAST_ROWS} to {MOST_ROWS}")
    if not 0 < options.megabytes <= MOST_MEGABYTES:
        raise ValueError(f"--megabytes: found {options.megabytes:g}, expected more than 0, at most {MOST_MEGABYTES}")
    named = [named_folder(text) for text in options.runs]
    sources = Sources(
        tuple((name, local_path("--runs", folder)) for name, folder in named),
        tuple(local_path("--evaluations", folder) for folder in options.evaluations),
        options.title, options.gallery_rows, int(options.megabytes * 1e6),
    )  # fmt: skip
    sources.check()
    return sources


if __name__ == "__main__":
    main()
