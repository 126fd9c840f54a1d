"""A run with adapters on eight devices: its adapter, saved alone, on a base that is split and on one that is not.

    adapted_run.py FOLDER

Run as a process of its own: the number of devices is set once a process.
"""

import sys
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny_experiment import experiment  # noqa: E402

from polygpt.init.from_run import FromRun  # noqa: E402
from polygpt.models.low_rank import LowRank  # noqa: E402
from polygpt.models.prefix import PrefixTuning  # noqa: E402
from polygpt.overrides import override  # noqa: E402
from polygpt.parameters import paths  # noqa: E402
from polygpt.training.adapter import save_adapter  # noqa: E402
from polygpt.training.loggers import Silent  # noqa: E402
from polygpt.training.loop import train  # noqa: E402
from polygpt.training.program import assemble  # noqa: E402
from polygpt.training.run import open_run  # noqa: E402

SETTINGS = {
    "data.batch_size": "8",
    "model.decoder.width": "64",
    "optim.accumulate": "1",
    "optim.schedule.peak_lr": "0.1",  # weights that differ
    "optim.schedule.warmup": "1",
    "train.steps": "2",
    "train.evaluate_every": "null",
    "train.use": "latest",
    "train.parallel": "sharded",
    "train.mesh.fsdp": "2",
    "train.mesh.tensor": "2",
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    base = override(experiment(), SETTINGS)
    train(base, folder / "base", lambda *_: [Silent()])
    added = {"low_rank": LowRank("kernel", rank=2, magnitude=True), "prefix": PrefixTuning(length=2)}
    tuned = base.replace(model=base.model.replace(**added), init=FromRun(path=str(folder / "base")))
    train(tuned, folder / "tuned", lambda *_: [Silent()])
    save_adapter(folder / "tuned", folder / "adapter.npz")
    trained = paths(open_run(folder / "tuned", spread=True).params)
    runs = [open_run(folder / "base", spread=spread, adapter=folder / "adapter.npz") for spread in (True, False)]
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(runs[0].params))
    for name, value in trained.items():
        np.testing.assert_array_equal(paths(runs[0].params)[name], value, err_msg=name)
        np.testing.assert_allclose(paths(runs[1].params)[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    init = FromRun(path=str(folder / "base"), adapter=str(folder / "adapter.npz"))
    following = base.replace(model=runs[0].model.spec, init=init)
    state = assemble(following, runs[0].tokenizer.vocabulary).first_state()
    for name, value in trained.items():
        np.testing.assert_allclose(paths(state.params)[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    # Matrices that are merged on a mesh have other rounding errors than on one device, and are the same base.
    last = base.replace(model=base.model.replace(prefix=PrefixTuning(length=1)))
    last = last.replace(init=FromRun(path=str(folder / "tuned"), exclude="/prefix/"))
    train(last, folder / "last", lambda *_: [Silent()])
    save_adapter(folder / "last", folder / "last.npz")
    runs = [open_run(folder / "tuned", spread=spread) for spread in (True, False)]
    assert runs[0].merged_from == runs[1].merged_from != {}
    merged = [jax.device_get(paths(run.params)) for run in runs]
    assert any(np.any(merged[0][name] != merged[1][name]) for name in runs[0].merged_from), "nothing to tell apart"
    for run in runs:
        run.with_adapter(folder / "last.npz")
    following = last.replace(init=FromRun(path=str(folder / "tuned"), adapter=str(folder / "last.npz")))
    following = override(following, {"train.mesh.fsdp": "1", "train.mesh.tensor": "1", "train.mesh.data": "8"})
    assemble(following, run.tokenizer.vocabulary).first_state()
    print("equal")
