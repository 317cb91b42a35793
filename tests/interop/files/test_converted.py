"""Reading a converted folder: in whole, in shards, in another dtype; and what is refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.interop.files.converted import (
    Manifest,
    abstract_params,
    load_params,
    load_table,
    read_manifest,
    save_params,
    write_manifest,
)
from fopd_jax.interop.files.tables import aligned_empty
from tests.folders import load
from tests.quick import environment

ROOT = Path(__file__).parents[3]


def test_table_crop_is_its_centre(converted_pipeline: Path) -> None:
    table = load_table(converted_pipeline)
    side = read_manifest(converted_pipeline).transformer.table_size
    crop = load_table(converted_pipeline, (side, 6, 3))
    np.testing.assert_array_equal(crop, table.reshape(side, side, -1)[9:15, 10:13])
    assert type(crop) is np.ndarray  # no mapped file behind it
    with pytest.raises(ValueError, match="holds 24x24 patches, but the input has 25x3"):
        load_table(converted_pipeline, (side, 25, 3))


def test_parameters_can_be_read_in_another_dtype(converted_pipeline: Path) -> None:
    found = load(converted_pipeline, "text_encoder", jnp.bfloat16)
    exact = load(converted_pipeline, "text_encoder")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), found, exact)


def test_parameters_of_another_shape_are_refused(converted_pipeline: Path) -> None:
    component = read_manifest(converted_pipeline).component("text_encoder")
    shapes = dict(component.shapes) | {"text_projection/kernel": (24, 25)}
    abstract = abstract_params(dataclasses.replace(component, shapes=shapes), np.float32)
    message = (
        r"another shape \(parameter 'text_projection/kernel': found shape \(24, 24\), expected \(24, 25\)\); convert"
    )
    with pytest.raises(ValueError, match=f"text_encoder: damaged, or of {message} text_encoder again"):
        load_params(converted_pipeline, "text_encoder", abstract)


@pytest.mark.slow
def test_array_of_more_than_a_gigabyte(tmp_path: Path) -> None:
    """T5-XXL's and SD3.5-Large's stacked layers are such arrays, which Orbax refuses unless told of their size."""
    params = {"kernel": aligned_empty((2, 300_000_000), jnp.bfloat16)}
    params["kernel"][:] = 1
    save_params(tmp_path, "large", params)
    found = load_params(tmp_path, "large", {"kernel": jax.ShapeDtypeStruct((2, 300_000_000), jnp.bfloat16)})
    assert (np.asarray(found["kernel"]) == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fopd_jax/converted/0"}, "found format 'fopd_jax/converted/0', expected 'fopd_jax/converted/1'"),
        ({"preset": None}, "damaged"),
        ({"components": []}, "damaged"),
        ({"components": {"unet": {}}}, "found component 'unet', expected some of transformer, vae"),
        ({"components": {"vae": {"dtype": "float32"}}}, "damaged at component 'vae'"),
        ({"components": {"vae": []}}, "damaged at component 'vae'"),
    ],
)
def test_damaged_manifest(change: dict[str, Any], message: str, converted: Path) -> None:
    path = converted / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"manifest.json: {message}"):
        read_manifest(converted)


@pytest.mark.parametrize(("component", "field"), [("transformer", "num_layers"), ("text_encoder_3", "num_layers")])
def test_layers_that_nobody_can_list_are_refused(component: str, field: str, converted: Path) -> None:
    path = converted / "manifest.json"
    fields = json.loads(path.read_text())
    fields["components"][component]["config"][field] = 10**9
    path.write_text(json.dumps(fields))
    manifest = read_manifest(converted)
    with pytest.raises(ValueError, match=f"^{field}: found 1000000000, expected at most 1000$"):
        manifest.component(component)
    if component == "transformer":
        with pytest.raises(ValueError, match=f"^{field}: found 1000000000, expected at most 1000$"):
            _ = manifest.transformer


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no manifest.json; expected a folder that tools/convert_sd35_weights.py wrote"
    ):
        read_manifest(tmp_path)
    write_manifest(tmp_path, Manifest("sd35_medium", {}))
    assert read_manifest(tmp_path) == Manifest("sd35_medium", {})


SHARDED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from fopd_jax.interop.files.converted import abstract_params, load_params, load_sharded, read_manifest
from fopd_jax.models.mmdit import MMDiT
from fopd_jax.parallel.mesh import MeshShape, make_mesh
from fopd_jax.parallel.sharding import parameter_shardings

folder, component = Path(sys.argv[1]), read_manifest(Path(sys.argv[1])).component("transformer")
c = component.config
inputs = jnp.zeros((1, 8, 8, c.channels)), jnp.zeros(1), jnp.zeros((1, 1, c.context_dim)), jnp.zeros((1, c.pooled_dim))
boxed = jax.eval_shape(MMDiT(c).init, jax.random.key(0), *inputs)["params"]
mesh = make_mesh(MeshShape(data=1, fsdp=4, tensor=2))
found = load_sharded(folder, "transformer", boxed, jnp.float32, mesh)
whole = load_params(folder, "transformer", abstract_params(component, np.float32))
jax.tree.map(np.testing.assert_array_equal, found, whole)
jax.tree.map(lambda a, b: np.testing.assert_(a.sharding == b), found, parameter_shardings(mesh, boxed))
assert {len(leaf.devices()) for leaf in jax.tree.leaves(whole)} == {1}
largest = found["blocks"]["ff"]["up"]["kernel"]
assert len(largest.addressable_shards) == 8 and largest.addressable_shards[0].data.size * 8 == largest.size
print("same")
"""


def test_shards_on_eight_devices(converted_pipeline: Path) -> None:
    command = [sys.executable, "-c", SHARDED, str(converted_pipeline)]
    done = subprocess.run(command, cwd=ROOT, env=environment(8), capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr
