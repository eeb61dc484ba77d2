"""Settings that hold for every test: no silent broadcasting, a processor, no windows."""

import os
import tempfile

# Before JAX starts; a subprocess that a test starts inherits them. JAX_PLATFORMS=cuda tests a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "Agg"

# Tests compile the same small programs over and over: one cache for a run of pytest, its workers
# and the subprocesses they start, which inherit it. It goes with the run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compilations = tempfile.TemporaryDirectory(prefix="mupjax-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compilations.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax

# An (n,) array added to an (S, n) one by accident is the commonest wrong answer that no one sees.
jax.config.update("jax_numpy_rank_promotion", "raise")
