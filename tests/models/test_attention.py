"""Every implementation computes the same attention, in which the choice is explicit and nothing falls back.

Tolerances on ‖a - b‖/‖b‖ against `xla`, forward and gradients: 1e-5 in float32, 2e-2 in bfloat16 (an output of a few
roundings of 2⁻⁸ each, through one softmax).
"""

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fopd_jax.config.schema import MeshShape
from fopd_jax.models import attention as module
from fopd_jax.models.attention import attention, merged_attention, resolve_attention, save_attention, splash_blocks
from fopd_jax.models.kernels.merged_attention import Stream
from fopd_jax.parallel.gradients import GradientGroups
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.parallel.sharding import activation_rules
from tests.models.kernels.interpretation import interpreted as interpreted_kernels
from tests.quick import environment

FLOAT32, BFLOAT16 = 1e-5, 2e-2
HEADS, HEAD_DIM = 2, 16
INTERPRETED = functools.partial(splash.make_splash_mha_single_device, interpret=True)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The TPU's kernel, run by XLA on the CPU."""
    monkeypatch.setattr(splash, "make_splash_mha_single_device", INTERPRETED)


def _inputs(batch: int, length: int, dtype: Any = np.float32, heads: int = HEADS, head_dim: int = HEAD_DIM) -> Any:
    """Queries, keys, values and a cotangent."""
    rng = np.random.default_rng(length)
    return tuple(jnp.asarray(rng.standard_normal((batch, length, heads, head_dim)), dtype) for _ in range(4))


def _outcome(impl: Any, q: Any, k: Any, v: Any, cotangent: Any) -> Any:
    """Output and the gradients of its product with a cotangent."""
    out, pull = jax.vjp(functools.partial(attention, impl=impl), q, k, v)
    return out, *pull(cotangent)


def _error(found: Any, expected: Any) -> float:
    a, b = (np.asarray(each, np.float64) for each in (found, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# ---- the choice


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "platform", "expected"),
    [
        ("auto", "bfloat16", 64, "gpu", "cudnn"),
        ("auto", "float32", 64, "gpu", "xla"),
        ("auto", "bfloat16", 20, "gpu", "xla"),
        ("auto", "bfloat16", 256, "gpu", "xla"),
        ("auto", "bfloat16", 64, "tpu", "merged"),
        ("auto", "float32", 32, "tpu", "merged"),
        ("auto", "bfloat16", 72, "tpu", "splash"),
        ("auto", "float16", 64, "tpu", "splash"),
        ("auto", "bfloat16", 64, "cpu", "xla"),
        ("xla", "float32", 64, "gpu", "xla"),
        ("xla", "bfloat16", 64, "tpu", "xla"),
        ("cudnn", "float16", 128, "gpu", "cudnn"),
        ("splash", "bfloat16", 64, "tpu", "splash"),
        ("merged", "bfloat16", 128, "tpu", "merged"),
    ],
)
def test_the_choice(name: str, dtype: str, head_dim: int, platform: str, expected: str):
    assert resolve_attention(name, dtype, head_dim, platform) == expected
    assert resolve_attention(name, jnp.dtype(dtype), head_dim, platform) == expected


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "platform", "message"),
    [
        ("flash", "bfloat16", 64, "gpu", "found 'flash', expected one of"),
        ("cudnn", "bfloat16", 64, "cpu", "'cudnn' needs a GPU, but the backend is 'cpu'; use 'xla' or 'auto'"),
        ("cudnn", "bfloat16", 64, "tpu", "'cudnn' needs a GPU"),
        ("cudnn", "float32", 64, "gpu", "'cudnn' computes in bfloat16 or float16, but the network's dtype is float32"),
        ("cudnn", "bfloat16", 20, "gpu", "multiple of 8, but the network's is 20"),
        ("cudnn", "bfloat16", 256, "gpu", "at most 128"),
        ("splash", "bfloat16", 64, "gpu", "'splash' needs a TPU, but the backend is 'gpu'"),
        ("merged", "bfloat16", 64, "cpu", "'merged' needs a TPU, but the backend is 'cpu'"),
        ("merged", "bfloat16", 72, "tpu", "dimension of 16, 32, 64, 128, but the network's is 72"),
        ("merged", "float16", 64, "tpu", "computes in bfloat16 or float32, but the network's dtype is float16"),
    ],
)
def test_a_wrong_choice_is_refused(name: str, dtype: str, head_dim: int, platform: str, message: str):
    with pytest.raises(ValueError, match=f"^attention: .*{message}"):
        resolve_attention(name, dtype, head_dim, platform)


def test_the_default_platform_is_this_process():
    assert resolve_attention("auto", "float32", 64) == resolve_attention("auto", "float32", 64, jax.default_backend())


# ---- splash


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, (128, 128)), (128, (128, 128)), (1024, (1024, 1024)), (1229, (1280, 640)), (4096, (4096, 1024)),
     (4429, (4480, 896))],
)  # fmt: skip
def test_blocks_hold_the_sequence_with_little_padding(length: int, expected: tuple[int, int]):
    assert splash_blocks(length) == expected


def test_blocks_are_equal_and_of_whole_tiles():
    for length in range(1, 5000, 7):
        padded, block = splash_blocks(length)
        assert padded % block == 0
        assert block % 128 == 0
        assert block <= 1024
        assert length <= padded < length + 128 * (padded // block)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("length", "longest"), [(40, 1024), (128, 1024), (200, 128)], ids=["padded", "exact", "blocks"]
)
def test_splash_equals_xla(length: int, longest: int, monkeypatch: pytest.MonkeyPatch):
    """A block with padding, one without, and two blocks with dq summed over them."""
    monkeypatch.setattr(module, "_MAX_BLOCK", longest)
    monkeypatch.setattr(module, "_MAX_WHOLE", longest)
    inputs = _inputs(2, length)
    found, expected = (jax.jit(functools.partial(_outcome, impl))(*inputs) for impl in ("splash", "xla"))
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        assert _error(ours, theirs) <= FLOAT32, name


GROUPS = {"one sum a device": ("data", "fsdp"), "one sum a row": ("data",), "one sum a timestep": ()}


def _grouped(once: tuple[str, ...]) -> dict[str, float]:
    """Errors of splash on a mesh of eight devices, inside the groups of `GradientGroups`, against xla on one."""
    mesh, (q, k, v, cotangent) = make_mesh(MeshShape(2, 2, 2)), _inputs(8, 24)
    weight = 1 + 0.1 * jnp.arange(HEADS * HEAD_DIM, dtype=jnp.float32).reshape(HEADS, HEAD_DIM)

    def differentiate(impl: Any) -> Callable[[Any, Any], Any]:
        def loss(weight: Any, rows: Any) -> Any:
            q, k, v, cotangent = rows
            out = attention(q * weight[None, None], k, v, impl)
            return (out * cotangent).sum(), out

        return jax.grad(loss, has_aux=True)

    @jax.jit
    def found(weight: Any, rows: Any) -> Any:
        groups = GradientGroups(mesh, once, P())
        with activation_rules(mesh):
            sums, out = groups.gradient(differentiate("splash"), weight, rows)
            return groups.total(sums), out

    rows = jax.device_put((q, k, v, cotangent), NamedSharding(mesh, P(("data", "fsdp"))))
    expected = jax.jit(differentiate("xla"))(weight, (q, k, v, cotangent))
    return dict(zip(("gradient", "output"), map(_error, found(weight, rows), expected), strict=True))


def _merged_groups(once: tuple[str, ...]) -> dict[str, float]:
    """The same of merged attention with qk-norm, of which every device has the scales, and text that is only read."""
    mesh, (q, k, v, cotangent) = make_mesh(MeshShape(2, 2, 2)), _inputs(8, 24)
    scales = 1 + 0.1 * jnp.arange(4 * HEAD_DIM, dtype=jnp.float32).reshape(4, HEAD_DIM) / HEAD_DIM

    def merged(scales: Any, q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
        streams = (Stream(q, k, v, scales[0], scales[1]), Stream(None, v, k, scales[2], scales[3]))
        return merged_attention(streams, HEAD_DIM)[0].reshape(*q.shape[:2], HEADS, HEAD_DIM)

    def plain(scales: Any, q: Any, k: Any, v: Any) -> Any:
        def norm(x: Any, scale: Any) -> Any:
            return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale[None, None, None]

        keys = jnp.concatenate([norm(k, scales[1]), norm(v, scales[3])], 1)
        return jax.nn.dot_product_attention(norm(q, scales[0]), keys, jnp.concatenate([v, k], 1))

    def differentiate(function: Any) -> Callable[[Any, Any], Any]:
        def loss(scales: Any, rows: Any) -> Any:
            *operands, cotangent = rows
            out = function(scales, *operands)
            return (out * cotangent).sum(), out

        return jax.grad(loss, has_aux=True)

    @jax.jit
    def found(scales: Any, rows: Any) -> Any:
        groups = GradientGroups(mesh, once, P())
        with activation_rules(mesh):
            sums, out = groups.gradient(differentiate(merged), scales, rows)
            return groups.total(sums), out

    rows = jax.device_put((q, k, v, cotangent), NamedSharding(mesh, P(("data", "fsdp"))))
    expected = jax.jit(differentiate(plain))(scales, (q, k, v, cotangent))
    return dict(zip(("gradient", "output"), map(_error, found(scales, rows), expected), strict=True))


def _child(what: str) -> Any:
    done = subprocess.run([sys.executable, __file__, what], env=environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", ["groups", "merged groups"])
def test_kernels_run_on_each_devices_own_rows_and_heads(kernel: str):
    for case, errors in _child(kernel).items():
        assert max(errors.values()) <= FLOAT32, (case, errors)


def _compiled(name: str) -> dict[str, Any]:
    """Forward and backward at SD3.5-Medium's sizes for a TPU that is not there."""
    from fopd_jax.performance.topology import configure, parse_topology, topology_devices

    topology = parse_topology(name)
    configure(topology)
    mesh = make_mesh(MeshShape(data=2, tensor=2), topology_devices(topology))
    sharding = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))

    @jax.jit
    def program(*inputs: Any) -> Any:
        with activation_rules(mesh):
            return _outcome("splash", *inputs)

    texts = {}
    for length in (1024, 1229, 4429):
        shape = jax.ShapeDtypeStruct((4, length, 24, 64), jnp.bfloat16, sharding=sharding)
        text = program.lower(shape, shape, shape, shape).compile().as_text() or ""
        texts[str(length)] = {"kernels": text.count('"tpu_custom_call"'), "moved": "all-" in text}
    return texts


MERGED = {  # heads (of which a device gets half), tokens of each stream, how many streams ask, dtype
    "512 px": (24, (1024, 205), 2, "bfloat16"),
    "512 px, image": (24, (1024,), 1, "bfloat16"),
    "odd lengths, 19 heads a device": (38, (1000, 154), 2, "bfloat16"),
    "1024 px, text only read": (24, (4096, 333), 1, "bfloat16"),
    "float32": (24, (1024, 205), 2, "float32"),
}


def _compiled_merged(name: str, only: str = "") -> dict[str, Any]:
    """The same of merged attention, forward and backward."""
    from fopd_jax.performance.topology import configure, parse_topology, topology_devices

    topology = parse_topology(name)
    configure(topology)
    mesh = make_mesh(MeshShape(data=2, tensor=2), topology_devices(topology))
    sharding = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))

    def compiled(heads: int, tokens: tuple[int, ...], asking: int, dtype: str) -> Any:
        def stream(i: int, length: int) -> Stream:
            x: Any = jax.ShapeDtypeStruct((4, length, heads * 64), dtype, sharding=sharding)
            scale: Any = jax.ShapeDtypeStruct((64,), "float32", sharding=NamedSharding(mesh, P()))
            return Stream(x if i < asking else None, x, x, scale, scale)

        @jax.jit
        def program(streams: Any) -> Any:
            with activation_rules(mesh):
                outs, pull = jax.vjp(lambda streams: merged_attention(streams, 64), streams)
                return outs, pull(outs)

        text = program.lower(tuple(stream(*each) for each in enumerate(tokens))).compile().as_text() or ""
        return {"kernels": text.count('"tpu_custom_call"'), "moved": "all-to-all" in text or "all-gather" in text}

    return {case: compiled(*facts) for case, facts in MERGED.items() if only in case}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_merged_compiles_for_tpus(name: str):
    """One kernel forward and one backward, at every length; nothing but the scales' gradient crosses devices."""
    assert _child(f"merged {name}") == {case: {"kernels": 2, "moved": False} for case in MERGED}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2"])
def test_splash_compiles_for_tpus(name: str):
    """One kernel forward and one backward at 512 px (image alone, with text) and 1024 px; no data moves."""
    assert _child(name) == {length: {"kernels": 2, "moved": False} for length in ("1024", "1229", "4429")}


# ---- what the backward repeats


def _rematerialised(impl: Any, policy: Any) -> Any:
    def loss(x: Any) -> Any:
        out = attention(x, 2 * x, 3 * x, impl)
        return jnp.sin(out).astype(jnp.float32).sum()

    return jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy)))


@pytest.mark.parametrize("impl", ["splash", "merged"])
def test_saved_attention_is_not_repeated_by_a_kernel(impl: str):
    x = _inputs(1, 40)[0]
    traces = [_rematerialised(impl, policy).trace(x) for policy in (None, save_attention)]
    counts = [each.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") for each in traces]
    assert counts == [3, 2]  # forward and backward, and without the policy the forward once more


@pytest.fixture
def traced_cudnn() -> Iterator[None]:
    """Let cuDNN's attention be traced where there is none to run it."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    with mock.patch.multiple(
        cudnn, check_cudnn_version=lambda: 91000, check_compute_capability=lambda _: True
    ):  # what JAX asks of the machine while tracing
        yield


@pytest.mark.usefixtures("traced_cudnn")
def test_saved_attention_is_not_repeated_by_cudnn():
    x = _inputs(1, 40, jnp.bfloat16)[0]
    traces = [str(_rematerialised("cudnn", policy).trace(x).jaxpr) for policy in (None, save_attention)]
    assert [each.count(" dot_product_attention_fwd_wrapper[") for each in traces] == [2, 1]


@pytest.mark.usefixtures("traced_cudnn")
@pytest.mark.parametrize("length", [40, 41])
def test_cudnn_has_a_gradient_at_odd_lengths(length: int):
    """JAX's own call refuses it at 41, which no CPU would ever tell."""
    inputs = _inputs(1, length, jnp.bfloat16)
    shapes = [each.shape for each in jax.eval_shape(functools.partial(_outcome, "cudnn"), *inputs)]
    assert shapes == [inputs[0].shape] * 4


@pytest.mark.parametrize("length", [40, 41])
def test_the_row_that_cudnn_is_given_beside_changes_nothing(length: int, monkeypatch: pytest.MonkeyPatch):
    """The same call with JAX's plain products for cuDNN's, in float32: only the order of sums may differ."""
    inputs, plain = _inputs(2, length), jax.nn.dot_product_attention
    exact = _outcome("xla", *inputs)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, **kwargs: plain(*args, **kwargs | {"implementation": "xla"})
    )
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), _outcome("cudnn", *inputs), exact, strict=True):
        assert _error(ours, theirs) <= FLOAT32, name


def test_saved_attention_is_kept_by_xla():
    """The scores are made again; the product of weights and values, which makes the output, is not."""
    length = 40
    x = _inputs(1, length)[0]
    costs = [
        _rematerialised("xla", policy).lower(x).compile().cost_analysis()["flops"] for policy in (None, save_attention)
    ]
    assert costs[0] - costs[1] == pytest.approx(2 * length**2 * HEADS * HEAD_DIM, rel=0.02)


# ---- on a GPU


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("length", [1024, 1229])
def test_cudnn_equals_xla_in_bfloat16(length: int):
    inputs = _inputs(2, length, jnp.bfloat16, 24, 64)
    exact = jax.jit(functools.partial(_outcome, "xla"))(*(x.astype(jnp.float32) for x in inputs))
    found = jax.jit(functools.partial(_outcome, "cudnn"))(*inputs)
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), found, exact, strict=True):
        assert _error(ours, theirs) <= BFLOAT16, name


def _main(what: str) -> None:
    if what == "groups":
        with mock.patch.object(splash, "make_splash_mha_single_device", INTERPRETED):
            print(json.dumps({case: _grouped(once) for case, once in GROUPS.items()}))
    elif what == "merged groups":
        with interpreted_kernels():
            print(json.dumps({"one sum a row": _merged_groups(("data",))}))
    elif what.startswith("merged "):
        print(json.dumps(_compiled_merged(*what.split(maxsplit=2)[1:])))
    else:
        print(json.dumps(_compiled(what)))


if __name__ == "__main__":
    _main(sys.argv[1])
