"""Built-in models (flax.nnx). Roles are inferred, so no layer knows of any parametrization."""

from mupjax.models.cnn import CNN
from mupjax.models.mlp import MLP, RMSNorm
from mupjax.models.transformers import Decoder, gpt2, llama

__all__ = ["CNN", "MLP", "Decoder", "RMSNorm", "gpt2", "llama"]
