"""Settings that hold for every test: no silent broadcasting, a processor, no windows."""

import os

# Before JAX starts; a subprocess that a test starts inherits them. JAX_PLATFORMS=cuda tests a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "Agg"

import jax

# An (n,) array added to an (S, n) one by accident is the commonest wrong answer that no one sees.
jax.config.update("jax_numpy_rank_promotion", "raise")
