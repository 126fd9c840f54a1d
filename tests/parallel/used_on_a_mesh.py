"""Scores and answers of models that lie split over eight CPU devices, and of the same on one, written as JSON.

Run as a process of its own: the number of devices is set once a process.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, str(Path(__file__).parents[1]))

from batches import ADAPTERS, example, lively, tiny  # noqa: E402
from given_examples import Given  # noqa: E402
from polygpt import sharding  # noqa: E402
from polygpt.attention.mamba2 import Mamba2  # noqa: E402
from polygpt.attention.multi_head import MultiHead  # noqa: E402
from polygpt.attention.sliding import SlidingWindow  # noqa: E402
from polygpt.data.example import Example, Text  # noqa: E402
from polygpt.data.layout import LayoutSpec  # noqa: E402
from polygpt.data.loader import DataSpec, Task  # noqa: E402
from polygpt.data.tokenizers.bytes import Bytes  # noqa: E402
from polygpt.evaluation.likelihood import score  # noqa: E402
from polygpt.evaluation.scoring import Scorer, write_scores  # noqa: E402
from polygpt.generation import decoding  # noqa: E402
from polygpt.generation.generate import generate  # noqa: E402
from polygpt.generation.sampling import Sampling  # noqa: E402
from polygpt.models.functional import bind  # noqa: E402
from polygpt.sharding import MeshSpec  # noqa: E402
from sources import build_sources, small  # noqa: E402

MESHES = {
    "data 2, fsdp 2, tensor 2": MeshSpec(fsdp=2, tensor=2),
    "sequence 2, stage 2, tensor 2": MeshSpec(data=1, sequence=2, stage=2, tensor=2),
}

MODELS = {
    "keys and values": tiny(attention=MultiHead(4)),
    "a ring of the last keys, and a recurrent state": tiny(
        attention=SlidingWindow(4, window=8), pattern=(None, Mamba2(heads=4, state_width=8)), depth=4
    ),
    "keys and values of a source too": small(ADAPTERS, attention=MultiHead(4)),
}
"""What the decoder remembers."""

decode = decoding.decode


def use(model, params) -> dict:
    tokenizer = Bytes(multiple=4).build()
    # No axis divides five rows. A decoder alone reads the sources like the rest, but for what they see of themselves.
    batch = build_sources([[(example(9, ("image", 4), 6, seed=row), 14)] for row in range(5)], 32, adapters=ADAPTERS)
    scores, in_blocks = (
        score(model.changed({"logits_block": block}), params, batch, tokenizer.token_bytes) for block in (None, 7)
    )
    prompts = [[Text("one")], [Text("and a longer one")], [Text("x")], [Text("four")]]
    caches = []
    with mock.patch.object(decoding, "decode", lambda *given: caches.append(held(given[3].cache)) or decode(*given)):
        layout = LayoutSpec(32, prompt_span="bidirectional")
        answers = generate(model, params, tokenizer, prompts, layout, Sampling(temperature=0.0, max_tokens=6))
    return {
        "loss": scores.loss.tolist(),
        "loss in blocks": in_blocks.loss.tolist(),
        "correct": [scores.correct.tolist(), in_blocks.correct.tolist()],
        "answers": [list(answer.tokens) for answer in answers],
        "held": max(map(max, caches)),
    }


def held(cache) -> list[float]:
    """Which share of each array with heads a device holds."""
    arrays = [x for x in jax.tree.leaves(cache) if x.ndim >= 4]
    return [math.prod(x.sharding.shard_shape(x.shape)) / x.size for x in arrays]


def require_equal_scores(model, params) -> None:
    """What `polygpt data score` writes by all devices, each with rows of its own, is what one writes."""
    tokenizer, records = Bytes(multiple=4).build(), []
    texts = tuple(Example((Text("q" * (i % 4), 0.0), Text("answer " * (1 + i % 3))), f"text {i}") for i in range(11))
    data = DataSpec({"a": Task(Given(texts))}, LayoutSpec(seq_len=30), batch_size=1)
    alone = Scorer(model, params, tokenizer, "the model")
    together = alone.on_all_devices()
    assert together.model.layout.size("batch") == 8 and together.fingerprint == alone.fingerprint
    for scorer in (alone, together):
        with tempfile.TemporaryDirectory() as folder:
            write_scores(scorer, data, tokenizer, ADAPTERS, folder, top=3, batch_size=3)
            records.append(np.load(next(path for path in Path(folder).glob("*.npy") if "index" not in path.name)))
    for field in ("log_p", "top"):
        np.testing.assert_allclose(records[1][field], records[0][field], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(records[1]["ids"], records[0]["ids"])


if __name__ == "__main__":
    found = {}
    for what, spec in MODELS.items():
        model = bind(spec, Bytes(multiple=4).build().vocabulary)
        params = lively(model)
        found[what] = {"single": use(model, jax.device_put(params, jax.devices()[0]))}
        for name, mesh in MESHES.items():
            layout = sharding.make_layout(mesh, jax.devices())
            split = jax.tree.map(jax.device_put, params, sharding.tree_shardings(layout, params, model.axes()))
            assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))
            found[what][name] = use(model.on(layout), split)
    model = bind(MODELS["keys and values"], Bytes(multiple=4).build().vocabulary)
    require_equal_scores(model, jax.device_put(lively(model), jax.devices()[0]))
    print(json.dumps(jax.tree.map(lambda x: x.tolist() if isinstance(x, np.ndarray) else x, found)))
