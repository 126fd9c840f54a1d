"""Checkpoints: what is kept, what is never restored, and that a donated state is written as it was."""

import contextlib
import dataclasses
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bigram import Bigram

from polygpt.errors import UserError
from polygpt.optim.optim import Optim
from polygpt.optim.schedules import Constant
from polygpt.parameters import Traits
from polygpt.runtime import manifest, stored
from polygpt.runtime.checkpoint import Checkpoints, CheckpointSpec, best, kept
from polygpt.runtime.manifest import Record, records
from polygpt.runtime.storage import storage_fault
from polygpt.runtime.stored import read_parameters
from polygpt.training.parallel import build
from polygpt.training.state import create

PARALLEL = build("single", axes=None)
SHAPES = jax.eval_shape(Bigram().init, jax.random.key(0))
TRAITS = jax.tree.map(lambda x: Traits(x.shape, (None,) * x.ndim, decays=x.ndim > 1), SHAPES)
TRANSFORMATION = Optim(Constant(0.1)).build(TRAITS, 10)


def initial(ema=True):
    return create(Bigram(), TRANSFORMATION, 0, ema)


@pytest.fixture(scope="module")
def advance():
    """A stand-in for the step: every number grows by one, the old state is donated."""
    return jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), donate_argnums=0)


def saved(checkpoints, state, metric=None, finite=True):
    checkpoints.save(state, metric=metric, finite=finite, data={"at": int(state.step)})


def states(count, advance):
    state = PARALLEL.create(initial)
    for _ in range(count):
        state = advance(state)
        yield state


def open_folder(folder, **spec):
    return Checkpoints(folder, CheckpointSpec(**spec), "lower")


def restore(folder, target=None):
    checkpoints = open_folder(folder)
    try:
        return checkpoints.restore(target or PARALLEL.abstract(initial))
    finally:
        checkpoints.close()


def steps(folder):
    return [record.step for record in records(folder)]


def assert_state_is(state, step):
    """That the state is the initial one plus `step`."""
    expected = jax.tree.map(lambda x: np.asarray(x), PARALLEL.create(initial))
    jax.tree.map(lambda got, start: np.testing.assert_allclose(got, start + step, atol=1e-5), state, expected)


def test_all_of_a_state_comes_back_though_the_next_steps_overwrite_it(tmp_path, advance):
    checkpoints = open_folder(tmp_path)
    for state in states(3, advance):
        if state.step == 2:
            bytes_before = [np.array(leaf).tobytes() for leaf in jax.tree.leaves(state)]
            saved(checkpoints, state)
    checkpoints.close()
    restored, data = restore(tmp_path)
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored)] == bytes_before
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert data == {"at": 2}
    params = read_parameters(tmp_path, 2, PARALLEL.abstract(initial).params, averaged=False)
    np.testing.assert_array_equal(params["hidden"]["kernel"], restored.params["hidden"]["kernel"])


def test_a_state_without_moving_average_comes_back(tmp_path):
    checkpoints = open_folder(tmp_path)
    state = PARALLEL.create(lambda: initial(ema=False))
    saved(checkpoints, state)
    checkpoints.close()
    restored, _ = restore(tmp_path, PARALLEL.abstract(lambda: initial(ema=False)))
    assert restored.ema is None
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_an_empty_folder_restores_nothing(tmp_path):
    assert restore(tmp_path / "new") is None


def test_rotation_keeps_the_latest_the_best_and_every_nth(tmp_path, advance):
    checkpoints = open_folder(tmp_path, keep=2, keep_every=4)
    metrics = [None, 3.0, 1.0, 2.0, 5.0, None, 1.0, 4.0, None]
    for state, metric in zip(states(9, advance), metrics, strict=True):
        saved(checkpoints, state, metric)
    checkpoints.close()
    assert steps(tmp_path) == [3, 4, 8, 9]  # 3 is the best, the earlier of two equals
    assert best(records(tmp_path), "lower") == Record(3, 1.0, True)
    again = open_folder(tmp_path, keep=1)
    *_, state = states(10, advance)
    saved(again, state, 9.0)
    again.close()
    assert steps(tmp_path) == [3, 10]


def test_rotation_never_removes_the_last_finite_checkpoint(tmp_path, advance):
    checkpoints = open_folder(tmp_path, keep=1)
    for state in states(5, advance):
        saved(checkpoints, state, metric=float("nan") if state.step > 2 else None, finite=bool(state.step <= 2))
    checkpoints.close()
    assert steps(tmp_path) == [2, 5]
    restored, _ = restore(tmp_path)
    assert_state_is(restored, 2)


def test_what_is_kept_by_a_metric_that_grows():
    found = [Record(1, 0.5, True), Record(2, 0.9, True), Record(3, 0.7, True), Record(4, 0.99, False)]
    assert kept(found, CheckpointSpec(keep=1), "higher") == {2, 3, 4}


def half_write(folder, whole, kind):
    """Makes `whole` look as if the writing process had been killed."""
    if kind == "without its note":
        (folder / whole / "manifest.json").unlink()
    elif kind == "with half a note":
        note = folder / whole / "manifest.json"
        note.write_text(note.read_text()[:20])
    else:
        (folder / whole).rename(folder / f"{whole}.orbax-checkpoint-tmp-123")


@pytest.mark.parametrize("kind", ["without its note", "with half a note", "under its temporary name"])
def test_a_half_written_checkpoint_is_neither_restored_nor_in_the_way(tmp_path, advance, kind):
    checkpoints = open_folder(tmp_path, keep=3)
    for state in states(3, advance):
        saved(checkpoints, state)
    checkpoints.close()
    half_write(tmp_path, "3", kind)
    again = open_folder(tmp_path, keep=3)
    restored, data = again.restore(PARALLEL.abstract(initial))
    assert_state_is(restored, 2)
    assert data == {"at": 2}
    saved(again, advance(restored))
    again.close()
    assert steps(tmp_path) == [1, 2, 3]
    assert_state_is(restore(tmp_path)[0], 3)


def test_what_the_run_has_passed_by_is_set_aside_until_it_has_come_so_far_again(tmp_path, advance, caplog):
    checkpoints = open_folder(tmp_path, keep=1)
    several = states(6, advance)
    for state, finite in zip(several, [True, False, False], strict=False):
        saved(checkpoints, state, finite=finite)
    checkpoints.close()
    again = open_folder(tmp_path, keep=1)
    restored, _ = again.restore(PARALLEL.abstract(initial))
    assert_state_is(restored, 1)
    assert f"skipping checkpoint {tmp_path}/3: it has non-finite values" in caplog.text
    assert aside(tmp_path) == {"unusable-3"} and steps(tmp_path) == [1]
    state = advance(restored)
    saved(again, state)
    again.wait()
    assert aside(tmp_path) == {"unusable-3"} and steps(tmp_path) == [2]
    saved(again, advance(state))
    again.close()
    assert aside(tmp_path) == set() and steps(tmp_path) == [3]


def aside(folder):
    return {place.name for place in folder.iterdir() if not place.name.isdigit()}


def test_a_run_under_way_goes_back_before_a_step_and_saves_its_steps_anew(tmp_path, advance):
    checkpoints = open_folder(tmp_path, keep=9)
    for state in states(4, advance):
        saved(checkpoints, state)
    restored, data = checkpoints.restore(PARALLEL.abstract(initial), before=3)
    assert data == {"at": 2} and steps(tmp_path) == [1, 2]
    assert_state_is(restored, 2)
    saved(checkpoints, advance(restored))
    checkpoints.close()
    assert steps(tmp_path) == [1, 2, 3]


def test_the_one_before_is_there_until_the_new_one_has_its_manifest(tmp_path, advance, monkeypatch):
    seen, seal = [], manifest.seal

    def watched(place, record, processes):
        seen.append((record.step, steps(tmp_path)))
        seal(place, record, processes)

    monkeypatch.setattr(manifest, "seal", watched)
    checkpoints = open_folder(tmp_path, keep=1)
    for state in states(3, advance):
        saved(checkpoints, state)
    checkpoints.close()
    assert seen == [(1, []), (2, [1]), (3, [2])]
    assert steps(tmp_path) == [3]


@contextlib.contextmanager
def forbidden(folder):
    """Nothing can be written in the folder. Root may write everywhere, and is nobody meanwhile."""
    user, mode = os.geteuid(), folder.stat().st_mode
    folder.chmod(0o500)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


def test_a_save_that_is_not_permitted_is_logged_and_the_next_tries_again(tmp_path, advance, caplog):
    checkpoints = open_folder(tmp_path)
    one, two, three, four = map(lambda state: jax.tree.map(jnp.copy, state), states(4, advance))
    saved(checkpoints, one)
    checkpoints.wait()
    with forbidden(tmp_path):
        saved(checkpoints, two)
        saved(checkpoints, three)
        with pytest.raises(Exception) as failure:
            checkpoints.wait()
    said = storage_fault(failure.value, tmp_path)
    assert "Permission denied: choose another --workdir or change its permissions" in str(said)
    for step in (2, 3):
        assert f"checkpoint {tmp_path}/{step} was not written: cannot write" in caplog.text
    assert steps(tmp_path) == [1]
    saved(checkpoints, four)
    checkpoints.wait()
    checkpoints.close()
    assert steps(tmp_path) == [1, 4] and not aside(tmp_path)
    assert_state_is(restore(tmp_path)[0], 4)


def test_a_first_save_that_fails_is_an_error_at_once(tmp_path, advance):
    checkpoints = open_folder(tmp_path)
    (state,) = states(1, advance)
    with forbidden(tmp_path), pytest.raises(Exception) as failure:
        saved(checkpoints, state)
        checkpoints.close()
    assert "Permission denied" in str(storage_fault(failure.value, tmp_path))
    assert steps(tmp_path) == []
    checkpoints.close()


def test_a_count_that_is_new_begins_as_in_a_new_run_and_one_that_is_gone_is_left(tmp_path, advance, monkeypatch):
    items = stored._items

    def older(state):
        found = items(state)
        counts = {"gone": jnp.ones(3)} | {name: x for name, x in found["counts"].items() if name != "skipped"}
        return found | {"counts": counts}

    checkpoints = open_folder(tmp_path)
    (state,) = states(1, advance)
    with monkeypatch.context() as patch:
        patch.setattr(stored, "_items", older)
        saved(checkpoints, state)
        checkpoints.close()
    target, begin = PARALLEL.abstract(initial), dataclasses.replace(initial(), skipped=jnp.int32(7))
    assert restore(tmp_path, target)[0].skipped == 0
    again = open_folder(tmp_path)
    restored, _ = again.restore(target, lambda: begin)
    again.close()
    assert (int(restored.skipped), int(restored.step), int(restored.skipped_in_row)) == (7, 1, 1)


def damage(place):
    for file in place.rglob("*"):
        if file.is_file() and "d" in file.parent.name:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    shutil.rmtree(place / "optimizer")


def test_a_damaged_checkpoint_gives_way_to_an_older_one_and_is_written_anew(tmp_path, advance, caplog):
    checkpoints = open_folder(tmp_path, keep=3)
    for state in states(2, advance):
        saved(checkpoints, state)
    checkpoints.close()
    damage(tmp_path / "2")
    again = open_folder(tmp_path, keep=3)
    restored, _ = again.restore(PARALLEL.abstract(initial))
    assert_state_is(restored, 1)
    assert re.search(rf"skipping checkpoint {tmp_path}/2: counts/.* has .* bytes of .* more", caplog.text)
    saved(again, advance(restored))
    again.close()
    assert_state_is(restore(tmp_path)[0], 2)
    for place in ("1", "2"):
        damage(tmp_path / place)
    with pytest.raises(UserError, match=rf"no checkpoint can be read \(2: .*; 1: .*\): remove {tmp_path} to"):
        restore(tmp_path)


def test_closing_stops_the_writer(tmp_path, monkeypatch):
    checkpoints = open_folder(tmp_path)
    closed = []
    monkeypatch.setattr(checkpoints._writer, "close", lambda: closed.append(True))
    checkpoints.close()
    assert closed == [True]
