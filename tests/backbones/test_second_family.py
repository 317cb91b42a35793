"""A network of another shape through the unchanged stages: trained, exported, sampled, split, compiled, counted.

The mesh and the compilation for eight devices each run in a process of their own (this file, as a program).
"""

import concurrent.futures
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.compilation_cache import compilation_cache

from fopd_jax import compile_for, main, notebook
from fopd_jax.adapters.lora import Adapter, delta, init_adapter
from fopd_jax.backbones.weights import init_variables
from fopd_jax.config.parse import override, resolve
from fopd_jax.config.schema import OPD, Anchor, LoRAConfig, MeshShape, Model, RoutedTask
from fopd_jax.flow.rollout import sample_keys
from fopd_jax.flow.transition import standard_normal
from fopd_jax.interop.files.safetensors import load_adapter, load_tree, save_adapter, save_tree
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.performance.weights import random_arguments
from fopd_jax.stages.problem import make_problem
from tests.backbones.rope_family import PRESET, PRESETS, ROPE, TARGETS, TEXT, RopeDiT, encode, install, make_world
from tests.quick import environment

ROOT = Path(__file__).parents[2]
STEPS, BETA, GUIDANCE = 4, 0.3, 2.0
LORA = LoRAConfig(rank=2, alpha=4.0, targets=("self", "cross"))
EXPERTS = ("blue", "red", "calm")  # two teachers, in the order that a config keeps them in, and the anchor
GRADIENT = 1e-4  # relative L2, of float32 sums in another order
MESHES = 1e-5
TIMEOUT = 600.0

Tree = Any


def _noisy(seed: int, tree: Tree, std: float) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noisy = [np.asarray(leaf) + std * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, noisy)


def _write_weights(folder: Path) -> None:
    """A random base, random teachers and an anchor."""
    variables = jax.jit(lambda: init_variables(RopeDiT(PRESETS[PRESET]), make_world().latent_shape, 0))()
    save_tree(folder / "base.safetensors", variables, {"preset": PRESET})
    for seed, name in enumerate(EXPERTS, start=1):
        fresh = init_adapter(jax.random.key(seed), variables["params"], LORA, TARGETS)
        save_adapter(folder / f"{name}.safetensors", _noisy(seed, fresh, 0.1), {"preset": PRESET})


def _config(weights: Path, **changes: Any) -> OPD:
    config = OPD(
        name="rope",
        model=Model(preset=PRESET, path=f"{weights}/base.safetensors", dtype="float32"),
        adapter=LORA,
        batch_size=4,
        tasks={name: RoutedTask(f"{weights}/{name}.safetensors", guidance=GUIDANCE) for name in EXPERTS[:2]},
        anchor=Anchor(EXPERTS[2], f"{weights}/{EXPERTS[2]}.safetensors", guidance=GUIDANCE),
        guidance=GUIDANCE,
    )
    settings = {
        "sampler.num_steps": 3, "objective.name": "direct", "objective.weighting": "uniform",
        "objective.mar_beta": BETA, "optimizer.learning_rate": 1e-2, "optimizer.clip_norm": 1e9, "ema.every": 1,
        "eval.samples": 4, "eval.final_samples": 4, "eval.batch_size": 4, "eval.num_steps": 2, "eval.guidance": 1.5,
        "run.steps": STEPS, "run.checkpoint_every": 2, "run.eval_every": 2, "run.attention": "xla",
    }  # fmt: skip
    return resolve(override(config, settings | changes))


@pytest.fixture(scope="module", autouse=True)
def family() -> Iterator[None]:
    """Known while these tests run, in which programs are compiled once; optax itself promotes dtypes."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        install(patch)
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", settings["jax_compilation_cache_dir"])  # runs keep to it
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rope")
    _write_weights(folder)
    return folder


@pytest.fixture(scope="module")
def elsewhere(weights: Path) -> Iterator[dict[str, "concurrent.futures.Future[Path]"]]:
    """What the programs for more devices write; they run beside the tests."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield {name: pool.submit(_program, name, weights) for name in PROGRAMS}


@pytest.fixture(scope="module")
def straight(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a whole run."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    main.run(_config(weights), folder)
    return folder


def _gradient(state: Any) -> Tree:
    """Of the first update, from Adam's first moment, which is (1 - β₁) of it."""
    return jax.tree.map(lambda leaf: leaf / (1 - 0.9), optax.tree_utils.tree_get(state.opt_state, "mu").weights)


def _vector(tree: Tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# ---- training


@pytest.mark.usefixtures("elsewhere")
def test_an_update_descends_the_loss_that_merged_networks_define(weights: Path, tmp_path: Path):
    """One trained timestep, at noise alone; each policy is a plain network with its adapter's product in its kernels.

    Guided velocities of student, each sample's teacher and the anchor: mean squares, β times those to the anchor.
    """
    config = _config(weights, **{"sampler.num_steps": 2})
    stage = main.prepare(config, tmp_path / "run")
    state, batch = stage.start(), stage.batch(0)
    trained, levels = state.trained, (1.0,)
    keys = sample_keys(state.rng(), 1 + len(levels), config.batch_size)
    x = standard_normal(keys[0], make_world().latent_shape)
    base = load_tree(weights / "base.safetensors")[0]["params"]
    experts = [load_adapter(weights / f"{name}.safetensors")[0] for name in EXPERTS]
    network, null = RopeDiT(PRESETS[PRESET]), jnp.asarray(encode([""]).context)

    def merged(adapter: Adapter) -> Tree:
        kernels: dict[tuple[str, ...], Any] = flatten_dict(base)
        for path, product in flatten_dict(delta(adapter)).items():
            kernels[*path, "kernel"] = kernels[*path, "kernel"] + product
        return unflatten_dict(kernels)

    def guided(adapter: Adapter) -> jax.Array:
        text, empty = (
            network.apply({"params": merged(adapter)}, x, jnp.ones(config.batch_size), context)
            for context in (jnp.asarray(batch.conditioning.context), jnp.broadcast_to(null, (4, *null.shape[1:])))
        )
        return empty + GUIDANCE * (text - empty)

    def loss(weights: Tree) -> jax.Array:
        v, (*teachers, anchor) = guided(Adapter(weights, trained.scale)), [guided(each) for each in experts]
        teacher = jnp.stack([teachers[k][row] for row, k in enumerate(np.asarray(batch.route))])
        return jnp.square(v - teacher).mean() + BETA * jnp.square(v - anchor).mean()

    expected, gradient = jax.jit(jax.value_and_grad(loss))(trained.weights)
    gradient = _vector(gradient)
    after, metrics = stage.advance(state, 0)
    stage.close()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=GRADIENT)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=GRADIENT)
    assert _distance(_vector(_gradient(after)), gradient) <= GRADIENT
    assert set(np.asarray(batch.route)) == {0, 1}  # both teachers were asked


def test_a_run_trains_and_leaves_its_student_and_report(straight: Path, weights: Path):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    student, metadata = load_adapter(straight / "student.safetensors")
    assert metadata["preset"] == PRESET
    assert set(flatten_dict(student.weights, sep="/")) == {
        f"blocks/{path}/{factor}" for group in LORA.targets for path in TARGETS[group] for factor in "ab"
    }
    scores = json.loads((straight / "results.json").read_text())["models"]
    assert set(scores) == {"base", "teacher/red", "teacher/blue", "teacher/calm", "merge", "student"}
    assert all(set(each) == {"red", "blue"} for each in scores.values())
    assert scores["student"] != scores["merge"]


def test_a_student_moves_towards_its_teachers(weights: Path, tmp_path: Path):
    """On one batch and its noises, again and again."""
    stage = main.prepare(_config(weights), tmp_path / "run")
    state, losses = stage.start(), []
    for _ in range(8):
        state, metrics = stage.advance(state.replace(step=jnp.zeros_like(state.step)), 0)
        losses.append(float(metrics["loss"]))
    stage.close()
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_that_is_extended_ends_where_a_straight_one_does(straight: Path, weights: Path, tmp_path: Path):
    for steps in (2, STEPS):
        main.run(_config(weights, **{"run.steps": steps}), tmp_path / "run")
    for name in ("student.safetensors", "results.json"):
        assert (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes()


def test_a_whole_network_trains_and_is_exported(weights: Path, tmp_path: Path):
    """It has no constants: its file holds parameters alone, and is a base again."""
    changes = {
        "trained": "params",
        "cold_start.method": "none",
        "run.steps": 1,
        "run.eval_every": 0,
        "optimizer.learning_rate": 1e-4,
    }
    main.run(_config(weights, **changes), tmp_path / "run")
    student = tmp_path / "run" / "student.safetensors"
    session = notebook.load_pipeline(_config(weights, **{"model.path": str(student)}))
    base = load_tree(weights / "base.safetensors")[0]["params"]
    assert session.variables["constants"] == {}
    assert 0 < _distance(_vector(session.variables["params"]), _vector(base)) < 0.1


# ---- sampling


def test_images_follow_prompt_and_adapter(weights: Path):
    session = notebook.load_pipeline(_config(weights))
    teacher = notebook.load_adapter(session, f"{weights}/red.safetensors")
    base = notebook.generate_images(session, ["red 1", "blue 1"])
    assert base.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(base[0], notebook.generate_images(session, ["red 1"])[0])
    assert (base != notebook.generate_images(session, ["red 1", "blue 1"], teacher)).any()
    assert (base[0] != notebook.generate_images(session, ["red 2"])[0]).any()


# ---- figures


def test_the_benchmarks_problem_is_stated_and_runs_on_random_weights(weights: Path):
    config = _config(weights)
    problem = make_problem(config, make_mesh(MeshShape(), jax.devices()[:1]))
    fields = problem.about
    assert fields["tokens"] == {"image": 16, "text": TEXT}
    assert (fields["preset"], fields["teachers"], fields["anchor"]) == (PRESET, 2, True)
    each = ROPE.flops(PRESETS[PRESET], ROPE.tokens(PRESETS[PRESET], (8, 8, 3), TEXT), LORA, config.run.remat)
    rows = config.batch_size * 2 * 2  # two trained timesteps, guided
    assert problem.flops.teachers == pytest.approx(2 * rows * each.forward)
    assert problem.flops.hardware - problem.flops.model == pytest.approx(rows * each.recomputed)
    _, metrics = problem.update.step(*random_arguments(problem.update))
    assert np.isfinite(metrics["loss"])
    assert not metrics["skipped"]


# ---- more devices


def _split(weights: Path, out: Path) -> None:
    """The first update on four devices, two ways of data by two of weights, and where the weights are."""
    stage = main.prepare(_config(weights, **{"run.mesh.data": 2, "run.mesh.fsdp": 2}), out / "run")
    state, metrics = stage.advance(stage.start(), 0)
    stage.close()
    gate = stage.frozen.variables["params"]["blocks"]["mlp"]["gate"]["kernel"]
    np.savez(
        out / "split.npz", gradient=_vector(_gradient(state)), trained=_vector(state.trained.weights),
        loss=metrics["loss"], devices=jax.device_count(), spec=np.array([str(axis) for axis in gate.sharding.spec]),
    )  # fmt: skip


def _compile(weights: Path, out: Path) -> None:
    fields = compile_for.run(_config(weights), "cpu:8", 2)
    (out / "compile.json").write_text(json.dumps(fields))


PROGRAMS = {"split": (_split, 4), "compile": (_compile, 0)}  # and how many devices the process has from its start


def _program(name: str, weights: Path) -> Path:
    out = weights / name
    out.mkdir()
    count = PROGRAMS[name][1]
    command = [sys.executable, __file__, name, str(weights), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(count), check=False, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return out


def test_a_mesh_changes_nothing(elsewhere: dict[str, Any], weights: Path, tmp_path: Path):
    """Gate kernels are split over `fsdp`, and by the family's own rule over `tensor`."""
    with np.load(elsewhere["split"].result() / "split.npz") as file:
        found = dict(file)
    stage = main.prepare(_config(weights), tmp_path / "run")
    state, metrics = stage.advance(stage.start(), 0)
    stage.close()
    assert (found["devices"], list(found["spec"])) == (4, ["None", "fsdp", "tensor"])
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=MESHES)
    assert _distance(found["gradient"], _vector(_gradient(state))) <= MESHES
    assert _distance(found["trained"], _vector(state.trained.weights)) <= MESHES


def test_the_update_compiles_for_devices_that_are_not_there(elsewhere: dict[str, Any]):
    fields = json.loads((elsewhere["compile"].result() / "compile.json").read_text())
    assert (fields["chips"], fields["batch_size"], fields["teachers"]) == (8, 16, 2)
    assert fields["loop_reductions"]["count"] == 0
    adapter = 4 * 2 * 2 * PRESETS[PRESET].width * 8 * PRESETS[PRESET].depth  # float32, a and b, all of width to width
    (row,) = [row for row in fields["collectives"] if row["kind"] == "all-reduce"]
    assert adapter <= row["bytes"] < 1.1 * adapter


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patched:
        install(patched)
        jax.config.update("jax_default_matmul_precision", "highest")
        PROGRAMS[sys.argv[1]][0](Path(sys.argv[2]), Path(sys.argv[3]))
