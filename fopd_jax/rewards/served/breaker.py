"""A circuit breaker: who fails again and again is left alone for a while, then asked once before many wait for it."""

import dataclasses
from typing import Literal


@dataclasses.dataclass
class Breaker:
    """Closed until `after` failures without a success between them; then open for `rest` seconds, then half-open: the
    next attempt is a probe. A probe that fails opens it for twice as long, up to `longest`; a success closes it.

    Times are seconds of any one clock.
    """

    after: int = 3
    rest: float = 1.0
    longest: float = 30.0
    failures: int = 0
    until: float | None = None

    def state(self, now: float) -> Literal["closed", "open", "half-open"]:
        if self.until is None:
            return "closed"
        return "open" if now < self.until else "half-open"

    def succeed(self) -> None:
        self.failures, self.until = 0, None

    def fail(self, now: float) -> None:
        """Failures of attempts that began before it opened tell nothing new."""
        if self.state(now) == "open":
            return
        self.failures += 1
        if self.failures >= self.after:
            self.until = now + min(self.rest * 2.0 ** min(self.failures - self.after, 60), self.longest)
