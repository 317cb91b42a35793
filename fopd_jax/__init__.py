"""Flow-OPD in JAX: many single-skill teachers distilled on-policy into one flow-matching text-to-image student.

What a notebook needs stands here and is imported when it is first used; docs/notebook.md shows it at work.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fopd_jax.notebook import (
        encode,
        generate_images,
        load_adapter,
        load_config,
        load_pipeline,
        make_opd_step,
        merge,
        score,
    )

__version__ = "0.1.0"
__all__ = [
    "encode",
    "generate_images",
    "load_adapter",
    "load_config",
    "load_pipeline",
    "make_opd_step",
    "merge",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module("fopd_jax.notebook"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
