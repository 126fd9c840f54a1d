"""What was compiled once is not compiled again; what depends on another thing is."""

import dataclasses

import jax
import tiny

from polygpt import topology
from polygpt.overrides import override
from polygpt.scale.plan import cache, compilation
from polygpt.scale.plan.cache import Cached
from polygpt.scale.plan.target import target
from polygpt.sharding import MeshSpec


def test_a_step_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYGPT_CACHE", str(tmp_path))
    compiled, real = [], topology.compiled
    monkeypatch.setattr(topology, "compiled", lambda lowered: compiled.append(lowered) or real(lowered))
    small = {"model.decoder.width": "8", "model.decoder.depth": "0", "data.batch_size": "1", "data.layout.seq_len": "8"}
    chosen = override(tiny.experiment(), small)
    chosen = chosen.replace(train=chosen.train.replace(parallel="single", mesh=MeshSpec()))
    first, second = (compilation.build(chosen, target("cpu:1")) for _ in range(2))
    assert len(compiled) == 1 and first.text
    for name in ("text", "memory", "seconds", "exhausted"):
        assert getattr(first, name) == getattr(second, name)
    other = chosen.replace(optim=chosen.optim.replace(clip=2 * chosen.optim.clip))
    assert compilation.build(other, target("cpu:1")).text != first.text
    assert len(compiled) == 2
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    compilation.build(other, target("cpu:1"))
    jax.config.update("jax_memory_fitting_effort", 0.5)
    try:
        compilation.build(other, target("cpu:1"))
    finally:
        jax.config.update("jax_memory_fitting_effort", 0.0)
    assert len(compiled) == 4


def test_a_damaged_file_counts_as_none_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYGPT_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "MOST", 2)
    made = Cached("text", {"temp_size_in_bytes": 1}, "", 2.0)
    places = [cache.place(["same", name]) for name in "abc"]
    for place in places:
        cache.write(place, dataclasses.replace(made, text=place.name))
    assert cache.read(places[0]) is None and cache.read(places[2]).text == places[2].name
    places[2].write_bytes(places[2].read_bytes()[:-9])
    assert cache.read(places[2]) is None
