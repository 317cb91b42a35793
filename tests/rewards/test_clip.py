"""Embeddings against transformers' CLIPModel behind its own processor and tokenizer: entries of unit vectors, 1e-4."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fopd_jax.interop.scorers.weights import load_weights, save_weights
from fopd_jax.rewards.clip import Clip, load_clip
from tests.interop.scorers.clip_oracle import SmallClip, convert_small

TOLERANCE = 1e-4
TEXTS = ["a photo of the cat", "the red dog's photo", "", "the cat of the dog " * 9, "a", "é, 日本 5!", "the cat"]
FIELD = "rewards.pick.weights"


@pytest.fixture(scope="module")
def small_clip(load_script: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> SmallClip:
    return convert_small(tmp_path_factory.mktemp("clip"), load_script("tools/convert_reward_weights.py"))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Of several sizes, two of them alike."""
    random = np.random.default_rng(0)
    sizes = [(30, 41), (64, 64), (28, 28), (100, 90), (64, 64), (12, 20), (65, 64)]
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture(scope="module")
def theirs(small_clip: SmallClip) -> SimpleNamespace:
    size = 28
    return SimpleNamespace(
        model=transformers.CLIPModel.from_pretrained(small_clip.source).eval(),
        processor=CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(str(small_clip.source), model_max_length=20),
    )


@pytest.fixture(scope="module")
def clip(small_clip: SmallClip) -> Clip:
    return load_clip(small_clip.converted, FIELD)


def expected(theirs: SimpleNamespace, pictures: list[np.ndarray], padding: str | bool) -> Any:
    inputs = theirs.tokenizer(TEXTS, padding=padding, truncation=True, max_length=20, return_tensors="pt")
    pixels = theirs.processor([Image.fromarray(each) for each in pictures], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return theirs.model(pixel_values=pixels, **inputs)


def check(found: np.ndarray, right: torch.Tensor, label: str) -> None:
    error = float(np.abs(found - right.numpy()).max())
    print(f"{label}: {error:.1e}")
    assert error <= TOLERANCE, label
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("padding", ["max_length", True])
def test_as_transformers(theirs: SimpleNamespace, clip: Clip, pictures: list[np.ndarray], padding: str | bool) -> None:
    """Padded to the tower's length or to the longest text, as CLIPScore and PickScore do: the same."""
    right = expected(theirs, pictures, padding)
    images, texts = clip.embed_images(pictures), clip.embed_texts(TEXTS)
    check(images, right.image_embeds, "images")
    check(texts, right.text_embeds, "texts")
    np.testing.assert_allclose(clip.logit_scale * images @ texts.T, right.logits_per_image, atol=100 * TOLERANCE)
    assert clip.dim == 24


def test_padding_does_not_matter(clip: Clip) -> None:
    """Whatever ids follow the end of a text, which open_clip fills with 0 and others with the end mark."""
    ids, _ = clip.tokenize(["a photo of the cat"])
    end = int(np.argmax(ids[0]))
    found = [np.asarray(clip._towers.read(ids))]
    for other in (0, 77, ids[0, end]):
        changed = ids.copy()
        changed[0, end + 1 :] = other
        found.append(np.asarray(clip._towers.read(changed)))
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])
    np.testing.assert_allclose(np.asarray(clip._towers.read(ids[:, : end + 1])), found[0], atol=1e-6)


def test_long_texts_are_cut_and_told_once(small_clip: SmallClip, theirs: SimpleNamespace, capsys: Any) -> None:
    clip = load_clip(small_clip.converted, FIELD)
    ids, cut = clip.tokenize(TEXTS)
    right = theirs.tokenizer(TEXTS, padding="max_length", truncation=True, max_length=20)["input_ids"]
    assert ids.tolist() == right
    whole = [len(each) for each in theirs.tokenizer(TEXTS)["input_ids"]]
    assert cut.tolist() == [max(length - 20, 0) for length in whole]
    assert np.count_nonzero(cut) == 1
    for _ in range(2):
        clip.embed_texts(TEXTS)
    told = "1 of 7 texts have more than 20 tokens and are cut there, as published scorers do (told once)"
    assert capsys.readouterr().out == f"{FIELD}: {told}\n"


def test_nothing_to_embed(clip: Clip) -> None:
    assert clip.embed_images([]).shape == clip.embed_texts([]).shape == (0, 24)


def test_bfloat16_stays_near(small_clip: SmallClip, clip: Clip, pictures: list[np.ndarray]) -> None:
    """Three layers of about eight roundings of 2⁻⁹ each, as a random walk, of entries of about 1/5."""
    rough = load_clip(small_clip.converted, FIELD, dtype="bfloat16")
    for found, right in (
        (rough.embed_images(pictures), clip.embed_images(pictures)),
        (rough.embed_texts(TEXTS), clip.embed_texts(TEXTS)),
    ):
        assert found.dtype == np.float32
        assert 1e-4 < np.abs(found - right).max() < 0.03


def test_scorers_share_one_files_towers(small_clip: SmallClip, clip: Clip) -> None:
    other = load_clip(small_clip.converted, "rewards.other.weights")
    assert other._towers is clip._towers
    assert load_clip(small_clip.converted, FIELD, dtype="bfloat16")._towers is not clip._towers


def test_a_file_without_words(small_clip: SmallClip, tmp_path: Path, pictures: list[np.ndarray]) -> None:
    shape, params = load_weights(small_clip.converted, "clip", "")
    del shape["merges"]
    save_weights(tmp_path / "mute.safetensors", "clip", shape, params, {})
    mute = load_clip(tmp_path / "mute.safetensors", FIELD)
    assert mute.embed_images(pictures[:1]).shape == (1, 24)
    with pytest.raises(ValueError, match=f"^{FIELD}: its file holds no tokenizer; convert again with tools/"):
        mute.embed_texts(["a"])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{FIELD}: .*no such file.*tools/convert_reward_weights.py makes it"):
        load_clip(tmp_path / "no.safetensors", FIELD)
