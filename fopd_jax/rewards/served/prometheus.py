"""What a server of rewards counts, in Prometheus' text format."""

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
_PREFIX = "fopd_jax_reward"


class Meters:
    """Counts since the start; to be used by one thread."""

    def __init__(self, rewards: Iterable[str]) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.images, self.failures, self.batches = (Counter(dict.fromkeys(rewards, 0)) for _ in range(3))
        self._seconds = {name: [0] * (len(_BOUNDS_S) + 1) for name in rewards}
        self._sums = dict.fromkeys(rewards, 0.0)

    def answered(self, reward: str, seconds: float) -> None:
        """A request was scored, so long after it had been read."""
        self._seconds[reward][bisect.bisect_left(_BOUNDS_S, seconds)] += 1
        self._sums[reward] += seconds

    def scored(self, reward: str, images: int, failures: int) -> None:
        """A batch was."""
        self.batches[reward] += 1
        self.images[reward] += images
        self.failures[reward] += failures

    def text(self, queued: Mapping[str, int]) -> str:
        """All of it, with the images that wait now."""
        requests = {f'path="{path}",status="{status}"': count for (path, status), count in self.requests.items()}
        return "".join(
            itertools.chain(
                _family("requests_total", "counter", "Requests by path and status.", requests),
                *(
                    _family(name, kind, meaning, {_of(each): count for each, count in counts.items()})
                    for name, kind, meaning, counts in (
                        ("images_total", "counter", "Images that were scored or failed.", self.images),
                        ("failures_total", "counter", "Images that failed.", self.failures),
                        ("batches_total", "counter", "Batches that were scored.", self.batches),
                        ("queued_images", "gauge", "Images that wait or are being scored.", queued),
                    )
                ),
                self._latency(),
            )
        )

    def _latency(self) -> Iterator[str]:
        yield from _family("latency_seconds", "histogram", "From a request that was read to its answer.", {})
        for name, counts in self._seconds.items():
            totals, reward = list(itertools.accumulate(counts)), _of(name)
            for bound, total in zip([*map(str, _BOUNDS_S), "+Inf"], totals, strict=True):
                yield f'{_PREFIX}_latency_seconds_bucket{{{reward},le="{bound}"}} {total}\n'
            yield f"{_PREFIX}_latency_seconds_sum{{{reward}}} {self._sums[name]:.6f}\n"
            yield f"{_PREFIX}_latency_seconds_count{{{reward}}} {totals[-1]}\n"


def _of(reward: str) -> str:
    """A reward's name as a label."""
    escaped = reward.replace("\\", "\\\\").replace('"', '\\"')
    return f'reward="{escaped}"'


def _family(name: str, kind: str, meaning: str, samples: Mapping[str, int]) -> Iterator[str]:
    yield f"# HELP {_PREFIX}_{name} {meaning}\n# TYPE {_PREFIX}_{name} {kind}\n"
    for labels, value in samples.items():
        yield f"{_PREFIX}_{name}{{{labels}}} {value}\n"
