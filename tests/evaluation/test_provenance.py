"""Provenance in images' metadata: there on request only, and in other tools' terms."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fopd_jax.evaluation.provenance import SOURCE_TYPE
from fopd_jax.evaluation.samples import Asked, write_grid, write_image

SETTINGS = {"model": "weights/<m> & \"n\"", "model_sha256": "ab" * 32, "steps": 4, "guidance": 1.5, "transition": "ode",
            "shift": 3.0, "dtype": "float32", "height": 16, "width": 24, "version": "0.1.0"}  # fmt: skip
ADAPTER = {"source": "猫/adapter", "sha256": "cd" * 32}
USUAL = {"prompt", "negative_prompt", "seed", "settings"}
IMAGE = np.zeros((16, 24, 3), np.float32)


def _info(path: Path) -> dict[str, str]:
    with Image.open(path) as picture:
        picture.load()
        return {str(name): text for name, text in picture.info.items() if isinstance(text, str)}


def test_without_being_asked_nothing_more_is_said(tmp_path: Path):
    write_image(tmp_path / "a.png", IMAGE, ("p", 3), Asked(("p",), 1, 3), SETTINGS, ADAPTER)
    assert _info(tmp_path / "a.png").keys() == USUAL


@pytest.mark.parametrize("adapter", [{}, ADAPTER])
def test_an_image_says_what_made_it_and_that_it_is_not_signed(tmp_path: Path, adapter: dict[str, str]):
    write_image(tmp_path / "a.png", IMAGE, ("p", 3), Asked(("p",), 1, 3, provenance=True), SETTINGS, adapter)
    info = _info(tmp_path / "a.png")
    assert info.keys() >= {*USUAL, "Software", "provenance", "XML:com.adobe.xmp"}
    assert info["Software"] == "fopd_jax 0.1.0"
    found = json.loads(info["provenance"])
    assert found["signed"] is False
    (action,) = found["data"]["actions"]
    assert action == {
        "action": "c2pa.created", "digitalSourceType": SOURCE_TYPE,
        "softwareAgent": {"name": "fopd_jax", "version": "0.1.0"},
    }  # fmt: skip
    base = {"role": "model", "name": SETTINGS["model"], "sha256": SETTINGS["model_sha256"]}
    of_adapter = [{"role": "adapter", "name": "猫/adapter", "sha256": "cd" * 32}] if adapter else []
    assert found["made_by"] == [base, *of_adapter]


def test_xmp_is_well_formed_and_has_iptcs_property(tmp_path: Path):
    write_image(tmp_path / "a.png", IMAGE, ("p", 3), Asked(("p",), 1, 3, provenance=True), SETTINGS, {})
    packet = _info(tmp_path / "a.png")["XML:com.adobe.xmp"]
    (described,) = ElementTree.fromstring(packet.replace("\ufeff", "")).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    assert described.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType") == SOURCE_TYPE
    assert described.get("{http://ns.adobe.com/xap/1.0/}CreatorTool") == "fopd_jax 0.1.0"


def test_a_grid_names_all_adapters(tmp_path: Path):
    asked = Asked(("p",), 1, 3, provenance=True)
    cells = np.stack([IMAGE[None], IMAGE[None]])
    write_grid(tmp_path / "grid.png", cells, asked, ["base", "a"], SETTINGS, [{}, ADAPTER])
    found = json.loads(_info(tmp_path / "grid.png")["provenance"])
    assert [each["role"] for each in found["made_by"]] == ["model", "adapter"]
