"""Training pairs: reproducible, corrupted as often as asked, never a held-out prompt."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import Pairs
from fopd_jax.worlds.miniature import pairs
from fopd_jax.worlds.miniature.pairs import Renderings
from fopd_jax.worlds.miniature.prompts import VOCABULARY, task_of, tokenize
from fopd_jax.worlds.miniature.render import degrade, render
from fopd_jax.worlds.miniature.world import SIDE, make_world

WORLD = make_world()


WRONG = {"text": 0.35, "composition": 0.2}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What 64 pairs look like."""

    tasks: dict[str, Pairs]
    empty_caption: float


def make_pairs(spec: Spec, seed: int, step: int) -> dict[str, Any]:
    return _renderings(spec, seed).batch(step, np.arange(64))


def _renderings(spec: Spec, seed: int = 0) -> Renderings:
    return Renderings(WORLD.tasks, WORLD.encode, spec.tasks, 64, spec.empty_caption, seed)


def _spec(wrong_caption: float, degraded: float, empty_caption: float, **shares: float) -> Spec:
    shares = shares or {"text": 1.0, "composition": 1.0}
    return Spec({name: Pairs(share, wrong_caption, degraded) for name, share in shares.items()}, empty_caption)


MIXED = Spec({task: Pairs(1.0, share, 0.5) for task, share in WRONG.items()}, empty_caption=0.1)
CLEAN = _spec(wrong_caption=0.0, degraded=0.0, empty_caption=0.0)


class Spy:
    """Records which prompts are drawn and how many images are degraded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rendered: list[str] = []
        self.degraded = 0
        monkeypatch.setattr(pairs, "render", self._render)
        monkeypatch.setattr(pairs, "degrade", self._degrade)

    def _render(self, prompt: str, rng: np.random.Generator) -> np.ndarray:
        self.rendered.append(prompt)
        return render(prompt, rng)

    def _degrade(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        self.degraded += 1
        return degrade(image, rng)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def _tokens(conditioning: Conditioning) -> list[tuple[int, ...]]:
    """The token ids that the one-hot context stands for."""
    ids = conditioning.context[..., : len(VOCABULARY)].argmax(-1)
    return [tuple(row) for row in ids.tolist()]


def _ids(prompts: Any) -> list[tuple[int, ...]]:
    return [tuple(row) for row in tokenize(prompts).tolist()]


def _draw(spec: Spec, batches: int) -> list[tuple[int, ...]]:
    return [row for step in range(batches) for row in _tokens(make_pairs(spec, 0, step)["conditioning"])]


def _near(count: int, n: int, probability: float) -> bool:
    """Within four standard deviations of a binomial."""
    return abs(count - n * probability) <= 4 * math.sqrt(n * probability * (1 - probability))


def test_a_batch_is_what_the_network_trains_on():
    batch = make_pairs(MIXED, 0, 0)
    assert batch.keys() == {"x0", "conditioning"}
    assert batch["x0"].shape == (64, SIDE, SIDE, 3)
    assert batch["x0"].dtype == np.float32
    assert np.abs(batch["x0"]).max() <= 1
    assert batch["conditioning"].context.shape[0] == 64


def test_a_batch_depends_on_seed_and_step_alone():
    def flat(seed: int, step: int) -> np.ndarray:
        batch = make_pairs(MIXED, seed, step)
        conditioning = batch["conditioning"]
        return np.concatenate([leaf.ravel() for leaf in (batch["x0"], conditioning.context, conditioning.pooled)])

    first = flat(3, 5)
    others = [flat(3, 6), flat(4, 5), flat(5, 3)]
    np.testing.assert_array_equal(flat(3, 5), first)
    assert not any(np.array_equal(first, other) for other in others)


def test_clean_pairs_carry_the_caption_of_their_image(spy: Spy):
    captions = _draw(CLEAN, 4)
    assert captions == _ids(spy.rendered)
    assert spy.degraded == 0


def test_corruptions_come_as_often_as_asked(spy: Spy):
    captions = _draw(MIXED, 24)
    n, null = len(captions), (0,) * len(captions[0])
    assert _near(captions.count(null), n, 0.1)
    assert _near(spy.degraded, n, 0.5)
    rendered = list(zip(spy.rendered, _ids(spy.rendered), captions, strict=True))
    for task, share in WRONG.items():
        wrong = [caption != ids for prompt, ids, caption in rendered if caption != null and task_of(prompt) == task]
        assert _near(sum(wrong), len(wrong), share)


def test_a_wrong_caption_belongs_to_the_same_task(spy: Spy):
    captions = _draw(_spec(wrong_caption=1.0, degraded=0.0, empty_caption=0.0), 4)
    sign = VOCABULARY.index("sign")
    assert [sign in caption for caption in captions] == [sign in ids for ids in _ids(spy.rendered)]


@pytest.mark.parametrize(("shares", "share"), [({"text": 3.0, "composition": 1.0}, 0.75), ({"composition": 2.0}, 0.0)])
def test_tasks_come_by_their_shares(spy: Spy, shares: dict[str, float], share: float):
    _draw(_spec(0.0, 0.0, 0.0, **shares), 8)
    assert _near(sum(prompt.startswith("sign") for prompt in spy.rendered), len(spy.rendered), share)


def test_no_held_out_prompt_is_ever_drawn_or_named(spy: Spy):
    captions = _draw(MIXED, 40)
    train = {prompt for task in WORLD.tasks.values() for prompt in task.train}
    test = {prompt for task in WORLD.tasks.values() for prompt in task.test}
    allowed, held_out = set(_ids([*train, ""])), set(_ids(list(test)))
    assert not allowed & held_out
    assert set(spy.rendered) <= train
    assert set(captions) <= allowed
    assert len(set(spy.rendered)) > len(train) / 2  # enough were drawn for this to mean something


def test_corruption_is_each_tasks_own(spy: Spy):
    tasks = {"text": Pairs(1.0, 0.0, 0.0), "composition": Pairs(1.0, 1.0, 1.0)}
    captions = _draw(Spec(tasks, 0.0), 4)
    signs = [prompt.startswith("sign") for prompt in spy.rendered]
    right = [caption == ids for caption, ids in zip(captions, _ids(spy.rendered), strict=True)]
    assert all(ok for ok, sign in zip(right, signs, strict=True) if sign)
    assert sum(ok for ok, sign in zip(right, signs, strict=True) if not sign) <= 3  # the same prompt drawn twice
    assert spy.degraded == signs.count(False)


def test_shares_that_are_all_zero_are_refused():
    with pytest.raises(ValueError, match="share above 0"):
        _renderings(_spec(0.0, 0.0, 0.0, text=0.0))


def test_the_miniature_reads_no_images():
    with pytest.raises(ValueError, match=r"^tasks\.text\.images: found 'photos', expected ''"):
        _renderings(Spec({"text": Pairs(images="photos")}, 0.0))


def test_rows_are_those_of_the_whole_batch():
    whole = make_pairs(MIXED, 3, 5)
    rows = np.asarray([1, 17, 63])
    part = _renderings(MIXED, 3).batch(5, rows)
    np.testing.assert_array_equal(part["x0"], whole["x0"][rows])
    np.testing.assert_array_equal(part["conditioning"].context, whole["conditioning"].context[rows])
    np.testing.assert_array_equal(part["conditioning"].pooled, whole["conditioning"].pooled[rows])


def test_rows_are_told_in_words():
    rows = [0, 17, 40]
    found = [line.partition(": ") for line in _renderings(MIXED, 3).describe(5, rows)]
    assert {name for name, _, _ in found} <= set(MIXED.tasks)
    captions = [caption.strip("'\"") if "sign" not in caption else caption[1:-1] for _, _, caption in found]
    assert _ids(captions) == [_tokens(make_pairs(MIXED, 3, 5)["conditioning"])[row] for row in rows]
