"""The PyTorch peer of the benchmark: eager PyTorch with microsoft/mup, one learning rate at a time.

Needs ``pip install torch mup`` (tried with torch 2.13.0 on CPU and mup 1.0.0). Where PyTorch sees a
GPU it runs there, with TF32 products, as JAX has them by default.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import mup  # pyright: ignore[reportMissingImports]
import numpy as np
import numpy.typing as npt
import torch  # pyright: ignore[reportMissingImports]
from mup import init as mup_init  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]

BASE_WIDTH = 64
WARM_UP_STEPS = 10
THREADS = 2


class MLP(nn.Module):
    """Bias-free ReLU MLP ``dim -> width (x hidden_layers) -> 1`` with a mup readout."""

    def __init__(self, dim: int, width: int, hidden_layers: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(hidden_layers):
            layers += [nn.Linear(dim if i == 0 else width, width, bias=False), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.readout = mup.MuReadout(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return one output per sample, shape (batch,)."""
        return self.readout(self.hidden(x)).squeeze(-1)


def _make_model(dim: int, width: int, hidden_layers: int, seed: int) -> MLP:
    torch.manual_seed(seed)
    model = MLP(dim, width, hidden_layers)
    base = MLP(dim, BASE_WIDTH, hidden_layers)
    delta = MLP(dim, 2 * BASE_WIDTH, hidden_layers)
    mup.set_base_shapes(model, base, delta=delta)
    for parameter in model.parameters():  # Variance 1 / fan_in; 1 / BASE_WIDTH for the readout.
        mup_init.kaiming_normal_(parameter, nonlinearity="linear")
    return model


def _train(
    model: MLP, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, indices: Tensor
) -> Tensor:
    loss = torch.full((), torch.nan)
    for step in range(len(indices)):
        chosen = indices[step]
        optimizer.zero_grad(set_to_none=True)
        loss = 0.5 * nn.functional.mse_loss(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
    return loss.detach()


def run(
    width: int,
    learning_rates: Sequence[float],
    steps: int,
    dim: int,
    batch: int,
    hidden_layers: int = 1,
    *,
    data: tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]],
    indices: npt.NDArray[np.integer],
    seed: int = 0,
    fused: bool | None = None,
) -> tuple[float, npt.NDArray[np.float32]]:
    """Train the MLP in float32 with MuAdam, once per learning rate, and time it.

    Args:
        width: Width of the hidden layers.
        learning_rates: Nominal learning rates, trained one after another from the same weights.
        steps: Optimizer steps per learning rate.
        dim: Input dimension.
        batch: Batch size.
        hidden_layers: Number of hidden layers.
        data: Inputs (samples, dim) and targets (samples,) or (samples, 1).
        indices: The samples in each step's batch, shape (at least ``steps``, batch).
        seed: Seed of the initial weights.
        fused: Passed to Adam; None is PyTorch's default, True its fused kernel.

    Returns:
        The seconds taken by all training steps of all learning rates (building the models and the
        warm-up are not counted), and for each learning rate the loss on its last batch, taken
        before the last step.
    """
    torch.set_num_threads(THREADS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    x = torch.as_tensor(np.asarray(data[0], dtype=np.float32), device=device)
    y = torch.as_tensor(np.asarray(data[1], dtype=np.float32).reshape(-1), device=device)
    chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64)[:steps], device=device)
    if x.shape != (len(y), dim) or chosen.shape != (steps, batch):
        raise ValueError(
            f"expected data of shapes (samples, {dim}) and (samples,) and indices of at least "
            f"({steps}, {batch}), got {x.shape}, {y.shape} and {np.shape(indices)}"
        )

    def prepare(learning_rate: float) -> tuple[MLP, torch.optim.Optimizer]:
        model = _make_model(dim, width, hidden_layers, seed).to(device)
        return model, mup.MuAdam(model.parameters(), lr=learning_rate, fused=fused)

    warm_up = chosen[torch.arange(WARM_UP_STEPS) % steps]
    _train(*prepare(learning_rates[0]), x, y, warm_up)

    seconds = 0.0
    losses: list[Tensor] = []
    for learning_rate in learning_rates:
        model, optimizer = prepare(learning_rate)
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(_train(model, optimizer, x, y, chosen).cpu())
        seconds += time.perf_counter() - start
    return seconds, torch.stack(losses).numpy()
