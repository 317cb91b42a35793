"""Tables on a made-up network of two scanned layers: every layout, both directions, what is refused."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fopd_jax.interop.files.tables import (
    CONVOLUTION,
    LINEAR,
    Assembler,
    Component,
    Source,
    aligned_empty,
    check_names,
    from_tensors,
    parameter_shapes,
    stream_tensors,
    to_tensors,
)

PATCH = Source("patch.weight", "D c p q -> (p q c) D", (("p", 2), ("q", 3)))
COMPONENT = Component(
    config=None,
    shapes={"layers/dense/kernel": (2, 3, 4), "layers/dense/bias": (2, 4), "patch/kernel": (30, 7), "norm/scale": (4,)},
    sources={
        "layers_0/dense/kernel": Source("h.0.weight", LINEAR),
        "layers_1/dense/kernel": Source("h.1.weight", LINEAR),
        "layers_0/dense/bias": Source("h.0.bias"),
        "layers_1/dense/bias": Source("h.1.bias"),
        "patch/kernel": PATCH,
        "norm/scale": Source("norm.weight"),
    },
    stacks=("layers",),
    kept={"table": (1, 6)},
    unused=(r"h\.\d+\.position_ids", "tied"),
)
SHAPES = {
    "h.0.weight": (4, 3), "h.1.weight": (4, 3), "h.0.bias": (4,), "h.1.bias": (4,), "patch.weight": (7, 5, 2, 3),
    "norm.weight": (4,), "table": (1, 6),
}  # fmt: skip


def random_tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def test_tensor_shapes() -> None:
    assert COMPONENT.tensor_shapes() == SHAPES


def test_layouts() -> None:
    tensors = random_tensors()
    params = from_tensors(COMPONENT, tensors)
    for layer in (0, 1):
        np.testing.assert_array_equal(params["layers"]["dense"]["kernel"][layer], tensors[f"h.{layer}.weight"].T)
        np.testing.assert_array_equal(params["layers"]["dense"]["bias"][layer], tensors[f"h.{layer}.bias"])
    kernel = params["patch"]["kernel"].reshape(2, 3, 5, 7)  # [p, q, c, D]
    assert kernel[1, 2, 3, 4] == tensors["patch.weight"][4, 3, 1, 2]
    image = Source("conv.weight", CONVOLUTION).to_ours(np.arange(120).reshape(2, 3, 4, 5))
    assert image.shape == (4, 5, 3, 2)
    assert image[3, 4, 2, 1] == 119


def test_state_dict_comes_back() -> None:
    tensors = random_tensors()
    back = to_tensors(COMPONENT, from_tensors(COMPONENT, tensors))
    assert back.keys() == tensors.keys() - {"table"}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
        assert tensor.flags.c_contiguous


def test_boxed_and_device_arrays_are_streamed_in_the_order_of_the_table() -> None:
    tensors = random_tensors()
    boxed = jax.tree.map(
        lambda leaf: nn.Partitioned(jnp.asarray(leaf), (None,) * leaf.ndim), from_tensors(COMPONENT, tensors)
    )
    streamed = list(stream_tensors(COMPONENT, boxed))
    assert [name for name, _ in streamed] == [source.name for source in COMPONENT.sources.values()]
    for name, tensor in streamed:
        np.testing.assert_array_equal(tensor, tensors[name])


def test_assembler_copies_in_any_order() -> None:
    """A caller may reuse the memory of a tensor, as a reader with one buffer does."""
    tensors = random_tensors()
    assembler = Assembler(COMPONENT)
    for name in reversed([name for name in tensors if name != "table"]):
        tensor = tensors[name].copy()
        assembler.place(name, tensor)
        tensor[:] = np.nan
    jax.tree.map(np.testing.assert_array_equal, assembler.tree(), from_tensors(COMPONENT, tensors))


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [None, np.float32, ml_dtypes.bfloat16])
def test_dtype(dtype: type | None, source: type) -> None:
    tensors = {name: tensor.astype(source) for name, tensor in random_tensors().items()}
    params = from_tensors(COMPONENT, tensors, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype or source)}
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["norm.weight"].astype(dtype or source))


def test_unused_tensors_are_left_out() -> None:
    tensors = random_tensors()
    more = tensors | {"h.12.position_ids": np.zeros((1, 9), np.int64), "tied": np.zeros(3, np.float32)}
    jax.tree.map(np.testing.assert_array_equal, from_tensors(COMPONENT, more), from_tensors(COMPONENT, tensors))
    with pytest.raises(ValueError, match=r"'h.x.position_ids': found shape"):  # the whole name must match
        from_tensors(COMPONENT, tensors | {"h.x.position_ids": np.zeros(3, np.float32)})


@pytest.mark.parametrize("name", ["h.1.weight", "patch.weight", "table"])
def test_missing_superfluous_and_misshapen_tensors(name: str) -> None:
    tensors = random_tensors()
    tensor, shape = tensors.pop(name), SHAPES[name]
    with pytest.raises(ValueError, match=exactly(f"tensor {name!r}: missing, expected shape {shape}")):
        from_tensors(COMPONENT, tensors)
    with pytest.raises(ValueError, match=exactly(f"tensor 'h.2.bias': found shape {shape}, expected no such tensor")):
        from_tensors(COMPONENT, tensors | {name: tensor, "h.2.bias": tensor})
    with pytest.raises(ValueError, match=exactly(f"tensor {name!r}: found shape {shape[::-1]}, expected {shape}")):
        from_tensors(COMPONENT, tensors | {name: tensor.T})


def test_missing_superfluous_and_misshapen_parameters() -> None:
    params = from_tensors(COMPONENT, random_tensors())
    with pytest.raises(
        ValueError, match=exactly("parameter 'norm/bias': found shape (4,), expected no such parameter")
    ):
        to_tensors(COMPONENT, params | {"norm": params["norm"] | {"bias": np.zeros(4)}})
    with pytest.raises(ValueError, match=exactly("parameter 'norm/scale': missing, expected shape (4,)")):
        to_tensors(COMPONENT, {name: each for name, each in params.items() if name != "norm"})
    with pytest.raises(ValueError, match=exactly("parameter 'norm/scale': found shape (5,), expected (4,)")):
        to_tensors(COMPONENT, params | {"norm": {"scale": np.zeros(5)}})


def test_names_are_checked_before_shapes() -> None:
    """A renamed tensor is told by its name, not by the shape of another."""
    with pytest.raises(ValueError, match=exactly("tensor 'b': missing, expected shape (2,)")):
        check_names({"a": (3,), "c": (2,)}, {"a": (1,), "b": (2,)})


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("layers_0/dense/bias", ("layers/dense/bias", 0)),
        ("layers_11/dense/bias", ("layers/dense/bias", 11)),
        ("last_block/dense/bias", ("last_block/dense/bias", None)),
        ("layers_norm/scale", ("layers_norm/scale", None)),
        ("blocks_0/scale", ("blocks_0/scale", None)),
    ],
)
def test_locate(path: str, place: tuple[str, int | None]) -> None:
    assert COMPONENT.locate(path) == place


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1000,)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_aligned_memory_is_taken_over_without_a_copy(shape: tuple[int, ...], dtype: type) -> None:
    array = aligned_empty(shape, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    if array.size:
        assert array.ctypes.data % 64 == 0
        array[...] = 1
        on_device = jax.device_put(array, jax.devices("cpu")[0], may_alias=True)
        assert on_device.unsafe_buffer_pointer() == array.ctypes.data


def test_parameter_shapes_computes_nothing() -> None:
    shapes = parameter_shapes(nn.Dense(1 << 20).init, jax.ShapeDtypeStruct((1, 1 << 20), jnp.float32))  # 4 TB
    assert shapes == {"kernel": (1 << 20, 1 << 20), "bias": (1 << 20,)}
