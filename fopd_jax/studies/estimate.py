"""What tables would cost at true size, by arithmetic, before anything is run."""

import dataclasses
from collections.abc import Mapping, Sequence

from fopd_jax.config.stages import StageConfig
from fopd_jax.performance.topology import CHIPS, GPUS, Chip
from fopd_jax.stages.costs import step_cost

KINDS: dict[str, Chip] = {**CHIPS, **{chip.kind: chip for chip in GPUS.values() if chip.kind in ("H100", "H200")}}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a table: students that no table before it has, and the FLOPs that train them."""

    students: int
    flops: float

    def hours(self, chip: Chip, utilisation: float) -> float:
        """Of one chip, at a share of its peak."""
        return self.flops / (chip.peak_flops * utilisation) / 3600


def flops_of(config: StageConfig) -> float:
    """To train one student; evaluations are not counted."""
    return step_cost(config).model * config.run.steps


def costs_of(students: Mapping[str, Sequence[tuple[str, StageConfig]]]) -> dict[str, Cost]:
    """By table, of the names and configs of its students; one that several tables have is counted at the first."""
    seen, found = set[str](), dict[str, Cost]()
    for table, rows in students.items():
        new = {name: config for name, config in rows if name not in seen}
        seen |= new.keys()
        found[table] = Cost(len(new), sum(map(flops_of, new.values()), 0.0))
    return found


def as_rows(costs: Mapping[str, Cost], utilisation: float) -> list[list[str]]:
    """With a head and a sum."""
    head = ["table", "students", "PFLOP", *(f"{kind} hours" for kind in KINDS)]
    whole = Cost(sum(each.students for each in costs.values()), sum(each.flops for each in costs.values()))
    rows = [
        [name, str(cost.students), f"{cost.flops / 1e15:,.0f}",
         *(f"{cost.hours(chip, utilisation):,.0f}" for chip in KINDS.values())]
        for name, cost in {**costs, "all": whole}.items()
    ]  # fmt: skip
    return [head, *rows]
