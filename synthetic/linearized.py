"""Linear and linearized networks on fixed points: a kernel gives what training comes to.

The linearization of a model `f(θ, x)` at its initial weights `θ_0` is

    f_lin(θ_0 + δ, x) = f(θ_0, x) + ∂_θ f(θ_0, x) · δ,

linear in the displacement δ, which alone is trained. Full-batch gradient descent on

    L(δ) = (1/2P) Σ_{p ≤ P} ‖f_lin(x_p) − y_p‖²

at rate η then does `r_{t+1} = (I − ηK/P) r_t` to the residual `r`, `K` the tangent kernel at `θ_0`
(Jacot, Gabriel and Hongler, arXiv 1806.07572; Lee et al., arXiv 1902.06720).

The two-layer ReLU network in the NTK scaling is Ghosh, Wu and Bietti's (arXiv 2512.22768) simplest
model of a wide network: `f = Σ_j a_j relu(⟨w_j, x⟩) / √n`, `a_j ~ N(0, 1)`, `w_j ~ N(0, I_d)`. Its
kernel is `[H Hᵀ + (X Xᵀ) ∘ (B Bᵀ)] / n` with `H = relu(X Wᵀ)`, `B_pj = a_j 1{⟨w_j, x_p⟩ > 0}`.

Random features, `f = Σ_j a_j σ(⟨w_j, x⟩) / √n` with the same W, held fixed, and `a = 0` at first,
are linear as they are: their kernel is `H Hᵀ / n` with `H = σ(X Wᵀ)`.

To sweep one, all factors of the parametrization must be 1, as the model carries its own scaling:

    as_built = Parametrization("as built", {"sgd": {role: Exponents() for role in
                               ("input", "hidden", "output", "vector")}})
    sweep(linearize(two_layer_relu(d)), fixed_points(x, y), optax.sgd, as_built, widths=[...], ...)
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mupjax.adapters import Model
from mupjax.setting import Predict, Setting

__all__ = [
    "fixed_points",
    "linearize",
    "random_features",
    "random_features_kernel",
    "two_layer_kernel",
    "two_layer_relu",
]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "erf": jax.scipy.special.erf,
    "relu": jax.nn.relu,
}


def two_layer_relu(input_dim: int) -> Callable[[int], Model]:
    """`f(x) = Σ_j a_j relu(⟨w_j, x⟩) / √n`, all entries of a and W from N(0, 1).

    Args:
      input_dim: d; inputs have shape (B, d).

    Returns:
      `factory(width)`; the model's outputs have shape (B,). Parameters: `hidden/kernel`, Wᵀ of
      shape (d, n), and `readout/kernel`, a of shape (n, 1).

    Raises:
      ValueError: a dimension that is not a whole number, at least 1.
    """
    d = _count("input_dim", input_dim)

    def factory(width: int) -> Model:
        n = _count("width", width)

        def init(key: jax.Array) -> Any:
            hidden, readout = jax.random.split(key)
            return {
                "hidden": {"kernel": jax.random.normal(hidden, (d, n))},
                "readout": {"kernel": jax.random.normal(readout, (n, 1))},
            }

        def apply(params: Any, x: jax.Array, width: jax.Array | int = n) -> jax.Array:
            h = jax.nn.relu(x @ params["hidden"]["kernel"])
            # `width` is the true one where the arrays are zero-padded to a larger.
            scale = jnp.sqrt(jnp.asarray(width, h.dtype))
            return (h @ params["readout"]["kernel"])[:, 0] / scale

        return Model(init, apply, options=frozenset({"width"}))

    return factory


def two_layer_kernel(params: Any, x: jax.Array) -> jax.Array:
    """Tangent kernel of `two_layer_relu` at its parameters, on inputs x (P, d): shape (P, P)."""
    W, a = params["hidden"]["kernel"], params["readout"]["kernel"]
    z = x @ W
    h, b = jax.nn.relu(z), jnp.where(z > 0, a.T, 0)
    return (h @ h.T + (x @ x.T) * (b @ b.T)) / W.shape[1]


def random_features(input_dim: int, activation: str = "erf") -> Callable[[int], Model]:
    """`f(x) = Σ_j a_j σ(⟨w_j, x⟩) / √n`, W from N(0, 1) and fixed, a zero and trained.

    Args:
      input_dim: d; inputs have shape (B, d).
      activation: σ, `"erf"` or `"relu"`.

    Returns:
      `factory(width)`; the model's outputs have shape (B,). Parameters: `features/kernel`, Wᵀ of
      shape (d, n), which gets no gradient (leave out weight decay), and `readout/kernel`, (n, 1).

    Raises:
      ValueError: a dimension that is not a whole number, at least 1; an unknown activation.
    """
    d, sigma = _count("input_dim", input_dim), _activation(activation)

    def factory(width: int) -> Model:
        n = _count("width", width)

        def init(key: jax.Array) -> Any:
            return {
                "features": {"kernel": jax.random.normal(key, (d, n))},
                "readout": {"kernel": jnp.zeros((n, 1))},
            }

        def apply(params: Any, x: jax.Array, width: jax.Array | int = n) -> jax.Array:
            h = sigma(x @ jax.lax.stop_gradient(params["features"]["kernel"]))
            # `width` is the true one where the arrays are zero-padded to a larger.
            scale = jnp.sqrt(jnp.asarray(width, h.dtype))
            return (h @ params["readout"]["kernel"])[:, 0] / scale

        return Model(init, apply, options=frozenset({"width"}))

    return factory


def random_features_kernel(params: Any, x: jax.Array, activation: str = "erf") -> jax.Array:
    """Tangent kernel of `random_features` on inputs x (P, d): shape (P, P)."""
    h = _activation(activation)(x @ params["features"]["kernel"])
    return h @ h.T / h.shape[1]


def linearize(factory: Callable[[int], Model], *, centred: bool = False) -> Callable[[int], Model]:
    """The linearization at the initial weights of every model of a family.

    Args:
      factory: `factory(width)` giving a `mupjax.Model`.
      centred: leave out `f(θ_0, x)`, so that training starts from `f = 0` (the limit of Chizat,
        Oyallon and Bach's doubled networks, arXiv 1812.07956) and not from a random function.

    Returns:
      A factory of models with parameters `initial` (θ_0, which gets no gradient: leave out weight
      decay, which moves a weight without one) and `displacement` (δ, zero at the start), each a
      tree like the original's. Options and layouts are kept.

    Raises:
      TypeError: the factory gives something other than a `mupjax.Model`.
    """

    def linearized(width: int) -> Model:
        model = factory(width)
        if not isinstance(model, Model):
            raise TypeError(
                f"the factory gave {type(model).__name__} at width {width}; linearize needs a "
                "mupjax.Model(init, apply) of pure functions"
            )

        def init(key: jax.Array) -> Any:
            initial = model.init(key)
            return {"initial": initial, "displacement": jax.tree.map(jnp.zeros_like, initial)}

        def apply(params: Any, *inputs: Any, **options: Any) -> Any:
            initial = jax.lax.stop_gradient(params["initial"])
            value, change = jax.jvp(
                lambda p: model.apply(p, *inputs, **options), (initial,), (params["displacement"],)
            )
            return change if centred else jax.tree.map(jnp.add, value, change)

        layouts = {
            f"{part}/{path}": layout
            for part in ("initial", "displacement")
            for path, layout in model.layouts.items()
        }
        return Model(init, apply, layouts, model.options)

    return linearized


def fixed_points(
    x: ArrayLike, y: ArrayLike, *, validation: tuple[ArrayLike, ArrayLike] | None = None
) -> Setting:
    """Regression on P fixed points, all of them in every batch: `L = (1/2P) Σ_p ‖f(x_p) − y_p‖²`.

    Args:
      x: inputs, shape (P, ...).
      y: targets, shape (P,) or (P, C): that of the model's outputs.
      validation: inputs and targets to evaluate on; the training points if left out, and then the
        reported loss is the training loss.

    Returns:
      A setting. Arrays in float64 stay so inside `jax.enable_x64(True)`, and are float32 outside.

    Raises:
      ValueError: shapes that do not fit one another, or entries that are not finite.
    """
    train = _pairs("x and y", x, y)
    held_out = train if validation is None else _pairs("validation", *validation)
    if held_out[0].shape[1:] != train[0].shape[1:] or held_out[1].shape[1:] != train[1].shape[1:]:
        raise ValueError(
            f"validation holds points of shapes {held_out[0].shape[1:]}, {held_out[1].shape[1:]} "
            f"and x, y of {train[0].shape[1:]}, {train[1].shape[1:]}; expected the same"
        )

    def sample(data: Any, key: jax.Array, step: jax.Array) -> Any:
        del key, step
        return data

    def loss(predict: Predict, batch: Any) -> jax.Array:
        inputs, targets = batch
        out = predict(inputs)
        if out.shape != targets.shape:
            raise ValueError(f"outputs have shape {out.shape}, targets {targets.shape}")
        return jnp.sum(jnp.square(out - targets)) / (2 * targets.shape[0])

    facts = {"points": len(train[0]), "loss": "half the squared error, summed over outputs"}
    return Setting("fixed points", sample, loss, held_out, train, configuration=facts)


def _pairs(name: str, x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = np.asarray(x), np.asarray(y)
    if inputs.ndim < 1 or len(inputs) == 0 or targets.shape[:1] != inputs.shape[:1]:
        raise ValueError(
            f"{name} have shapes {inputs.shape} and {targets.shape}; expected (P, ...) and (P,) or "
            "(P, C), with P >= 1"
        )
    if not (np.isfinite(inputs).all() and np.isfinite(targets).all()):
        raise ValueError(f"{name} hold entries that are not finite; remove those points")
    return inputs, targets


def _activation(name: str) -> Callable[[jax.Array], jax.Array]:
    if name not in _ACTIVATIONS:
        known = ", ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"activation={name!r} is not known; use one of {known}")
    return _ACTIVATIONS[name]


def _count(name: str, value: Any) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(f"{name} must be whole and at least 1, got {value!r}")
    return int(value)
