"""Monitors of pictures whose numbers are known in closed form, and when they raise an alarm."""

import json
import math

import numpy as np
import pytest

from fopd_jax.rewards.monitors import (
    BANDS,
    Band,
    Watch,
    colour_entropy,
    dark_share,
    diversity,
    edge_density,
    extra_text,
    monitor,
    pixel_features,
)

SIDE = 64


def plain(*colour: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), colour, np.uint8)


def checkerboard(cell: int, dark: int = 0, bright: int = 255) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE] // cell
    return np.where((x + y) % 2 == 0, dark, bright).astype(np.uint8)[..., None].repeat(3, -1)


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def ramp(slope: int) -> np.ndarray:
    """Brightness rises by `slope` of 255 a pixel."""
    return np.clip(np.arange(SIDE) * slope, 0, 255).astype(np.uint8)[None, :, None].repeat(SIDE, 0).repeat(3, -1)


def stack(*images: np.ndarray) -> np.ndarray:
    return np.stack(images)


def test_dark_share():
    halves = plain(255, 255, 255)
    halves[:, : SIDE // 4] = 0
    images = stack(plain(0, 0, 0), plain(255, 255, 255), halves, checkerboard(8), plain(38, 38, 38), plain(39, 39, 39))
    np.testing.assert_array_equal(dark_share(images), [1, 0, 0.25, 0.5, 1, 0])  # .15 of 255 is 38.25
    colours = stack(plain(0, 0, 255), plain(255, 0, 0), plain(0, 64, 0), plain(0, 66, 0))
    np.testing.assert_array_equal(dark_share(colours), [1, 0, 1, 0])  # blue counts .114, green .587


def stripes(width: int, bright: int = 255) -> np.ndarray:
    return (
        np.where(np.arange(SIDE) // width % 2, bright, 0).astype(np.uint8)[None, :, None].repeat(SIDE, 0).repeat(3, -1)
    )


def test_edge_density():
    """Two pixels beside every step have half its height as slope; a ramp has its own."""
    assert edge_density(stack(plain(90, 10, 200)))[0] == 0
    assert edge_density(stack(stripes(8)))[0] == 7 * 2 / SIDE
    assert edge_density(stack(stripes(8).transpose(1, 0, 2)))[0] == 7 * 2 / SIDE
    assert edge_density(stack(stripes(8, 50)))[0] == 0  # a step of .196, so slopes of .098
    assert edge_density(stack(stripes(8, 52)))[0] == 7 * 2 / SIDE
    assert edge_density(stack(stripes(1)))[0] == 2 / SIDE  # neighbours on both sides are the same, but at the borders
    assert edge_density(stack(ramp(20)))[0] == 0  # .078 a pixel
    assert edge_density(stack(ramp(30)))[0] == 7 / SIDE  # .118; 0, 30, … 240, 255: less at both ends


def test_edges_are_sobels():
    grey = noise()[..., :1].repeat(3, -1)
    padded = np.pad(grey[..., 0] / 255, 1, mode="edge")
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    slopes = np.hypot((windows * kernel).sum((2, 3)), (windows * kernel.T).sum((2, 3)))
    assert edge_density(stack(grey))[0] == (slopes > 0.1).mean()


def test_colour_entropy():
    images = stack(plain(7, 99, 200), checkerboard(4), checkerboard(4, 0, 31), checkerboard(4, 31, 32), noise())
    found = colour_entropy(images)
    np.testing.assert_allclose(found[:4], [0, 1, 0, 1], atol=1e-12)  # levels of 32
    bias = (512 - 1) / (2 * SIDE**2 * math.log(2))  # of the plug-in estimate, Miller and Madow
    assert found[4] == pytest.approx(9 - bias, abs=0.01)
    assert str(colour_entropy(stack(plain(0, 0, 0)))[0]) == "0.0"


def test_extra_text():
    details = [
        {"read": "hello world", "target": "hello"}, {"read": "he llo", "target": "hello"}, {"read": "", "target": "a"},
        {"read": "hel", "target": "hello"}, {"error": "TimeoutError"}, {"objects": 3},
    ]  # fmt: skip
    np.testing.assert_array_equal(extra_text(details), [0.5, 0, 0])
    assert len(extra_text([])) == 0


def test_diversity_is_the_mean_distance_within_groups():
    rng = np.random.default_rng(0)
    features, groups = rng.normal(size=(9, 5)), np.array([4, 4, 4, 1, 1, 9, 4, 1, 1])
    expected = []
    for group in (1, 4):
        rows = [features[i] for i in range(9) if groups[i] == group]
        pairs = [math.dist(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
        expected.append(sum(pairs) / len(pairs))
    np.testing.assert_allclose(diversity(features, groups), expected, rtol=1e-12)  # the group of one is left out
    features[0] = np.nan
    assert np.isfinite(diversity(features, groups)).all()
    assert len(diversity(features[:1], groups[:1])) == 0


def test_pixel_features_are_as_far_apart_as_the_pictures():
    images = stack(plain(0, 0, 0), plain(255, 255, 255), plain(51, 51, 51), checkerboard(SIDE // 16))
    rows = pixel_features(images)
    assert rows.shape == (4, 768)
    distances = [np.linalg.norm(rows[i] - rows[0]) for i in (1, 2, 3)]
    np.testing.assert_allclose(distances, [1, 0.2, math.sqrt(0.5)], rtol=1e-6)
    assert pixel_features(np.zeros((2, 24, 20, 3), np.uint8)).shape == (2, 768)


def test_features_count_by_their_direction():
    """Opposite directions are 2 apart, orthogonal ones √2, whatever their lengths."""
    images, groups = stack(noise(0), noise(1)), np.zeros(2, int)
    opposite, square = np.array([[3.0, 0], [-0.1, 0]]), np.array([[3.0, 0], [0, 5]])
    assert monitor(images, groups, features=opposite)["monitors/diversity"] == pytest.approx(2)
    assert monitor(images, groups, features=square)["monitors/diversity"] == pytest.approx(math.sqrt(2))


def test_a_monitor_that_cannot_be_taken_is_left_out():
    images = stack(noise(0), noise(1))
    alone = monitor(images, np.array([0, 1]))
    assert alone.keys() == {"monitors/dark_share", "monitors/edge_density", "monitors/colour_entropy"}
    both = monitor(images, np.zeros(2, int), [{"read": "abcd", "target": "ab"}, {"error": "x"}])
    assert both.keys() == set(BANDS)
    assert both["monitors/extra_text"] == 0.5
    twice = monitor(stack(noise(0), noise(0)), np.zeros(2, int))
    assert twice["monitors/diversity"] == 0.0


# ---- alarms


def watched(*updates: dict[str, float], watch: Watch | None = None) -> tuple[Watch, list[dict[str, str]]]:
    watch, told = watch or Watch(updates=2), []
    for values in updates:
        watch, words = watch.see({f"monitors/{name}": value for name, value in values.items()})
        told.append(words)
    return watch, told


def test_the_published_case_raises_alarms():
    """UniRL's OCR run: dark pixels .451 to .926, edges .01183 to .00479; entropy 4.037 to 1.849 bits is none."""
    begin = {"dark_share": 0.451, "edge_density": 0.01183, "colour_entropy": 4.037}
    end = {"dark_share": 0.926, "edge_density": 0.00479, "colour_entropy": 1.849}
    _, told = watched(begin, begin, begin, end)
    assert told[:3] == [{}, {}, {}]
    assert told[3] == {
        "monitors/dark_share": "monitors/dark_share is 0.926, expected 0 … 0.902: it began at 0.451, "
        "the mean of 2 updates",
        "monitors/edge_density": "monitors/edge_density is 0.00479, expected 0.005915 … 0.15: it began at 0.01183, "
        "the mean of 2 updates",
    }


def test_a_collapse_of_modes_and_a_burst_of_noise_raise_alarms():
    begin = {"diversity": 0.8, "edge_density": 0.06, "dark_share": 0.01}
    _, told = watched(
        begin, begin, {"diversity": 0.39}, {"edge_density": 0.5}, {"dark_share": 0.19}, {"dark_share": 0.21}
    )
    assert [sorted(each) for each in told[2:]] == [
        ["monitors/diversity"], ["monitors/edge_density"], [], ["monitors/dark_share"],
    ]  # fmt: skip


def test_the_first_updates_are_the_baseline_and_stay_it():
    _, told = watched(*[{"colour_entropy": value} for value in (4.0, 6.0, 2.1, 1.9, 1.9, 5.0)])
    assert [len(each) for each in told] == [0, 0, 0, 1, 1, 0]


def test_absolute_bands_need_no_baseline():
    _, told = watched({"extra_text": 0.4}, {"extra_text": 0.6})
    assert [list(each) for each in told] == [[], ["monitors/extra_text"]]
    assert told[1]["monitors/extra_text"] == "monitors/extra_text is 0.6, expected 0 … 0.5"


def test_a_watch_outlives_a_restart_and_is_never_changed():
    first, _ = watched({"diversity": 0.8})
    kept = json.loads(json.dumps(first.sums))
    resumed = Watch(updates=2, sums=kept)
    values = {"diversity": 0.6}
    assert dict(watched(values, watch=first)[0].sums) == dict(watched(values, watch=resumed)[0].sums)
    assert first.sums == {"monitors/diversity": [0.8, 1.0]}
    told = watched(values, {"diversity": 0.3}, watch=resumed)[1]
    assert told[1]["monitors/diversity"].endswith("it began at 0.7, the mean of 2 updates")


def test_bands_are_of_the_monitors_that_there_are():
    watch = Watch(bands={"monitors/dark_share": Band(high=0.5, absolute=True)})
    assert watch.see({"monitors/dark_share": 0.6, "loss": 9.0})[1].keys() == {"monitors/dark_share"}
