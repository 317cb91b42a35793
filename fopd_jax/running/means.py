"""Metrics averaged over the steps since the last line of them."""

from collections.abc import Mapping, Sequence

WEIGHTS = "weights/"  # what a metric counts at a step stands under its name with this prefix; without one it counts 1
SKIPPED = "skipped"  # updates that did not land: these are counted
Values = dict[str, float]


def split(scalars: Mapping[str, float]) -> tuple[Values, Values]:
    """Metrics, and the weights of those that have one."""
    values = {name: value for name, value in scalars.items() if not name.startswith(WEIGHTS)}
    weights = {name.removeprefix(WEIGHTS): scalars[name] for name in scalars.keys() - values.keys()}
    return values, weights


class Means:
    """Σ weight·value / Σ weight of each metric, in float64.

    After a single step that is the value itself, to the bit: the product of two float32 is exact. `notes` go into a
    checkpoint, and the run that resumes from it writes the lines of one that nothing interrupted.
    """

    def __init__(self, notes: Mapping[str, Sequence[float]] | None = None) -> None:
        self._sums = {name: (float(total), float(weight)) for name, (total, weight) in (notes or {}).items()}

    def add(self, values: Mapping[str, float], weights: Mapping[str, float]) -> None:
        """One step's metrics; what has the weight 0 was not measured in it."""
        for name, value in values.items():
            weight = weights.get(name, 1.0)
            if weight:
                total, before = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = total + weight * value, before + weight

    def skip(self) -> None:
        """One step that did not land: it counts, its metrics do not."""
        self.add({SKIPPED: 1.0}, {})

    def take(self) -> Values:
        """The means by name, of the metrics that were measured, and how many steps were skipped; begins anew."""
        means = {
            name: total if name == SKIPPED else total / weight for name, (total, weight) in sorted(self._sums.items())
        }
        self._sums = {}
        return means

    def notes(self) -> dict[str, list[float]]:
        """What is not on a line yet, as JSON has it: numbers come back as they were."""
        return {name: list(sums) for name, sums in sorted(self._sums.items())}
