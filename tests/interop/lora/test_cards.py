"""Cards in every layout: they come back, change nothing for whoever loads the file, and are refused where damaged."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fopd_jax.adapters.card import AdapterCard
from fopd_jax.adapters.lora import Adapter
from fopd_jax.interop.files.safetensors import load_adapter, save_adapter
from fopd_jax.interop.lora.cards import CARD_FILE, read_card
from fopd_jax.interop.lora.peft import read_lora, write_comfyui, write_diffusers, write_peft, write_sd_scripts
from tests.adapters.test_card import FULL
from tests.interop.lora.peft_oracle import (
    CONFIG,
    base,
    our_velocity,
    pipeline,
    random_adapter,
    relative,
    torch_velocity,
)

WRITERS: dict[str, Callable[..., None]] = {
    "peft": write_peft,
    "diffusers.safetensors": write_diffusers,
    "diffusers_folder": write_diffusers,
    "comfyui.safetensors": write_comfyui,
    "sd_scripts.safetensors": write_sd_scripts,
    "ours.safetensors": lambda path, adapter, config, card=None: save_adapter(path, adapter, {"preset": "x"}, card),
}
LEFT_OUT = "No LoRA keys associated to"  # of the text encoders, of which we have none


@pytest.mark.parametrize("name", WRITERS)
def test_a_card_comes_back_and_changes_no_tensor(name: str, tmp_path: Path):
    for folder, card in (("with", FULL), ("again", FULL), ("without", None)):
        WRITERS[name](tmp_path / folder / name, random_adapter(), CONFIG, card=card)
        assert read_card(tmp_path / folder / name) == card
    one, two, bare = (_contents(tmp_path / folder / name) for folder in ("with", "again", "without"))
    assert one == two  # equal cards give equal bytes
    tensors = next(file for file in bare if file.endswith(".safetensors"))
    loaded = [load_file(_inside(tmp_path / folder / name, tensors)) for folder in ("with", "without")]
    assert loaded[0].keys() == loaded[1].keys()
    for key, value in loaded[0].items():
        np.testing.assert_array_equal(value, loaded[1][key], err_msg=key)
    if name != "ours.safetensors":
        assert read_lora(tmp_path / "with" / name, CONFIG).scale == read_lora(tmp_path / "without" / name, CONFIG).scale


def _contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (sorted(path.iterdir()) if path.is_dir() else [path])}


def _inside(path: Path, tensors: str) -> Path:
    return path / tensors if path.is_dir() else path


def test_peft_loads_a_folder_with_a_card(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    adapter = random_adapter()
    write_peft(tmp_path / "peft", adapter, CONFIG, FULL)
    assert sorted(_contents(tmp_path / "peft")) == ["adapter_config.json", "adapter_model.safetensors", CARD_FILE]
    model = PeftModel.from_pretrained(copy.deepcopy(base()), str(tmp_path / "peft"))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert relative(our_velocity(adapter), torch_velocity(model)) <= 2e-4
    model.save_pretrained(str(tmp_path / "again"))  # PEFT itself keeps no card
    assert (tmp_path / "again" / "adapter_model.safetensors").is_file()
    assert read_card(tmp_path / "again") is None


@pytest.mark.parametrize("name", ["diffusers.safetensors", "peft"])
def test_diffusers_loads_a_file_with_a_card(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A PEFT folder, too, by `load_lora_adapter`'s way of naming the prefix."""
    adapter = random_adapter()
    WRITERS[name](tmp_path / name, adapter, CONFIG, card=FULL)
    pipe = pipeline()
    if name == "peft":
        pipe.transformer.load_lora_adapter(
            str(tmp_path / name), weight_name="adapter_model.safetensors", prefix="base_model.model"
        )
        adapter = Adapter(adapter.weights, 1.0)  # diffusers reads no adapter_config.json
    else:
        pipe.load_lora_weights(str(tmp_path), weight_name=name)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [line for line in said if LEFT_OUT not in line]
    assert relative(our_velocity(adapter), torch_velocity(pipe.transformer)) <= 2e-4


def test_a_peft_folder_may_lose_either(tmp_path: Path):
    """A card survives a copy without the file beside, and in it people can say what a foreign folder does not."""
    write_peft(tmp_path / "ours", random_adapter(), CONFIG, FULL)
    assert json.loads((tmp_path / "ours" / CARD_FILE).read_text()) == FULL.fields()
    (tmp_path / "ours" / CARD_FILE).unlink()
    assert read_card(tmp_path / "ours") == FULL
    assert read_card(tmp_path / "ours" / "adapter_model.safetensors") == FULL
    write_peft(tmp_path / "theirs", random_adapter(), CONFIG)
    assert read_card(tmp_path / "theirs") is None
    (tmp_path / "theirs" / CARD_FILE).write_text('{"guidance": 1}')
    assert read_card(tmp_path / "theirs") == AdapterCard(guidance=1.0)
    assert read_card(tmp_path / "theirs" / "adapter_model.safetensors") == AdapterCard(guidance=1.0)


def test_two_cards_that_differ_are_refused(tmp_path: Path):
    write_peft(tmp_path / "peft", random_adapter(), CONFIG, FULL)
    (tmp_path / "peft" / CARD_FILE).write_text(json.dumps(FULL.fields() | {"guidance": 4.5}))
    message = rf"^{tmp_path}/peft/{CARD_FILE}: guidance: found 4.5, but adapter_model.safetensors says 1.0; remove "
    with pytest.raises(ValueError, match=message):
        read_card(tmp_path / "peft")


DAMAGED = {
    "cut off": ('{"guidance": 1.', "damaged JSON"),
    "empty": ("", "damaged JSON"),
    "nested": ("[" * 100_000, "damaged JSON"),
    "a list": ("[1]", "found JSON of type list, expected an object"),
    "a text": ('{"guidance": "none"}', "guidance: found 'none', expected a number from 0 to 100"),
    "not a number": ('{"guidance": NaN}', "guidance: found nan, expected a number from 0 to 100"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("name", [*WRITERS, "beside"])
def test_a_damaged_card_is_refused_and_not_taken_for_none(name: str, case: str, tmp_path: Path):
    text, message = DAMAGED[case]
    path = tmp_path / name
    WRITERS.get(name, write_peft)(path, random_adapter(), CONFIG)
    if name == "beside":
        where, place = path / CARD_FILE, path / CARD_FILE
        where.write_text(text)
    else:
        where = next(iter(path.glob("*.safetensors"))) if path.is_dir() else path
        place = f"{where}: metadata fopd_jax"
        _put(where, text)
    with pytest.raises(ValueError) as caught:
        read_card(path)
    assert str(caught.value).startswith(f"{place}: {message}")
    if name == "ours.safetensors":
        with pytest.raises(ValueError, match="metadata fopd_jax"):
            load_adapter(path)


def _put(path: Path, text: str) -> None:
    """The file with this in place of a card."""
    with safe_open(path, framework="numpy") as file:
        metadata: dict[str, Any] = dict(file.metadata())
    save_file(load_file(path), path, metadata | {"fopd_jax": text})


def test_what_holds_no_adapter_has_no_card(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / CARD_FILE).write_text("{")
    for path in (tmp_path / "nowhere", tmp_path / "folder"):
        assert read_card(path) is None
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/text.safetensors: damaged or no safetensors file"):
        read_card(tmp_path / "text.safetensors")
