"""One step of the sampler, from noise level `sigma` down to `sigma_next`: SDE, CPS or ODE.

Every transition is Gaussian with a mean affine in the state and in the velocity,

    x' ~ N(p·x + c·v, std²),    dt = sigma_next - sigma < 0,

where p, c and std depend on the two noise levels and on the noise level `a` of the transition, never on the model. So
two policies that differ only in v have transitions `c·(v1 - v2)` apart, which is what the weightings rest on.

Arithmetic runs in float32, or in the dtype of the state where that is wider. Noise levels are 0-d, so that a step can
be the body of a `lax.scan`. The noise level `a` is a pytree leaf: with `a = 0` SDE and CPS have exactly the ODE step's
coefficients, and `windowed` switches a single step to them under a traced condition. (States may still differ by one
unit in the last place between two compiled programs: where p is the constant 1 the compiler fuses otherwise.)
"""

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Key

from fopd_jax.config.schema import TRANSITIONS

Scalar = Float[Array, ""]
Sigma = Scalar | float
"""A noise level from outside: an array, or a number of Python's."""


class Coefficients(NamedTuple):
    """The Gaussian `N(state·x + velocity·v, std²)` of one step; three 0-d numbers."""

    state: Scalar
    velocity: Scalar
    std: Scalar


@runtime_checkable
class Transition(Protocol):
    """What SDE, CPS and ODE have in common.

    `x`, `v`, `mean` and `noise` are `[B, ...]`; `sigma`, `sigma_next` and `std` are 0-d; of `moments`
    and `velocity_coefficient` noise levels may be Python's floats.
    """

    @property
    def has_density(self) -> bool:
        """Whether the step is random, so that `log_prob` is defined."""
        ...

    def coefficients(self, sigma: Array, sigma_next: Array) -> Coefficients:
        """p, c and std, in the dtype of the noise levels."""
        ...

    def moments(self, x: Array, v: Array, sigma: Sigma, sigma_next: Sigma) -> tuple[Array, Array]:
        """Mean `[B, ...]` and standard deviation (0-d, per dimension) of the next state."""
        ...

    def sample(self, mean: Array, std: Array, noise: Array) -> Array:
        """The next state for standard normal `noise`."""
        ...

    def log_prob(self, x_next: Array, mean: Array, std: Array) -> Array:
        """Log-density of `x_next`, averaged over latent dimensions: `[B]`."""
        ...

    def velocity_coefficient(self, sigma: Sigma, sigma_next: Sigma) -> Array:
        """The 0-d number c in `mean = (...) + c·v`."""
        ...

    def windowed(self, noisy: Array) -> "Transition":
        """This transition where `noisy`, its noiseless form (the ODE step) elsewhere."""
        ...


def _name(name: str) -> Any:
    """A static field that tells the transitions' tree structures apart.

    JAX 0.10.2 compares the structures of two dataclasses by their fields alone, so that a jitted function given SDE and
    CPS in turn could, where their hashes fell together, run the one's program for the other.
    """
    return struct.field(pytree_node=False, default=name)


class _AffineGaussian:
    """What follows from `coefficients` alone, and is therefore the same for every transition."""

    def coefficients(self, sigma: Scalar, sigma_next: Scalar) -> Coefficients:
        raise NotImplementedError

    @property
    def has_density(self) -> bool:
        return True

    def moments(
        self, x: Float[Array, "b *shape"], v: Float[Array, "b *shape"], sigma: Sigma, sigma_next: Sigma
    ) -> tuple[Float[Array, "b *shape"], Scalar]:
        """`(p·x + c·v, std)`; the coefficients take the dtype of the state."""
        x = at_least_float32(x)
        state, velocity, std = self.coefficients(jnp.asarray(sigma, x.dtype), jnp.asarray(sigma_next, x.dtype))
        return state * x + velocity * v.astype(x.dtype), std

    def sample(
        self, mean: Float[Array, "b *shape"], std: Scalar, noise: Float[Array, "b *shape"]
    ) -> Float[Array, "b *shape"]:
        return mean + std * noise

    def velocity_coefficient(self, sigma: Sigma, sigma_next: Sigma) -> Scalar:
        return self.coefficients(at_least_float32(sigma), at_least_float32(sigma_next)).velocity


@struct.dataclass
class SDE(_AffineGaussian):
    """Euler-Maruyama on the SDE that keeps the marginals of the flow (Flow-GRPO).

    With `s = a·sqrt(sigma / (1 - sigma))`:

        mean = x·(1 + s²/(2·sigma)·dt) + v·(1 + s²·(1 - sigma)/(2·sigma))·dt,    std = s·sqrt(|dt|).

    At `sigma = 1`, where s diverges, its denominator uses `sigma_next`, which is the schedule's second level there. The
    first step of a schedule that begins at 1 therefore has `std = a` whatever its length.
    """

    noise_level: Any = 0.7  # float or 0-d float array; Any because tree operations put anything into a leaf
    name: str = _name("sde")

    def coefficients(self, sigma: Scalar, sigma_next: Scalar) -> Coefficients:
        """Written with `s²/sigma = a²/(1 - sigma)`, in which nothing is 0/0 at either end of the schedule.

        Below `sigma = 1` the velocity's coefficient is `(1 + a²/2)·dt`; at 1 it is `dt`.
        """
        a = jnp.asarray(self.noise_level, sigma.dtype)
        dt = sigma_next - sigma
        to_data = 1 - jnp.where(sigma == 1, sigma_next, sigma)
        half_rate = a**2 / (2 * to_data)  # s²/(2·sigma)
        std = a * jnp.sqrt(sigma / to_data * -dt)
        return Coefficients(1 + half_rate * dt, (1 + half_rate * (1 - sigma)) * dt, std)

    def log_prob(
        self, x_next: Float[Array, "b *shape"], mean: Float[Array, "b *shape"], std: Scalar
    ) -> Float[Array, "b"]:
        """Gaussian log-density per dimension, averaged over dimensions; 0 with zero gradient where `std = 0`."""
        safe_std = jnp.where(std > 0, std, jnp.ones_like(std))
        square = _mean_square(_residual(x_next, mean, std))
        log_prob = -square / (2 * safe_std**2) - jnp.log(safe_std) - 0.5 * math.log(2 * math.pi)
        return jnp.where(std > 0, log_prob, jnp.zeros_like(log_prob))

    def windowed(self, noisy: Bool[Array, ""] | bool) -> "SDE":
        return SDE(noise_level=jnp.where(noisy, self.noise_level, 0.0))


@struct.dataclass
class CPS(_AffineGaussian):
    """Coefficient-preserving sampling: the predicted noise is part kept, part redrawn, at the level `sigma_next`.

    With `std = sigma_next·sin(a·π/2)`, `x0 = x - sigma·v`, `x1 = x + (1 - sigma)·v` (Flow-GRPO, released code):

        mean = (1 - sigma_next)·x0 + sqrt(sigma_next² - std²)·x1.

    The noise level lies in [0, 1]; at 1 all noise is redrawn.
    """

    noise_level: Any = 0.7  # float or 0-d float array; Any because tree operations put anything into a leaf
    name: str = _name("cps")

    def coefficients(self, sigma: Scalar, sigma_next: Scalar) -> Coefficients:
        """The mean gathered by x and v, so that at `a = 0` it is the ODE step without rounding.

        `redrawn = sigma_next - sqrt(sigma_next² - std²) = sigma_next·(1 - cos(a·π/2))`, as `2·sin²` of half the angle.
        """
        angle = jnp.asarray(self.noise_level, sigma.dtype) * (math.pi / 2)
        redrawn = 2 * sigma_next * jnp.sin(angle / 2) ** 2
        velocity = (sigma_next - sigma) - redrawn * (1 - sigma)
        return Coefficients(1 - redrawn, velocity, sigma_next * jnp.sin(angle))

    def log_prob(
        self, x_next: Float[Array, "b *shape"], mean: Float[Array, "b *shape"], std: Scalar
    ) -> Float[Array, "b"]:
        """`-(x_next - mean)²` averaged over dimensions: as Flow-GRPO has it, without `1/(2·std²)` or normaliser.

        0 with zero gradient where `std = 0`.
        """
        return -_mean_square(_residual(x_next, mean, std))

    def windowed(self, noisy: Bool[Array, ""] | bool) -> "CPS":
        return CPS(noise_level=jnp.where(noisy, self.noise_level, 0.0))


@struct.dataclass
class ODE(_AffineGaussian):
    """The deterministic Euler step `x' = x + v·dt`: no noise, no density."""

    name: str = _name("ode")

    @property
    def has_density(self) -> bool:
        return False

    def coefficients(self, sigma: Scalar, sigma_next: Scalar) -> Coefficients:
        return Coefficients(jnp.ones_like(sigma), sigma_next - sigma, jnp.zeros_like(sigma))

    def log_prob(
        self, x_next: Float[Array, "b *shape"], mean: Float[Array, "b *shape"], std: Scalar
    ) -> Float[Array, "b"]:
        """Raises TypeError: a deterministic step has no density."""
        raise TypeError("transition: the ODE step has no density, so no log_prob; use 'sde' or 'cps'")

    def windowed(self, noisy: Bool[Array, ""] | bool) -> "ODE":
        return self


def make_transition(name: str, noise_level: float = 0.7) -> Transition:
    """The transition called `name` in {"sde", "cps", "ode"}; "ode" does not use `noise_level`.

    Raises ValueError for any other name, for a negative noise level, and for one above 1 with "cps".
    """
    if name not in TRANSITIONS:
        raise ValueError(f"transition: found {name!r}, expected one of {', '.join(TRANSITIONS)}")
    if name == "ode":
        return ODE()
    highest = 1.0 if name == "cps" else math.inf
    if not (0 <= noise_level <= highest and math.isfinite(noise_level)):
        expected = "a number in [0, 1]" if name == "cps" else "a finite number >= 0"
        raise ValueError(f"noise_level: found {noise_level}, expected {expected} for transition {name!r}")
    return {"sde": SDE, "cps": CPS}[name](noise_level=noise_level)


def standard_normal(
    keys: Key[Array, "b"], shape: tuple[int, ...], dtype: jnp.dtype | type = jnp.float32
) -> Float[Array, "b *shape"]:
    """Standard normal noise `[B, *shape]`, sample i drawn from `keys[i]` alone, whatever the batch around it."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def transition_step(
    transition: Transition,
    x: Float[Array, "b *shape"],
    v: Float[Array, "b *shape"],
    sigma: Sigma,
    sigma_next: Sigma,
    keys: Key[Array, "b"],
) -> tuple[Float[Array, "b *shape"], Float[Array, "b"]]:
    """Draws the next state and its log-probability: `x_next [B, ...]`, `log_prob [B]` (0 for a step without noise).

    The drawn state is an action, hence a constant: the gradient of `log_prob` reaches `v` through the mean only, and
    no gradient leaves through `x_next`.
    """
    mean, std = transition.moments(x, v, sigma, sigma_next)
    if not transition.has_density:
        return jax.lax.stop_gradient(mean), jnp.zeros(mean.shape[:1], mean.dtype)
    noise = standard_normal(keys, mean.shape[1:], mean.dtype)
    x_next = jax.lax.stop_gradient(transition.sample(mean, std, noise))
    return x_next, transition.log_prob(x_next, mean, std)


def at_least_float32(x: Float[Array, "*shape"] | float) -> Float[Array, "*shape"]:
    """The array, or number, in float32, or unchanged where it is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def _residual(x_next: Array, mean: Array, std: Scalar) -> Array:
    """`x_next - mean`, or 0 where there is no noise: of the two `where` that keep gradients zero there, the inner."""
    return jnp.where(std > 0, x_next - mean, jnp.zeros_like(mean))


def _mean_square(residual: Float[Array, "b *shape"]) -> Float[Array, "b"]:
    return jnp.mean(residual**2, axis=tuple(range(1, residual.ndim)))
