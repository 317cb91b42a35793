"""A GPU as XLA's compiler is told of it where there is none: `GpuTargetConfigProto`, as text."""

import importlib.metadata
import importlib.util

PLUGIN, LIBRARY = "jax_plugins.xla_cuda13", "nvidia.cudnn"
"""What the compiler consists of: its own library, and cuDNN's, which says what attention it has."""
_CUDNN = "nvidia-cudnn-cu13"

# What H100 and H200 share: compute capability 9.0 with the instructions of that generation alone (`wgmma`), 132
# multiprocessors (docs.nvidia.com/cuda/cuda-c-programming-guide, the tables of compute capabilities; datasheets).
_HOPPER = """
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
"""


def compiler_installed() -> bool:
    """Whether the extra `gpu-aot` is there, CUDA's libraries beside it not asked for."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in (PLUGIN, LIBRARY))
    except ModuleNotFoundError:  # not even the package that would hold it
        return False


def target_config(card: str, memory: int, bandwidth: float) -> str:
    """Of a Hopper card by JAX's name of its kind, with its memory's bytes and bytes per second."""
    major, minor = importlib.metadata.version(_CUDNN).split(".")[:2]
    return (
        f"gpu_device_info {{{_HOPPER}  device_memory_size: {memory}\n  memory_bandwidth: {int(bandwidth)}\n}}\n"
        f'platform_name: "CUDA"\ndnn_version_info {{ major: {major} minor: {minor} }}\n'
        f'runtime_version {{ major: 13 }}\ndevice_description_str: "{card}"\n'
    )
