"""What trains, a low-rank adapter or a whole network, and how the forward pass reads it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from fopd_jax.adapters.lora import Adapter, effective
from fopd_jax.policy.velocity import Tree


@dataclasses.dataclass(frozen=True)
class Student:
    """`compute(trained)`: what gradients are taken of, made once an update. `read(frozen, that)`: variables, adapter.

    Master weights are float32; a network computes in its own dtype, so that of a whole network a rounded copy is made,
    which is also what travels between devices.
    """

    compute: Callable[[Tree], Tree]
    read: Callable[[Tree, Tree], tuple[Tree, Tree]]

    def policy(self, frozen: Tree, trained: Tree) -> tuple[Tree, Tree]:
        """Variables and effective adapter of trained weights, for sampling."""
        return self.read(frozen, self.compute(trained))


def _read_adapter(frozen: Tree, adapter: Adapter) -> tuple[Tree, Tree]:
    return frozen, effective(adapter)


def _read_network(frozen: Tree, params: Tree) -> tuple[Tree, Tree]:
    return {"params": params, "constants": frozen["constants"]}, {}


ADAPTER = Student(lambda trained: trained, _read_adapter)


def network(dtype: Any) -> Student:
    """Full fine-tuning, computing in `dtype`."""
    return Student(lambda trained: jax.tree.map(lambda leaf: leaf.astype(dtype), trained), _read_network)
