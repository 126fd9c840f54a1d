"""Settings that all tests share."""

import os
import shutil
import tempfile


def pytest_configure(config):
    # Set before jax is imported, and in the environment, so that xdist's workers and the processes that tests start
    # inherit them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    if "POLYGPT_CACHE" not in os.environ:  # the embedded data is prepared once a session
        config.polygpt_cache = os.environ["POLYGPT_CACHE"] = tempfile.mkdtemp(prefix="polygpt-tests-")

    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure(config):
    if folder := getattr(config, "polygpt_cache", None):
        shutil.rmtree(folder, ignore_errors=True)
