"""The PyTorch peer of the Llama benchmark: eager PyTorch, one learning rate at a time.

Needs ``pip install torch`` (tried with torch 2.13.0). Where PyTorch sees a GPU it runs there,
with TF32 products, as JAX has them by default.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

THREADS = 2
WARM_UP_STEPS = 3


class Attention(nn.Module):
    """Causal self-attention with rotary positions, by PyTorch's fused kernel."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads, size = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        angle = torch.outer(
            torch.arange(context), 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float) / size)
        )
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.scale = 1 / size

    def rotate(self, x: Tensor) -> Tensor:
        """Turn the pairs of coordinates of (B, heads, T, D) by their positions."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, n) to (B, T, n)."""
        B, T, n = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(
            self.rotate(q), self.rotate(k), v, is_causal=True, scale=self.scale
        )
        return self.out(seen.transpose(1, 2).reshape(B, T, n))


class Block(nn.Module):
    """A pre-norm block with SwiGLU."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads, context)
        self.gate = nn.Linear(width, 4 * width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, n) to (B, T, n)."""
        x = x + self.attention(self.first(x))
        y = self.second(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Tokens (B, T) to logits (B, T, V)."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, context) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.readout = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the next token at every position."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


def run(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    learning_rates: Sequence[float],
    batches: npt.NDArray[np.integer],
) -> float:
    """Seconds to train once per learning rate on `batches` (steps, B, T + 1), Adam, float32.

    Building the models and the first steps are not counted.
    """
    torch.set_num_threads(THREADS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    tokens = torch.as_tensor(np.asarray(batches, dtype=np.int64), device=device)
    context = tokens.shape[-1] - 1

    def train(rate: float, steps: Tensor) -> float:
        torch.manual_seed(0)
        model = Llama(vocabulary, width, layers, heads, context).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = torch.tensor(math.nan)
        for batch in steps:
            optimizer.zero_grad(set_to_none=True)
            logits = model(batch[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
        # Waits for the device.
        assert math.isfinite(float(loss.detach()))
        return time.perf_counter() - start

    train(learning_rates[0], tokens[:WARM_UP_STEPS])
    return sum(train(rate, tokens) for rate in learning_rates)
