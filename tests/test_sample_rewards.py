"""Sampling with rewards: scores in the images, beside them and on the console; failures told as such."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fopd_jax.evaluation.sample_scores import MOST_ROWS, format_scores
from fopd_jax.worlds.miniature.rewards import make_rewards
from fopd_jax.worlds.miniature.world import make_world
from tests import test_sample
from tests.test_sample import PROMPTS, Run, _flags, _pixels, _said, _text

pytestmark = test_sample.pytestmark
small_network, weights, run = test_sample.small_network, test_sample.weights, test_sample.run


def fails_on_squares(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
    """A reward by its import path."""
    return [np.nan if "squares" in prompt else float(len(prompt)) for prompt in prompts]


MINE = f"--config.rewards.mine.kind={__name__}:fails_on_squares"


def _rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]


def test_given_prompts_are_scored_by_the_named_rewards(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """More images than a batch holds."""
    images = run(tmp_path, *_flags(*PROMPTS[1:]), "--images-per-prompt=3", MINE, "--rewards=composition,mine")
    rows, readers = _rows(tmp_path), make_rewards()
    assert [row["file"] for row in rows] == [path.name for path in images]
    for row, path in zip(rows, images, strict=True):
        assert (row["prompt"], row["seed"], row["policy"]) == (_text(path)["prompt"], int(_text(path)["seed"]), "base")
        assert json.loads(_text(path)["scores"]) == row["scores"]
        pixels = _pixels(path)[None].astype(np.uint8)  # what was scored is what was written
        expected = readers["composition"].score(pixels, [row["prompt"]], [{}])
        assert row["scores"]["composition"] == {"value": expected.values[0], "details": expected.details[0]}
        failed = {"failed": "the value is nan", "details": {}}
        assert row["scores"]["mine"] == (failed if "squares" in row["prompt"] else {"value": 18.0, "details": {}})
    head, *body, mean = capsys.readouterr().out.splitlines()[-8:]
    assert head.split() == ["file", "prompt", "composition", "mine"]
    assert body[0].endswith("failed: the value is nan")
    assert body[-1].endswith("18")
    assert re.fullmatch(r"mean +base +[\d.e-]+ +18 \(3 failed\)", mean)


def test_images_of_tasks_are_scored_by_their_own_rewards(run: Run, weights: Path, tmp_path: Path):
    flags = ["--config.tasks.text.rewards={'text': 1.0, 'quality': 0.0}", f"--adapter={weights}/adapter.safetensors"]
    run(tmp_path, *flags, num_steps=1, guidance=1.0)
    rows, prompts = _rows(tmp_path), make_world().tasks["text"].test[:4]
    assert [(row["prompt"], row["scores"].keys()) for row in rows] == [(p, {"text", "quality"}) for p in prompts]
    assert rows[0]["scores"]["text"]["details"].keys() == {"read"}
    # Beside them those of a task without rewards, and in the same folder again without any: what was found is gone.
    assert [("scores" in _text(path)) for path in sorted(tmp_path.glob("[0-9]*.png"))] == [True] * 4 + [False] * 4
    run(tmp_path, *_flags(PROMPTS[0]), num_steps=1, guidance=1.0)
    assert not (tmp_path / "scores.jsonl").exists()
    assert "scores" not in _text(tmp_path / "00000.png")


def test_two_policies_have_their_means_each(
    run: Run, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    adapters = [f"--adapter={weights}/adapter.safetensors", "--adapter="]
    run(tmp_path, *_flags(PROMPTS[0]), *adapters, "--rewards=quality", num_steps=1, guidance=1.0)
    assert [(row["file"], row["policy"]) for row in _rows(tmp_path)] == [
        ("00000_base.png", "base"), ("00000_adapter.png", "adapter"),
    ]  # fmt: skip
    assert re.findall(r"^mean +(\w+)", capsys.readouterr().out, re.M) == ["base", "adapter"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewards=qualty"], "error: rewards.qualty.kind: no reward 'qualty'; did you mean 'quality'? there are "),
        (["--rewards=text", f"--prompt={PROMPTS[1]}"], "error: rewards.text: OCR prompt 'two red squares and one red "),
        (["--config.rewards.txt.divide_by=2"], "error: rewards.txt: no task names this reward; did you mean 'text'?"),
        (["--config.run.servers.quality.urls=http://a", "--config.rewards.x.divide_by=2", "--rewards=quality"],
         "error: rewards.x: no task names this reward; "),
    ],
)  # fmt: skip
def test_wrong_rewards_are_one_line_before_anything_is_drawn(
    run: Run, tmp_path: Path, arguments: list[str], message: str
):
    (said,) = _said(lambda: run(tmp_path / "out", *arguments))
    assert said.startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_file_of_that_name_that_sampling_has_not_made_is_kept(run: Run, tmp_path: Path):
    for text in ("mine\n", "[1]\n", '{"a": 1}\n'):
        (tmp_path / "scores.jsonl").write_text(text)
        (said,) = _said(lambda: run(tmp_path, *_flags(PROMPTS[0])))
        assert said.startswith(f"error: out: {tmp_path} holds scores.jsonl, which sampling has not made: ")
        assert (tmp_path / "scores.jsonl").read_text() == text


def test_a_long_table_shows_the_first_images_and_all_means():
    rows = [
        {"file": f"{i}.png", "policy": "a", "prompt": "p\nq" * 40, "scores": {"x": {"value": i, "details": {}}}}
        for i in range(MOST_ROWS + 5)
    ]
    head, *body, more, mean = format_scores(rows).splitlines()
    assert head.split() == ["file", "prompt", "x"]
    assert len(body) == MOST_ROWS
    assert all(len(line) < 80 for line in body)
    assert more == "… and 5 more"
    assert mean.split() == ["mean", "a", "22"]
