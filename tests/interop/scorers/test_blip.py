"""Conversion of BLIP's published layouts: the same network out of each, and one clear error where a file is not one."""

import jax
import numpy as np
import pytest

from fopd_jax.interop.scorers.blip import convert, fold, read_vocabulary, recognises
from tests.interop.scorers.blip_oracle import image_reward_file, make_config, make_vqa, own_names, tensors_of


@pytest.fixture(scope="module")
def config():
    return make_config()  # of 64 a head, as files without configuration are taken to have


@pytest.fixture(scope="module")
def tensors(config):
    return tensors_of(make_vqa(config))


def test_every_layout_is_recognised_and_gives_the_same_parameters(config, tensors):
    own, reward = own_names(tensors), image_reward_file(tensors)
    assert all(recognises(each) for each in (tensors, own, reward))
    assert not recognises({"text_model.embeddings.token_embedding.weight": 0})
    shape, tree = convert(tensors, config.to_dict())
    own_shape, own_tree = convert(own, None)
    jax.tree.map(np.testing.assert_array_equal, tree, own_tree)
    assert (shape["kind"], shape["marked_question"], own_shape["marked_question"]) == ("vqa", False, True)
    assert own_shape["vision"] == {**shape["vision"], "layer_norm_eps": 1e-6}  # what BLIP's own code has
    assert own_shape["text"] == shape["text"]
    reward_shape, reward_tree = convert(reward, None)
    assert reward_shape == {**own_shape, "kind": "imagereward"}
    jax.tree.map(np.testing.assert_array_equal, reward_tree["vision"], tree["vision"])
    jax.tree.map(np.testing.assert_array_equal, reward_tree["text"], tree["question"])


def test_layers_without_activations_are_one(tensors):
    file, x = image_reward_file(tensors), np.random.default_rng(2).normal(size=(5, 128))
    head = fold([(file, f"mlp.layers.{i}") for i in (0, 2, 4, 6, 7)])
    y = x
    for i in (0, 2, 4, 6, 7):
        y = y @ file[f"mlp.layers.{i}.weight"].astype(float).T + file[f"mlp.layers.{i}.bias"]
    np.testing.assert_allclose(x @ head["kernel"] + head["bias"], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_model.encoder.layers.1.mlp.fc1.bias": None}, r"tensor 'vision_model\.encoder\.layers\.1\.mlp\.fc1"),
        ({"text_encoder.pooler.dense.weight": (4, 4)}, r"tensor 'text_encoder\.pooler\.dense\.weight': found shape"),
        ({"text_decoder.cls.predictions.bias": None}, r"tensor 'text_decoder\.cls\.predictions\.bias': missing"),
        ({"text_decoder.cls.seq_relationship.bias": (2,)}, r"'text_decoder\.cls\.seq_relationship\.bias': expected no"),
        ({"vision_model.embeddings.position_embedding": (17, 128)}, r"found shape \(17, 128\), expected 3 axes"),
        ({"itm_head.weight": (2, 128)}, r"tensor 'itm_head\.weight': found shape \(2, 128\), expected no such tensor"),
    ],
)
def test_a_tensor_that_is_wrong_is_named(config, tensors, change, message):
    changed = dict(tensors)
    for name, shape in change.items():
        changed.pop(name, None)
        if shape is not None:
            changed[name] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=message):
        convert(changed, config.to_dict())


def test_transformers_layout_needs_its_configuration(tensors):
    with pytest.raises(ValueError, match=r"config\.json: missing, expected that of transformers' BlipForQuestion"):
        convert(tensors, None)


def test_a_head_without_a_layer_is_refused(tensors):
    file = image_reward_file(tensors)
    del file["mlp.layers.4.bias"]
    with pytest.raises(ValueError, match=r"tensor 'mlp\.layers\.4\.bias': missing"):
        convert(file, None)


def test_words_are_read_and_blips_own_added(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nyes\n", encoding="utf-8")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "yes", "[DEC]", "[ENC]"]
    assert read_vocabulary(tmp_path) == read_vocabulary(tmp_path / "vocab.txt") == words
    (tmp_path / "other.txt").write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer: .*other\.txt: found no \[PAD\] among 2 lines"):
        read_vocabulary(tmp_path / "other.txt")
    with pytest.raises(ValueError, match=r"tokenizer: .*none: no such file"):
        read_vocabulary(tmp_path / "none")
