"""Tables of numbers as Markdown and as LaTeX (booktabs): the best in bold, intervals in brackets."""

import dataclasses
import re
from collections.abc import Sequence

_SMALL = 10.0
"""Sizes from which on two decimals are shown, three below."""
_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "−": "$-$", "×": r"$\times$", "–": "--", "≥": r"$\geq$", "≤": r"$\leq$", "…": r"\ldots{}",
}  # fmt: skip
_LEAST_P = 0.001


@dataclasses.dataclass(frozen=True)
class Entry:
    """A number of a table. `signed`: a difference; `p`: its corrected p-value. `failed`: scores that it lacks."""

    value: float | None
    low: float | None = None
    high: float | None = None
    best: bool = False
    failed: int = 0
    signed: bool = False
    p: float | None = None

    @property
    def number(self) -> str:
        """As it is shown."""
        return "–" if self.value is None else _decimal(self.value, self.signed)

    @property
    def bounds(self) -> str:
        if self.low is None or self.high is None:
            return ""
        return f"[{_decimal(self.low, self.signed)}, {_decimal(self.high, self.signed)}]"

    @property
    def sign(self) -> str:
        """The p-value in words."""
        if self.p is None:
            return ""
        return f"p < {_LEAST_P:g}" if self.p < _LEAST_P else f"p = {self.p:.3f}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """`rows`: each a label and an entry a head, None where there is none. `key`: names the table in LaTeX."""

    title: str
    caption: str
    corner: str
    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Entry | None]]]
    key: str


def with_best(column: Sequence[Entry | None]) -> list[Entry | None]:
    """The same with the largest marked; those that look alike are all the best. Of one number alone there is none."""
    known = [entry.value for entry in column if entry and entry.value is not None]
    best = _decimal(max(known), False) if len(known) > 1 else None
    return [entry and dataclasses.replace(entry, best=entry.number == best) for entry in column]


def as_markdown(grids: Sequence[Grid], notes: Sequence[str] = ()) -> str:
    """Tables below their titles and captions, then a list of notes."""
    parts = []
    title = ""
    for grid in grids:
        parts += [f"## {_markdown(grid.title)}"] if grid.title != title else []
        title = grid.title
        heads = [grid.corner, *grid.heads]
        rows = [heads, *([label, *map(_markdown_entry, entries)] for label, entries in grid.rows)]
        lines = [f"| {' | '.join(cell if k else _markdown(cell) for k, cell in enumerate(row))} |" for row in rows[1:]]
        first = f"| {' | '.join(map(_markdown, heads))} |"
        parts += ["\n".join([first, f"|---|{'---:|' * len(grid.heads)}", *lines]), _markdown(grid.caption)]
    if notes:
        parts += ["## Notes", "\n".join(f"- {_markdown(note)}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def as_latex(grids: Sequence[Grid]) -> str:
    """One `table` each; they need the package booktabs."""
    return "\n".join(["% needs \\usepackage{booktabs}", *map(_latex_table, grids)]) + "\n"


def _latex_table(grid: Grid) -> str:
    rows = [" & ".join([_latex(label), *map(_latex_entry, entries)]) + r" \\" for label, entries in grid.rows]
    label = re.sub(r"[^a-z0-9]+", "-", grid.key.lower()).strip("-")
    return "\n".join([
        r"\begin{table}[t]", r"\centering",
        rf"\caption{{{_latex(f'{grid.title}. {grid.caption}')}}}", rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{l{'r' * len(grid.heads)}}}", r"\toprule",
        " & ".join(map(_latex, [grid.corner, *grid.heads])) + r" \\", r"\midrule", *rows, r"\bottomrule",
        r"\end{tabular}", r"\end{table}",
    ])  # fmt: skip


def _markdown_entry(entry: Entry | None) -> str:
    if entry is None:
        return ""
    number = entry.number + ("\\*" if entry.failed else "")
    return " ".join(part for part in (f"**{number}**" if entry.best else number, entry.bounds, entry.sign) if part)


def _latex_entry(entry: Entry | None) -> str:
    if entry is None:
        return ""
    number = _latex(entry.number) + (r"$^*$" if entry.failed else "")
    small = " ".join(part for part in (_latex(entry.bounds), _latex_p(entry.sign)) if part)
    return " ".join(
        [rf"\textbf{{{number}}}" if entry.best else number, *([rf"{{\scriptsize {small}}}"] if small else [])]
    )


def _latex_p(text: str) -> str:
    return f"${text}$" if text else ""


def _decimal(number: float, signed: bool) -> str:
    """With a true minus; without one before a nought."""
    text = f"{number:{'+' if signed else ''}.{3 if abs(number) < _SMALL else 2}f}"
    return re.sub(r"^-(?=0\.0+$)", "", text).replace("-", "−")


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", _line(text))


def _latex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in _line(text))


def _line(text: str) -> str:
    return " ".join(text.split())
