"""A connector that modalities share: one set of parameters, of which both make use, and from which both learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import ADAPTERS, TOWER, VOCABULARY, build, example, lively, tiny
from polygpt.adapters.base import Connector, SharedConnector
from polygpt.errors import SpecError
from polygpt.models.describe import describe
from polygpt.models.functional import bind
from polygpt.parameters import paths

NONE = Connector("none")
# Towers that give vectors of eight channels: two positions of the ears' tower are folded into one.
IMAGE = ADAPTERS["image"].replace(connector=NONE)
AUDIO = ADAPTERS["audio"].replace(tower=TOWER.replace(width=4), connector=NONE)
SPEC = tiny(adapters={"image": IMAGE, "audio": AUDIO}).replace(connector=SharedConnector(width=8))
ROWS = [[example(2, ("image", 4), 3, seed=1)], [example(("audio", 3), 4, seed=2)]]


@pytest.fixture(scope="module")
def toy():
    model = bind(SPEC, VOCABULARY)
    return model, lively(model)


def test_the_only_projection_is_the_shared_one():
    shapes = {path: leaf.shape for path, leaf in paths(bind(SPEC, VOCABULARY).abstract()).items()}
    assert {path: shape for path, shape in shapes.items() if "connector" in path} == {
        "connector/output/kernel": (8, 16),
        "connector/output/bias": (16,),
    }
    own = SPEC.replace(
        connector=None, adapters={name: a.replace(connector=Connector()) for name, a in SPEC.adapters.items()}
    )
    more = describe(own, VOCABULARY, 12).parameters - describe(SPEC, VOCABULARY, 12).parameters
    assert more == 8 * 16 + 16
    two = SPEC.replace(connector=SharedConnector("mlp", width=8))
    kernels = [path for path in paths(bind(two, VOCABULARY).abstract()) if path.startswith("connector/")]
    assert sorted(kernels) == [
        f"connector/{layer}/{name}" for layer in ("hidden", "output") for name in ("bias", "kernel")
    ]


def test_embeddings_are_what_towers_give_projected(toy):
    model, params = toy
    bare = bind(SPEC.replace(connector=None, decoder=SPEC.decoder.replace(width=8, depth=0)), VOCABULARY)
    unprojected = {name: params[name] for name in ("text", "adapters", "modality")}
    unprojected |= {"text": {"table": np.zeros((VOCABULARY, 8), np.float32)}, "decoder": lively(bare)["decoder"]}
    unprojected["modality"] = {name: np.zeros(8, np.float32) for name in SPEC.adapters}
    batch = build(ROWS, 9, adapters=SPEC.adapters)
    given_BTD, embedded_BTD = (
        np.asarray(jax.jit(lambda params, own=own: own.module(params).embed(batch)[0])(values))
        for own, values in ((bare, unprojected), (model, params))
    )
    for number, name in enumerate(SPEC.adapters, start=1):
        here = batch.modality_BT == number
        output = params["connector"]["output"]
        expected = given_BTD[here] @ output["kernel"] + output["bias"] + params["modality"][name]
        np.testing.assert_allclose(embedded_BTD[here], expected, rtol=0, atol=1e-5)
        assert here.any()


def test_gradients_of_both_modalities_reach_it(toy):
    """Of a row with a picture, of one with a recording, and of both together: the sum."""
    model, params = toy

    @jax.jit
    @jax.grad
    def slope(kernel, batch):
        changed = params | {"connector": {"output": params["connector"]["output"] | {"kernel": kernel}}}
        return jnp.sum(jnp.sin(model.apply(changed, batch).logits_BTV) * (batch.segment_BT > 0)[..., None])

    def gradient(rows):
        return np.asarray(slope(params["connector"]["output"]["kernel"], build(rows, 9, adapters=SPEC.adapters)))

    seen, heard, both = gradient([ROWS[0], []]), gradient([[], ROWS[1]]), gradient(ROWS)
    assert np.abs(seen).max(axis=1).all() and np.abs(heard).max(axis=1).all()
    np.testing.assert_allclose(both, seen + heard, rtol=0, atol=1e-4 * np.abs(both).max())
    assert not gradient([[example(5, seed=3)], []]).any(), "text alone does not go through it"


def test_its_flops_are_those_of_the_media_that_go_through_it():
    own = SPEC.replace(
        connector=None, adapters={name: a.replace(connector=Connector()) for name, a in SPEC.adapters.items()}
    )
    figures = [{part.name: part.flops for part in describe(spec, VOCABULARY, 12).parts} for spec in (own, SPEC)]
    assert figures[1].pop("connector") == 0
    assert figures[0] == figures[1]
    found = describe(SPEC, VOCABULARY, 12)
    total = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(bind(SPEC, VOCABULARY).abstract()))
    assert found.parameters == total


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match="connector.kind is 'none', .* width 8 and the target width is 16"):
        bind(SPEC.replace(connector=None), VOCABULARY)
    with pytest.raises(SpecError, match="SharedConnector.width is 0"):
        SharedConnector(width=0)
