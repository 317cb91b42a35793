"""BLIP's rewards: preprocessing and words as the published programs have them, and values as their networks give."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer

from fopd_jax.config.schema import RewardConfig
from fopd_jax.interop.scorers.blip import add_tokenizer, convert, read_vocabulary
from fopd_jax.interop.scorers.weights import save_weights
from fopd_jax.models.clip_vision import PIXEL_MEAN, PIXEL_STD
from fopd_jax.rewards.blip_scores import REWARD_MEAN, REWARD_STD, Words, make, questions
from fopd_jax.rewards.reward import Reward
from tests.interop.scorers.blip_oracle import image_reward_file, make_config, make_vqa, own_names, tensors_of

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "yes", "no", "a", "red", "blue", "cat", "dog", "bench", "the", "is", "there",
    "and", "##s", "##y", "?", ",", ".", "##er", "two",
]  # fmt: skip
PROMPTS = ["A red cat, and two dogs.", "Thé bluer bench"]
SIZE, START = 32, len(WORDS)  # [DEC] follows
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model():
    return make_vqa(make_config(text={"vocab_size": len(WORDS) + 2, "bos_token_id": START}))


def _written(folder: Path, tensors, vocabulary: Path, config=None) -> RewardConfig:
    shape, tree = convert(tensors, config)
    path = folder / f"{shape['kind']}.safetensors"
    save_weights(path, "blip", add_tokenizer(shape, vocabulary), tree, {})
    return RewardConfig(weights=str(path))


def _images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 48, 60, 3), dtype=np.uint8)


def _normalised(pictures: list[Image.Image]) -> torch.Tensor:
    pixels = np.stack([np.asarray(picture, np.float32) / 255 for picture in pictures])
    return torch.tensor((pixels - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)).permute(0, 3, 1, 2)


def _encoded(tokenizer: BertTokenizer, texts, first: str = "[CLS]"):
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=35)["input_ids"]
        yield torch.tensor([[tokenizer.convert_tokens_to_ids(first) if first == "[CLS]" else START + 1, *ids[1:]]])


def _check_within(reward: Reward, images: np.ndarray, prompts, metadata, expected) -> None:
    """The same values within a program, up to rounding."""
    assert reward.traced is not None
    rows = reward.traced.prepare(prompts, metadata)
    found = jax.jit(reward.traced.score)(reward.traced.params(), images, rows)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_words_are_berts(vocabulary: Path):
    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=True)
    texts = [*PROMPTS, "", "unheard of: CATS", "cat " * 50]
    ids, mask = Words(read_vocabulary(vocabulary), marked=False)(texts)
    for row, text in enumerate(texts):
        expected = tokenizer(text, truncation=True, max_length=35)["input_ids"]
        assert ids[row, mask[row]].tolist() == expected
        assert not ids[row, ~mask[row]].any()
    marked, _ = Words(read_vocabulary(vocabulary), marked=True)(texts)
    assert set(marked[:, 0]) == {START + 1}
    np.testing.assert_array_equal(marked[:, 1:], ids[:, 1:])


def test_image_reward_is_the_published_programs(tmp_path: Path, model, vocabulary: Path):
    file = image_reward_file(tensors_of(model))
    settings, images, prompts = _written(tmp_path, file, vocabulary), _images(), [*PROMPTS, "dog"]
    reward = make("imagereward", settings, None)
    found = reward.score(images, prompts, [{}] * 3)
    # the shorter side of 48 to 32, and the middle 32 of the longer one's 40
    pictures = [Image.fromarray(image).resize((40, SIZE), Image.Resampling.BICUBIC) for image in images]
    pixels = _normalised([picture.crop((4, 0, 36, SIZE)) for picture in pictures])
    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=True)
    model.vision_model.post_layernorm.eps = 1e-6
    for layer in model.vision_model.encoder.layers:
        layer.layer_norm1.eps = layer.layer_norm2.eps = 1e-6
    with torch.no_grad():
        seen = model.vision_model(pixels)[0]
        states = [
            model.text_encoder(input_ids=ids, encoder_hidden_states=seen[row : row + 1])[0][0, 0].numpy()
            for row, ids in enumerate(_encoded(tokenizer, prompts))
        ]
    values = np.stack(states).astype(float)
    for i in (0, 2, 4, 6, 7):
        values = values @ file[f"mlp.layers.{i}.weight"].astype(float).T + file[f"mlp.layers.{i}.bias"]
    np.testing.assert_allclose(found.values, (values[:, 0] - REWARD_MEAN) / REWARD_STD, atol=TOLERANCE)
    assert not found.failed.any()
    assert (reward.limits, reward.runs) == ((None, None), "device")
    _check_within(reward, _images(len(prompts)), prompts, [{}] * len(prompts), found.values)


@pytest.mark.parametrize("layout", ["transformers", "own"])
def test_vqa_is_the_product_over_questions(tmp_path: Path, vocabulary: Path, layout: str):
    config = make_config(text={"vocab_size": len(WORDS) + 2, "bos_token_id": START}, vision={"layer_norm_eps": 1e-6})
    model = make_vqa(config)
    tensors = tensors_of(model)
    tensors, config = (tensors, config.to_dict()) if layout == "transformers" else (own_names(tensors), None)
    settings = _written(tmp_path, tensors, vocabulary, config)
    reward = make("vqa", dataclasses.replace(settings, kind="blip_vqa"), None)
    images, asked = _images(2), ["a red cat?", "two dogs?"]
    found = reward.score(images, PROMPTS, [{"questions": asked}, {}])
    assert [each["questions"] for each in found.details] == [asked, ["Thé bluer bench?"]]
    pixels = _normalised([Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images])
    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=True)
    first = "[CLS]" if layout == "transformers" else "[ENC]"
    for row, details in enumerate(found.details):
        expected = []
        with torch.no_grad():
            seen = model.vision_model(pixels[row : row + 1])[0]
            for ids in _encoded(tokenizer, details["questions"], first):
                states = model.text_encoder(input_ids=ids, encoder_hidden_states=seen)[0]
                logits = model.text_decoder(
                    input_ids=torch.full((1, 1), START), encoder_hidden_states=states, return_logits=False
                ).logits
                expected.append(float(torch.softmax(logits[0, 0], -1)[WORDS.index("yes")]))
        np.testing.assert_allclose(details["yes"], expected, atol=TOLERANCE)
        np.testing.assert_allclose(found.values[row], np.prod(expected), atol=TOLERANCE)
    about = [{"questions": []}, {"questions": "none"}, {"questions": ["is it?"] * 9}, {"questions": asked}]
    expected = [1.0, np.nan, np.nan, found.values[0]]
    _check_within(reward, images[[1, 1, 1, 0]], ["a cat"] * 4, about, expected)


def test_questions_that_are_none_are_refused():
    assert questions("a cat.", {}) == ["a cat?"]
    assert questions("a cat", {"questions": []}) == []
    for wrong in ("is it?", [1], ["", "is it?"]):
        with pytest.raises(ValueError, match=r"prompt 'a cat': found questions .*, expected a list of texts"):
            questions("a cat", {"questions": wrong})


def test_wrong_settings_are_refused_by_field(tmp_path: Path, model, vocabulary: Path):
    settings = _written(tmp_path, image_reward_file(tensors_of(model)), vocabulary)
    cases = {
        r"rewards\.x\.weights: found nothing, expected a converted BLIP: tools/convert_reward": {"weights": ""},
        r"rewards\.x\.weights: .*none: no such file; tools/convert_reward_weights\.py makes it": {"weights": "none"},
        r"rewards\.x\.weights: .*: found BLIP for imagereward, expected vqa": {"kind": "blip_vqa"},
        r"rewards\.x\.options\.questions: found 0, expected 1 to": {"options": {"questions": 0}},
        r"rewards\.x\.options\.dtype: found 'int8', expected one of float32, bfloat16": {"options": {"dtype": "int8"}},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            make("x", dataclasses.replace(settings, **{"kind": "imagereward", **change}), None)
