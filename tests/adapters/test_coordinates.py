"""Coordinates as a layer of an adapter: beside the others, and through files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.card import AdapterCard, parse_card
from fopd_jax.adapters.coordinates import coordinates_of, placed_at, skills_of, with_coordinates
from fopd_jax.adapters.lora import effective, init_adapter, is_zero, rank_of
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.interop.files.safetensors import load_adapter, save_adapter
from fopd_jax.interop.lora.cards import read_card
from fopd_jax.interop.lora.peft import write_comfyui, write_diffusers, write_peft
from fopd_jax.interop.sd3.network import TARGETS, parameter_shapes
from fopd_jax.models.coordinates import LAYER
from fopd_jax.models.mmdit import PRESETS

MINIATURE, SKILLS = PRESETS["miniature"], ("composition", "text")
PLAIN = init_adapter(jax.random.key(3), parameter_shapes(MINIATURE), LoRAConfig(2, 4.0), TARGETS)
DIALLED = with_coordinates(jax.random.key(3), PLAIN, len(SKILLS), 16, MINIATURE.width)


def test_it_stands_beside_layers_that_start_as_without_it():
    assert {name: DIALLED.weights[name] is PLAIN.weights[name] for name in PLAIN.weights} == dict.fromkeys(
        PLAIN.weights, True
    )
    assert jax.tree.map(np.shape, DIALLED.weights[LAYER]) == {"a": (2, 16), "b": (16, MINIATURE.width)}
    assert not np.any(DIALLED.weights[LAYER]["b"])
    assert np.std(DIALLED.weights[LAYER]["a"]) == pytest.approx(1, abs=0.3)
    assert (rank_of(DIALLED), DIALLED.scale, is_zero(DIALLED)) == (2, 2.0, True)
    assert (skills_of(PLAIN), skills_of(DIALLED)) == (0, 2)


def test_what_the_network_reads_holds_the_coordinates():
    read, at = effective(DIALLED), np.asarray([0.5, 1.5], np.float32)
    found = placed_at(read, at)
    assert found[LAYER]["at"] is at
    assert "at" not in read[LAYER]
    assert {name: found[name] is read[name] for name in PLAIN.weights} == dict.fromkeys(PLAIN.weights, True)
    with pytest.raises(ValueError, match="coordinates: found some for an adapter that has none"):
        placed_at(effective(PLAIN), at)
    with pytest.raises(ValueError, match="coordinates: found 3, expected 2, one a skill"):
        placed_at(read, np.ones((4, 3), np.float32))


def test_coordinates_are_chosen_by_name():
    np.testing.assert_array_equal(coordinates_of(SKILLS, {"text": 1.5}, "dial"), np.float32([1.0, 1.5]))
    with pytest.raises(ValueError, match=r"dial: found colour, expected some of composition, text"):
        coordinates_of(SKILLS, {"text": 1.0, "colour": 2.0}, "dial")


def test_our_own_file_keeps_it_and_its_card_names_the_skills(tmp_path: Path):
    random = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(0).normal(size=leaf.shape)), DIALLED)
    file, card = tmp_path / "student.safetensors", AdapterCard(coordinates=SKILLS, coordinates_high=1.25)
    save_adapter(file, random, {"preset": "miniature"}, card)
    found, _ = load_adapter(file)
    assert jax.tree.structure(found) == jax.tree.structure(random)
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.float32, random))
    assert read_card(file) == card
    assert parse_card(card.fields()) == card
    with pytest.raises(ValueError, match="coordinates_high: found 3, expected a number from 1 to 2"):
        parse_card({"coordinates_high": 3})


@pytest.mark.parametrize(
    ("write", "name"), [(write_peft, "peft"), (write_diffusers, "a.safetensors"), (write_comfyui, "b.safetensors")]
)
def test_files_for_others_are_refused_with_what_would_be_lost(write: object, name: str, tmp_path: Path):
    assert callable(write)
    with pytest.raises(ValueError, match=r"cannot be written for others: .* it would draw as at coordinates 0"):
        write(tmp_path / name, DIALLED, MINIATURE)
    assert list(tmp_path.iterdir()) == []
