"""The OPD update on the true network against PyTorch: diffusers' model, LoRA by hand, autograd, all in float64.

Nothing of the method is shared but weights and noise: rollout, guidance, weighting, surrogate and anchor are written
again here, from their textbook formulas. Tolerances, float32 against float64: 1e-4 on the loss, on ‖a - b‖/‖b‖ over
all adapter gradients, and on that of each layer whose gradient is at least 1e-3 of the whole.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from flax.traverse_util import flatten_dict

from fopd_jax.adapters.lora import Adapter, init_adapter, stack_bank
from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.schema import LoRAConfig, Objective
from fopd_jax.flow.rollout import noise_window
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.flow.transition import SDE, standard_normal
from fopd_jax.interop.sd3.diffusers import module_names, transformer_from_diffusers
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import MMDiT, MMDiTConfig, convert_layers
from fopd_jax.policy.velocity import make_velocity
from fopd_jax.steps.opd.fused import fused_gradients
from fopd_jax.steps.opd.pieces import Pieces, start
from fopd_jax.steps.opd.replay import collect, replayed_gradients
from fopd_jax.steps.opd.spec import Frozen, OPDSpec
from fopd_jax.steps.state import TrainState, init_state
from fopd_jax.worlds.prompt_stream import Batch

TOLERANCE, BETWEEN_FORMS, VISIBLE = 1e-4, 1e-5, 1e-3
CONFIG = MMDiTConfig(
    depth=3, num_heads=2, head_dim=8, dual_layers=1, qk_norm=True, patch_size=2, channels=3,
    context_dim=6, pooled_dim=5, table_size=4, base_size=4,
)  # fmt: skip
LORA = LoRAConfig(rank=2, alpha=3.0, targets=("attn", "attn2", "mlp"))
BATCH, SHAPE, TEXT, STEPS, A = 3, (8, 8, 3), 4, 4, 0.7
SIGMAS = flow_match_sigmas(STEPS)
TEACHERS, ROUTE = ("ocr", "counting"), np.array([1, 0, 1])
GUIDANCE, TEACHER_GUIDANCE = 4.5, (4.5, 1.0, 3.0)  # the last is the anchor's
Names = dict[str, torch.Tensor]


# ---- weights and noise, the only things that both sides share


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@functools.cache
def oracle() -> SD3Transformer2DModel:
    """Float64; weights of variance 1/fan-in, everything else random too, so that no gate is closed."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=3, out_channels=3, num_layers=CONFIG.depth, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=5,
        pos_embed_max_size=4, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip
    with torch.no_grad():
        for seed, (name, tensor) in enumerate(model.state_dict().items()):
            scale = 1.0 if tensor.ndim == 3 else 0.2 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
            tensor.copy_(scale * torch.tensor(normal(seed, *tensor.shape)) + (1.0 if ".norm_" in name else 0.0))
    return model.double()


@functools.cache
def our_variables() -> Any:
    arrays = {name: tensor.detach().numpy().astype(np.float32) for name, tensor in oracle().state_dict().items()}
    return jax.tree.map(jnp.asarray, transformer_from_diffusers(arrays, CONFIG, rows=4, columns=4))


@functools.cache
def adapter(seed: int) -> Adapter:
    """Both factors non-zero in every layer."""
    like = init_adapter(jax.random.key(seed), our_variables()["params"], LORA, TARGETS)
    leaves, structure = jax.tree.flatten(like)
    leaves = [jnp.asarray(0.25 * normal(100 * seed + i, *leaf.shape)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, leaves)


BANK = {"ocr": 2, "counting": 3, "anchor": 4}


def prompts(seed: int, batch: int) -> Conditioning:
    return Conditioning(jnp.asarray(normal(seed, batch, TEXT, 6)), jnp.asarray(normal(seed + 1, batch, 5)))


def our_inputs() -> tuple[Frozen, TrainState, Batch]:
    bank = stack_bank({name: adapter(seed) for name, seed in BANK.items()})
    frozen = Frozen(our_variables(), bank, prompts(902, 1))
    return frozen, init_state(adapter(1), optax.sgd(0.0), 11), Batch(prompts(900, BATCH), jnp.asarray(ROUTE))


def make_pieces(objective: Objective, noisy: np.ndarray) -> Pieces:
    spec = OPDSpec(objective, SDE(A), SIGMAS, noisy, SHAPE, TEACHERS, GUIDANCE, TEACHER_GUIDANCE)
    spec.check(BATCH)
    return Pieces(spec, make_velocity(MMDiT(CONFIG)))


def drawn_noise(pieces: Pieces) -> tuple[np.ndarray, list[np.ndarray]]:
    """The start and the noise of every step, as the rollout draws them."""
    _, state, _ = our_inputs()
    x, keys = start(pieces.spec, state, BATCH)
    return np.asarray(x), [np.asarray(standard_normal(each, SHAPE)) for each in keys]


# ---- the same in PyTorch


def to_torch(array: Any, requires_grad: bool = False) -> torch.Tensor:
    return torch.tensor(np.float64(array), requires_grad=requires_grad)


def torch_factors(weights: Any, requires_grad: bool = False) -> Names:
    """`<module>/a` and `<module>/b` by our per-layer paths."""
    flat = flatten_dict(convert_layers(weights, scan=False), sep="/")
    return {path: to_torch(leaf, requires_grad) for path, leaf in flat.items()}


def adapted(factors: Names) -> Names:
    """diffusers' weights W + (alpha/rank)·B·A, with A = aᵀ and B = bᵀ."""
    state = dict(oracle().state_dict())
    names = module_names(CONFIG)
    for path in factors:
        module, _, factor = path.rpartition("/")
        if factor == "a":
            lora_a, lora_b = factors[path].T, factors[f"{module}/b"].T
            name = f"{names[module]}.weight"
            state[name] = state[name] + LORA.alpha / LORA.rank * (lora_b @ lora_a)
    return state


def torch_velocity(weights: Names, x: torch.Tensor, sigma: float, text: Conditioning, scale: float) -> torch.Tensor:
    """Guided velocity, x `[B, h, w, c]`, in two forwards."""

    def forward(prompt: Conditioning) -> torch.Tensor:
        arguments = {
            "hidden_states": x.permute(0, 3, 1, 2),
            "encoder_hidden_states": to_torch(prompt.context).expand(len(x), -1, -1),
            "pooled_projections": to_torch(prompt.pooled).expand(len(x), -1),
            "timestep": torch.full((len(x),), 1000.0 * sigma, dtype=torch.float64),
            "return_dict": False,
        }
        return torch.func.functional_call(oracle(), weights, (), arguments)[0].permute(0, 2, 3, 1)

    null = forward(prompts(902, 1))
    return null + scale * (forward(text) - null)


def sde(sigma: float, sigma_next: float) -> tuple[float, float, float]:
    """State's and velocity's coefficient and std of Euler-Maruyama, with s = a·sqrt(sigma/(1 - sigma))."""
    s = A * (sigma / (1 - (sigma_next if sigma == 1 else sigma))) ** 0.5
    dt = sigma_next - sigma
    return 1 + s**2 / (2 * sigma) * dt, (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt, s * (-dt) ** 0.5


def log_density(x_next: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """Of each sample, averaged over dimensions."""
    return torch.distributions.Normal(mean, std).log_prob(x_next).mean((1, 2, 3))


def torch_teachers(frozen: dict[str, Names], x: torch.Tensor, sigma: float, text: Conditioning) -> list[torch.Tensor]:
    """The routed teachers' velocities and the anchor's."""
    each = [
        torch_velocity(frozen[name], x, sigma, text, scale) for name, scale in zip(BANK, TEACHER_GUIDANCE, strict=True)
    ]
    chosen = torch.stack([each[k][i] for i, k in enumerate(ROUTE)])
    return [chosen.detach(), each[-1].detach()]


@dataclasses.dataclass
class Visit:
    """One trained step of the rollout."""

    sigma: float
    sigma_next: float
    noisy: bool
    x: torch.Tensor
    x_next: torch.Tensor
    log_prob: torch.Tensor
    targets: list[torch.Tensor]


@torch.no_grad()
def torch_rollout(noisy: np.ndarray, start: np.ndarray, noise: list[np.ndarray]) -> list[Visit]:
    frozen = {name: adapted(torch_factors(adapter(seed).weights)) for name, seed in BANK.items()}
    student, text = adapted(torch_factors(adapter(1).weights)), prompts(900, BATCH)
    x, visits = to_torch(start), []
    for t, draw in enumerate(noise):
        sigma, sigma_next = float(SIGMAS[t]), float(SIGMAS[t + 1])
        v = torch_velocity(student, x, sigma, text, GUIDANCE)
        if noisy[t]:
            p, c, std = sde(sigma, sigma_next)
            x_next = p * x + c * v + std * to_torch(draw)
            log_prob = log_density(x_next, p * x + c * v, std)
        else:
            x_next, log_prob = x + (sigma_next - sigma) * v, torch.zeros(BATCH, dtype=torch.float64)
        targets = torch_teachers(frozen, x, sigma, text)
        visits.append(Visit(sigma, sigma_next, bool(noisy[t]), x, x_next, log_prob, targets))
        x = x_next
    return visits


def torch_visit_loss(objective: Objective, visit: Visit, v: torch.Tensor) -> torch.Tensor:
    """Per-sample loss of one step under weighting `kl`."""
    p, c, std = sde(visit.sigma, visit.sigma_next)
    teacher, anchor = visit.targets

    def kl(target: torch.Tensor) -> torch.Tensor:
        mean, other = p * visit.x + c * v, p * visit.x + c * target
        return ((mean - other) ** 2).mean((1, 2, 3)) / (2 * std**2)

    if objective.name == "direct":
        return kl(teacher) + objective.mar_beta * kl(anchor)
    log_prob = log_density(visit.x_next, p * visit.x + c * v, std)
    reward = -kl(teacher)
    if objective.reward == "log_ratio":
        reward = (log_density(visit.x_next, p * visit.x + c * teacher, std) - log_prob).detach().clamp(-5, 5)
    ratio = torch.exp(log_prob - visit.log_prob)
    clipped = ratio.clamp(1 - objective.clip, 1 + objective.clip)
    margin = float(((ratio - 1).abs() - objective.clip).abs().min().detach())
    assert margin > 1e-5, "a ratio lies at the edge of the clip range, where the two sides may disagree"
    return -torch.minimum(ratio * reward, clipped * reward) + objective.mar_beta * kl(anchor)


def torch_loss_and_gradient(objective: Objective, visits: list[Visit], weights: Any) -> tuple[float, dict[str, Any]]:
    factors = torch_factors(weights, requires_grad=True)
    total, count, text = torch.zeros((), dtype=torch.float64), 0, prompts(900, BATCH)
    for visit in visits:
        if objective.name == "direct" or visit.noisy:
            v = torch_velocity(adapted(factors), visit.x, visit.sigma, text, GUIDANCE)
            total, count = total + torch_visit_loss(objective, visit, v).sum(), count + BATCH
    loss = total / count
    gradients = torch.autograd.grad(loss, list(factors.values()), materialize_grads=True)
    return float(loss.detach()), dict(zip(factors, (g.numpy() for g in gradients), strict=True))


# ---- comparison

EVERYWHERE, WINDOW = np.ones(STEPS, bool), noise_window(STEPS, 1, 3)
CASES = {  # objective, noisy steps, forms; compiling is what these cost
    "direct": (Objective("direct", mar_beta=0.5), EVERYWHERE, ("fused",)),
    "clipped kl": (Objective("clipped", "kl", clip=2e-3, mar_beta=0.5), EVERYWHERE, ("fused", "replayed")),
    "log_ratio, window": (Objective("clipped", "log_ratio", clip=2e-3, mar_beta=0.5), WINDOW, ("replayed",)),
}


def flat(gradients: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.float64(gradients[name]).ravel() for name in sorted(gradients)])


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check_gradient(label: str, found: Adapter, expected: dict[str, np.ndarray]) -> None:
    ours = dict(flatten_dict(convert_layers(found.weights, scan=False), sep="/"))
    assert {name: np.shape(leaf) for name, leaf in ours.items()} == {k: leaf.shape for k, leaf in expected.items()}
    whole = distance(flat(ours), flat(expected))
    layers: dict[str, float] = {}
    for module in {name.rpartition("/")[0] for name in expected}:
        pair = [{k: tree[f"{module}/{k}"] for k in ("a", "b")} for tree in (ours, expected)]
        if np.linalg.norm(flat(pair[1])) > VISIBLE * np.linalg.norm(flat(expected)):
            layers[module] = distance(flat(pair[0]), flat(pair[1]))
    worst = max(layers, key=layers.__getitem__)
    print(f"{label}: gradient {whole:.1e}; worst of {len(layers)} layers {worst} {layers[worst]:.1e}")
    assert whole <= TOLERANCE
    assert layers[worst] <= TOLERANCE
    assert len(layers) >= 20
    unread = [name for name, leaf in expected.items() if not leaf.any()]  # the last block drops its text queries' rows
    assert all(name.startswith("last_block/attn/add_q_proj") for name in unread)
    assert not any(np.any(ours[name]) for name in unread)


def check_loss(label: str, totals: dict[str, jax.Array], expected: float) -> None:
    found = float(totals["loss"].sum() / totals["weight"].sum())
    share = float(totals["clipped"].sum() / totals["weight"].sum())
    print(f"{label}: loss {abs(found / expected - 1):.1e}; share of ratios off the clip range {share:.2f}")
    assert found == pytest.approx(expected, rel=TOLERANCE)


def our_gradients(pieces: Pieces, forms: tuple[str, ...], moved: Adapter) -> dict[str, tuple[Adapter, Any]]:
    """Gradients and totals: at the rollout's own parameters (by either form), and replayed at others."""
    frozen, state, batch = our_inputs()

    def quick(function: Any) -> Any:
        return jax.jit(functools.partial(function, pieces))

    found = {}
    if "fused" in forms:
        found["fused"] = quick(fused_gradients)(frozen, state, batch)
    if "replayed" in forms:
        stored = quick(collect)(frozen, state, batch)
        replay = quick(replayed_gradients)
        found["replayed"] = replay(frozen, state.trained, batch, stored)
        found["off policy"] = replay(frozen, moved, batch, stored)
    return found


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_pytorchs(case: str) -> None:
    objective, noisy, forms = CASES[case]
    pieces = make_pieces(objective, noisy)
    moved = jax.tree.map(lambda leaf: leaf + 0.02 * jnp.asarray(normal(leaf.size, *leaf.shape)), adapter(1))
    found = our_gradients(pieces, forms, moved)
    visits = torch_rollout(noisy, *drawn_noise(pieces))
    for form, (gradients, totals) in found.items():
        weights = (moved if form == "off policy" else adapter(1)).weights
        loss, expected = torch_loss_and_gradient(objective, visits, weights)
        check_loss(f"{case}, {form}", totals, loss)
        check_gradient(f"{case}, {form}", gradients, expected)
    if len(forms) == 2:
        leaves = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found[form][0])]) for form in forms]
        print(f"{case}: fused and replayed {distance(*leaves):.1e}")
        assert distance(*leaves) <= BETWEEN_FORMS
