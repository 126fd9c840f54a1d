"""Settings that all tests share, and the one run of a small experiment."""

import contextlib
import gc
import io
import os
import shutil
import signal
import tempfile
from importlib import metadata
from types import SimpleNamespace

import hypothesis
import pytest

import rotation
from rotation import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_report_header,
    pytest_runtest_setup,
    pytest_terminal_summary,
)


def pytest_configure(config):
    rotation.pytest_configure(config)
    hypothesis.settings.register_profile("tests", deadline=None)  # a loaded machine is slow, not wrong
    hypothesis.settings.load_profile("tests")
    # A shell lets its background jobs ignore Ctrl+C, and what they start too; some tests send it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Set before jax is imported, and in the environment, so that xdist's workers and the processes that tests start
    # inherit them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    # Compiling takes most of a small test's time: two thirds of it go without LLVM's optimizations and without the
    # emitters that write each fusion by way of MLIR, and some more with one module per program. XLA's own passes stay.
    # It aborts at a flag that it does not know.
    quick = {"xla_backend_optimization_level": "0"}
    if metadata.version("jaxlib").startswith("0.10."):
        quick |= {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
    flags = os.environ.get("XLA_FLAGS", "")
    new = [f"--{name}={value}" for name, value in quick.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *new]).strip()
    # Full collections, which look at all that jax holds, took a twentieth of the time.
    gc.set_threshold(gc.get_threshold()[0], gc.get_threshold()[1], 100)
    if "POLYGPT_CACHE" not in os.environ:  # the embedded data is prepared once a session
        config.polygpt_cache = os.environ["POLYGPT_CACHE"] = tempfile.mkdtemp(prefix="polygpt-tests-")

    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure(config):
    if folder := getattr(config, "polygpt_cache", None):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def compiled_once():
    """Equal experiments of a module's runs are one program, which is traced and compiled for the first of them."""
    import compiled_once  # imports jax, which is to find the settings above

    with compiled_once.used():
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The outcome of `polygpt train FILE --json`: code, out, err, and the places of the experiment and the run."""
    import compiled_once
    from own_experiment import write_experiment
    from polygpt.cli.main import main  # imports jax, which is to find the settings above

    folder = tmp_path_factory.mktemp("own")
    file = write_experiment(folder)
    out, err = io.StringIO(), io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with compiled_once.used(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["train", str(file), "--json"])
    finally:
        os.chdir(before)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), file=file, run=folder / "runs" / "own")
