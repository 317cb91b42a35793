"""The dense layer of transformers that are adapted: its matrix, and the low-rank update that an adapter has for it."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fopd_jax.models.kernels.adapted import adapted_products
from fopd_jax.models.kernels.choice import KernelImpl
from fopd_jax.models.kernels.rows import split_over

Dtype = Any
Given = Array | np.ndarray
"""Parameters as a caller has them: on the devices, or still on the host."""


class Layer(NamedTuple):
    """What several dense layers have in common."""

    features: int
    axes: tuple[str | None, str | None]
    dtype: Dtype
    kernels: KernelImpl


class _Affine(nn.Module):
    """A matrix and a bias."""

    features: int
    axes: tuple[str | None, str | None] = (None, None)
    dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    def weights(self, width: int) -> tuple[Float[Given, "i o"], Float[Given, " o"]]:
        """Matrix and bias for inputs of that width, as they are kept."""
        shape = (width, self.features)
        kernel: Any = self.param("kernel", nn.with_logical_partitioning(self.kernel_init, self.axes), shape)
        bias: Any = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:]), shape[1:])
        # Also the gradient's place: in a scanned stack it is reduced into shards layer by layer.
        return nn.spmd.with_logical_constraint(kernel, self.axes), bias


class Dense(_Affine):
    """Affine layer plus the low-rank update that the collection `adapter` may hold for it.

    `hidden`: the update's x·a where the caller has computed it already.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*b i"],
        route: Int[Array, " k"] | None = None,
        hidden: Float[Array, "*b r"] | None = None,
    ) -> Float[Array, "*b o"]:
        kernel, bias = self.weights(x.shape[-1])
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.has_variable("scales", "kernel"):
            scales: Any = self.get_variable("scales", "kernel")
            y = (y.astype(jnp.float32) * scales.reshape((1,) * (y.ndim - 1) + (-1,))).astype(self.dtype)
        y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if self.has_variable("adapter", "a"):
            a, b = (self.get_variable("adapter", name).astype(self.dtype) for name in ("a", "b"))
            y = y + routed_product(routed_product(x, a, route) if hidden is None else hidden, b, route)
        return y


def routed_product(x: Array, factor: Array, route: Int[Array, " k"] | None) -> Array:
    """x·factor with one factor of an adapter, or with each sample's own, gathered from a bank by `route`.

    By the TPU compiler's estimate the gather is free (v6e, 8 images of 512 px, 5 adapters of rank 32: a projection with
    it costs 0.97 of one with an adapter for all), and a product over all ranks, masked, adds 1.5 times as much.
    benchmarks/kernels.py measures both, and grouped products, anywhere.
    """
    return x @ factor if route is None else jnp.einsum("BTI,BIO->BTO", x, factor[route])


def shared_hidden(
    module: nn.Module, names: tuple[str, ...], x: Array, route: Int[Array, " k"] | None
) -> tuple[Array | None, ...]:
    """x·a for those children of a module that read the same x, in one product; None for each where not all adapt.

    One product of 3·R columns reads x once, not three times, fills a matrix unit better, and has one backward.
    """
    adapters = module.variables.get("adapter", {})
    if not all(name in adapters for name in names):
        return (None,) * len(names)
    factors = [adapters[name]["a"].astype(x.dtype) for name in names]
    ends = np.cumsum([factor.shape[-1] for factor in factors])
    return tuple(jnp.split(routed_product(x, jnp.concatenate(factors, axis=-1), route), ends[:-1], axis=-1))


class Weights(_Affine):
    """A dense layer's matrix and bias, for a product that is made elsewhere."""

    @nn.compact
    def __call__(self, width: int) -> tuple[Float[Given, "i o"], Float[Given, " o"]]:
        return self.weights(width)


def project(
    module: nn.Module, names: tuple[str, ...], x: Float[Array, "b t d"], route: Array | None, layer: Layer
) -> tuple[Float[Array, "b t o"], ...]:
    """What dense layers of a module that read the same x make of it.

    The kernel computes them together where all have an adapter and whole matrices: neither kept in float8 nor split
    over devices by heads. It computes in bfloat16 alone, since three float32 matrices are too large for a chip's VMEM.
    """
    if layer.kernels == "pallas" and _fit(module, names, layer):
        weights = [Weights(layer.features, layer.axes, layer.dtype, name=name)(x.shape[-1]) for name in names]
        adapters = [[module.variables["adapter"][name][leaf].astype(layer.dtype) for leaf in "ab"] for name in names]
        (kernels, biases), (a, b) = zip(*weights, strict=True), zip(*adapters, strict=True)
        rows = jnp.newaxis if route is None else route
        joined = (a[0] if len(a) == 1 else jnp.concatenate(a, axis=-1))[rows]
        return adapted_products(x.astype(layer.dtype), kernels, biases, joined, tuple(each[rows] for each in b))
    x = x.astype(layer.dtype)
    return tuple(
        Dense(layer.features, layer.axes, layer.dtype, name=name)(x, route, hidden)
        for name, hidden in zip(names, shared_hidden(module, names, x, route), strict=True)
    )


def _fit(module: nn.Module, names: tuple[str, ...], layer: Layer) -> bool:
    adapters, scales = (module.variables.get(collection, {}) for collection in ("adapter", "scales"))
    adapted = all(name in adapters and name not in scales for name in names)
    split = any(split_over(axis) for axis in layer.axes if axis != "embed")
    return adapted and not split and layer.dtype == jnp.bfloat16
