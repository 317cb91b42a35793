"""What is printed of parameters at the start: counts and bytes from arrays, shards and shapes alike."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fopd_jax.adapters.lora import adapter_shapes
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.schema import LoRAConfig, MeshShape
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS, MMDiT
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.running.overview import Part, overview, write_overview

TREE = {
    "blocks": {"kernel": np.zeros((3, 4, 5), np.float32), "bias": np.zeros((3, 5), np.float32)},
    "square": {"kernel": np.zeros((7, 7), np.float32), "bias": np.zeros(7, np.float32)},
    "table": np.zeros((9, 2), np.float16),
}


def _rows(text: str) -> dict[str, list[str]]:
    """Columns by name."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {name: rest for name, *rest in rows}


def test_counts_bytes_dtypes_and_stacks():
    parts = [Part("trains: params", TREE, stacks=True), Part("frozen: bank", [np.zeros((2, 512), np.int8)])]
    assert _rows(overview("toy", parts)) == {
        "toy": ["parameters", "bytes", "a device"],
        "trains: params": ["149", "560 B", "560 B", "float16, float32"],
        "blocks ×3": ["75", "300 B", "300 B", "float32"],
        "2 more": ["74", "260 B", "260 B", "float16, float32"],  # a square layer is no stack
        "frozen: bank": ["1,024", "1.00 KiB", "1.00 KiB", "int8"],
        "in all": ["1,173", "1.55 KiB", "1.55 KiB", "float16, float32, int8"],
    }


def test_arrays_and_shapes_read_alike():
    kinds = (jnp.asarray, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    texts = {overview("toy", [Part("a", jax.tree.map(kind, TREE), stacks=True)]) for kind in kinds}
    assert texts == {overview("toy", [Part("a", TREE, stacks=True)])}


@pytest.mark.parametrize("abstract", [False, True])
def test_of_what_is_sharded_a_device_holds_its_part(abstract: bool):
    mesh = jax.sharding.AbstractMesh((1, 4, 1), ("data", "fsdp", "tensor")) if abstract else make_mesh(MeshShape())
    places = {"split": NamedSharding(mesh, PartitionSpec("fsdp")), "whole": NamedSharding(mesh, PartitionSpec())}
    tree = {name: jax.ShapeDtypeStruct((64, 3), jnp.float32, sharding=place) for name, place in places.items()}
    expected = "960 B" if abstract else "1.50 KiB"
    assert _rows(overview("toy", [Part("a", tree)]))["a"] == ["384", "1.50 KiB", expected, "float32"]


def test_the_full_network_takes_a_dozen_lines():
    params = nn.unbox(boxed_variables(MMDiT(PRESETS["sd35_medium"]), (64, 64, 16)))["params"]
    trained = adapter_shapes(LoRAConfig(), params, TARGETS).weights
    text = overview("sd35m_opd", [Part("trains: adapter", trained, stacks=True), Part("frozen: base", params, True)])
    rows = _rows(text)
    assert len(text.splitlines()) <= 12
    assert max(len(line) for line in text.splitlines()) <= 80
    assert rows["frozen: base"][0] == f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"
    for name, field in (("dual_blocks ×13", "dual_blocks"), ("blocks ×10", "blocks")):
        found = [line for line in text.splitlines() if line.strip().startswith(name)]
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree[field])) for tree in (trained, params)]
        assert [line.split()[2] for line in found] == [f"{size:,}" for size in sizes]
    assert "last_block" in rows  # the adapter's only other entry is named
    assert "7 more" in rows


def test_every_array_is_in_a_file_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parts = [Part("trains", TREE, stacks=True), Part("its moments", (TREE, {"count": np.zeros((), np.int32)}))]
    write_overview(tmp_path, "toy", parts)
    assert capsys.readouterr().out == overview("toy", parts) + "\n"
    text = (tmp_path / "parameters.txt").read_text()
    for name in ("blocks/kernel", "square/bias", "table", "0/blocks/kernel", "1/count"):
        assert f"| {name} " in text
    assert "Total: 149 " in text
    write_overview(tmp_path, "other", [Part("nothing", {})])
    assert (tmp_path / "parameters.txt").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["parameters.txt"]
