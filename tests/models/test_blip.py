"""BLIP against transformers on random weights: towers, answers and ImageReward's score."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BlipForQuestionAnswering

from fopd_jax.interop.scorers.blip import convert
from fopd_jax.models.blip import BLIPVQA, BLIPConfig, BLIPTextConfig, BLIPVision, BLIPVisionConfig, ImageReward
from tests.interop.scorers.blip_oracle import START, image_reward_file, make_config, make_vqa, tensors_of

TOLERANCE = 1e-4
LENGTHS = (7, 4, 1)


@pytest.fixture(scope="module")
def case():
    config = make_config()
    model = make_vqa(config)
    shape, tree = convert(tensors_of(model), config.to_dict())
    ours = BLIPConfig(BLIPVisionConfig(**shape["vision"]), BLIPTextConfig(**shape["text"]))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    ids = rng.integers(4, START, (3, 7))
    mask = np.arange(7) < np.array(LENGTHS)[:, None]
    return model, ours, tree, *map(jnp.asarray, (images, ids, mask))


def _states(model, images, ids, lengths):
    """transformers' picture's and question's states, one text at a time, so that nothing is padded."""
    seen = model.vision_model(torch.tensor(np.asarray(images)).permute(0, 3, 1, 2))[0]
    for row, length in enumerate(lengths):
        text = torch.tensor(np.asarray(ids)[row : row + 1, :length])
        yield text, model.text_encoder(input_ids=text, encoder_hidden_states=seen[row : row + 1])[0]


def test_a_picture_has_the_same_states(case):
    model, ours, tree, images, *_ = case
    with torch.no_grad():
        expected = model.vision_model(torch.tensor(np.asarray(images)).permute(0, 3, 1, 2))[0].numpy()
    found = BLIPVision(ours.vision).apply({"params": tree["vision"]}, images)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_an_answer_has_the_same_probabilities_padded_or_not(case):
    model, ours, tree, images, ids, mask = case
    expected = []
    with torch.no_grad():
        for _, question in _states(model, images, ids, LENGTHS):
            decoded = model.text_decoder(
                input_ids=torch.full((1, 1), START), encoder_hidden_states=question, return_logits=False
            )
            expected.append(torch.log_softmax(decoded.logits[:, 0], -1).numpy())
    apply = jax.jit(lambda params, *inputs: BLIPVQA(ours).apply({"params": params}, *inputs, START))
    found = apply(tree, images, ids[:, None], mask[:, None])
    np.testing.assert_allclose(found[:, 0], np.concatenate(expected), atol=TOLERANCE)


def test_a_reward_is_the_heads_value_of_the_first_state(case):
    model, ours, _, images, ids, mask = case
    file = image_reward_file(tensors_of(model))
    _, tree = convert(file, None)
    with torch.no_grad():
        first = np.concatenate([states[:, 0].numpy() for _, states in _states(model, images, ids, LENGTHS)])
    expected = first.astype(float)
    for i in (0, 2, 4, 6, 7):
        expected = expected @ file[f"mlp.layers.{i}.weight"].astype(float).T + file[f"mlp.layers.{i}.bias"]
    found = ImageReward(ours).apply({"params": tree}, images, ids, mask)
    np.testing.assert_allclose(found, expected[:, 0], atol=TOLERANCE)


def test_sizes_that_do_not_fit_are_refused(case):
    _, ours, tree, images, *_ = case
    with pytest.raises(ValueError, match=r"pictures of \(24, 32\) pixels, expected 32 a side"):
        BLIPVision(ours.vision).apply({"params": tree["vision"]}, images[:, :24])
    ids = jnp.zeros((3, 2, 41), int)
    with pytest.raises(ValueError, match="texts of 41 tokens exceed the 40 positions"):
        BLIPVQA(ours).apply({"params": tree}, images, ids, ids == 0, START)


def test_bfloat16_is_near(case):
    _, ours, tree, images, ids, mask = case
    exact, near = (
        BLIPVQA(ours, dtype).apply({"params": tree}, images.astype(dtype), ids[:, None], mask[:, None], START)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert near.dtype == np.float32
    np.testing.assert_allclose(near, exact, atol=0.1)
    assert dataclasses.asdict(ours)["text"]["vocab_size"] == near.shape[2]


@pytest.mark.slow
def test_the_published_size_answers_alike():
    """ViT-B/16 at 480 px and BERT-base twice, 385 M parameters; about 6 GB and a minute."""
    towers = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    config = make_config(
        vision=towers | {"image_size": 480, "patch_size": 16},
        text=towers | {"vocab_size": 30524, "encoder_hidden_size": 768, "max_position_embeddings": 512},
    )
    torch.manual_seed(0)
    model = BlipForQuestionAnswering(config).eval()
    shape, tree = convert(tensors_of(model), config.to_dict())
    ours = BLIPConfig(BLIPVisionConfig(**shape["vision"]), BLIPTextConfig(**shape["text"]))
    rng = np.random.default_rng(0)
    images, ids = rng.normal(size=(1, 480, 480, 3)).astype(np.float32), rng.integers(4, START, (1, 9))
    with torch.no_grad():
        [(_, states)] = _states(model, images, ids, (9,))
        decoded = model.text_decoder(
            input_ids=torch.full((1, 1), START), encoder_hidden_states=states, return_logits=False
        )
        expected = torch.log_softmax(decoded.logits[:, 0], -1).numpy()
    inputs = map(jnp.asarray, (images, ids[:, None], np.ones((1, 1, 9), bool)))
    found = BLIPVQA(ours).apply({"params": tree}, *inputs, START)
    np.testing.assert_allclose(found[:, 0], expected, atol=TOLERANCE)
