"""The examination of an installation: what it finds, what it calls broken, and the remedy for each thing missing."""

import errno
from importlib import metadata

import pytest

from polygpt.runtime import doctor


def test_every_check_has_a_finding_and_all_that_is_missing_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYGPT_CACHE", str(tmp_path / "cache"))
    checks, figures = zip(*doctor.examine(seconds=0.01, runs=tmp_path / "runs"), strict=True)
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) and {"Python", "packages", "devices", "matmul float32"} <= set(names)
    assert {name.removeprefix("extra ") for name in names if name.startswith("extra")} == set(doctor.EXTRAS)
    assert all(check.found and bool(check.remedy) == (check.status != "ok") for check in checks)
    found = {key: value for one in figures for key, value in one.items()}
    assert found["gflops_float32"] > 0 and found["versions"]["jax"] == metadata.version("jax")
    assert not (tmp_path / "runs").exists(), "nothing is made but the cache folder"


def test_extras_are_those_of_the_package():
    assert set(doctor.EXTRAS) == set(metadata.metadata("polygpt").get_all("Provides-Extra"))


def test_rate_counts_the_operations_of_products(monkeypatch):
    clock = iter([0.0, 0.5, 1.0, 1.5, 2.0, 2.0])  # begin; after each product; at the end
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(clock))
    rate, right = doctor._rate("float32", 8, seconds=1.5)
    assert right and rate == pytest.approx(2 * 8**3 * 3 / 2.0 / 1e9)


@pytest.mark.parametrize(
    ("requires", "status", "said"),
    [
        (["jax>=0.10", "nowhere-at-all>=2"], "broken", "nowhere-at-all>=2"),
        (["jax>=99"], "broken", "jax>=99"),
        (['nowhere; python_version < "3"', 'nowhere; extra == "gpu"'], "ok", "jax"),
        (["jax[no-such-thing]>=0.10"], "ok", "jax"),
    ],
)
def test_packages_that_are_missing_or_too_old_are_broken(monkeypatch, requires, status, said):
    real = metadata.requires
    monkeypatch.setattr(metadata, "requires", lambda name: requires if name == "polygpt" else real(name))
    check, figures = doctor._packages()
    assert check.status == status and said in check.found and bool(figures["missing"]) == (status == "broken")


def test_an_extra_asks_for_the_extras_of_its_packages(monkeypatch):
    asked = {"polygpt": ['jax[cuda]; extra == "gpu"'], "jax": ['cuda-plugin; extra == "cuda"']}
    monkeypatch.setattr(metadata, "requires", lambda name: asked[name])
    check, figures = doctor._extra("gpu", "GPUs")
    assert (check.status, figures["installed"]) == ("note", False) and "'.[gpu]'" in check.remedy
    asked["jax"] = ['numpy; extra == "cuda"']
    assert doctor._extra("gpu", "GPUs")[1]["installed"]


def test_devices_that_cannot_be_found_are_broken(monkeypatch):
    import jax

    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    check, _ = doctor._devices()
    assert check.status == "broken" and "'cuda'" in check.found and check.remedy == "unset JAX_PLATFORMS"


def test_an_accelerator_that_jax_does_not_use_is_named(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    check, _ = doctor._devices()
    assert check.status == "note" and "GPU" in check.found and "'.[gpu]'" in check.remedy


def test_a_wrong_product_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "_rate", lambda dtype, width, seconds: (1.0, dtype == "float32"))
    right, wrong = [check for check, _ in doctor._speed(0.01)]
    assert (right.status, wrong.status) == ("ok", "broken")


def test_folders_that_cannot_be_written_and_full_disks(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    check, _ = doctor._writable(tmp_path / "file" / "cache")
    assert check.status == "broken" and "POLYGPT_CACHE" in check.remedy

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", full)
    assert "No space left" in doctor._writable(tmp_path / "cache")[0].found
    for free, status in ((6e9, "ok"), (1e9, "note"), (1e6, "broken")):
        monkeypatch.setattr(doctor, "_free", lambda folder, free=free: free)
        assert doctor._disk(tmp_path / "no" / "runs")[0].status == status
