"""Kernels for TPUs on the CPU, and how far what they give is from what was expected."""

import contextlib
import functools
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import pallas as pl


def interpreted() -> contextlib.AbstractContextManager[Any]:
    """The TPU's kernels are run by XLA, wherever that is."""
    return mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def outcome(function: Any, *given: Any) -> Any:
    """Results and gradients; the last of what is given is the cotangent of the results."""
    *arguments, cotangents = given
    out, pull = jax.vjp(function, *arguments)
    return {"out": out, "gradient": pull(cotangents)}


def errors(found: Any, expected: Any) -> dict[str, float]:
    """‖a - b‖/‖b‖ of each leaf, by its path."""

    def one(a: Any, b: Any) -> float:
        a, b = (np.asarray(each, np.float64) for each in (a, b))
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(one, found, expected))
    return {jax.tree_util.keystr(path): error for path, error in leaves}
