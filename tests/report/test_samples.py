"""Held-out samples: what is chosen, what counts as right, and whose attention a map shows."""

import dataclasses
import io
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import soundfile
from flax import nnx
from PIL import Image

from batches import lively
from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.image import ImageAdapter
from polygpt.attention.contract import Attention
from polygpt.attention.multi_head import MultiHead
from polygpt.blocks.cross import CrossSequential
from polygpt.blocks.stack import StackSpec
from polygpt.data.example import Example, Medium, Text
from polygpt.data.layout import LayoutSpec, lay_out
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.data.packing import collate
from polygpt.data.sources.base import Source
from polygpt.data.tokenizers.bytes import Bytes
from polygpt.errors import UserError
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.generation.generate import Generated
from polygpt.generation.sampling import Sampling
from polygpt.models.decoder import DecoderSpec
from polygpt.models.encoder_decoder import EncoderDecoder
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.report import samples


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(out, "PNG")
    return out.getvalue()


def wav(seconds: float) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.sin(np.arange(int(8000 * seconds)) / 5), 8000, format="WAV")
    return out.getvalue()


@dataclasses.dataclass(frozen=True)
class Sums(Source):
    """Two pictures and a recording between texts; every third record is corrupt."""

    records: int = 9

    def open(self):
        return [
            Example(
                (
                    Medium("image", png(20 * i) if i % 3 else b"corrupt"),
                    Text(" and ", 0.0),
                    Medium("audio", wav(0.2 + 0.02 * i)),
                    Medium("image", png(200)),
                    Text("? ", 0.0),
                    Text(f"number {i}"),
                ),
                f"sums, record {i}",
            )
            for i in range(self.records)
        ]


@dataclasses.dataclass(frozen=True)
class Prose(Source):
    """Texts without prompt."""

    def open(self):
        return [Example((Text("a short text of a few plain words here"),), "prose, record 0")]


class NothingToSee(Attention):
    """An attention variant without weights."""

    def build(self, dims, rngs):
        return Blind()


class Blind(nnx.Module):
    def __call__(self, x_BTD, context, cache=None):
        return x_BTD, cache


@pytest.fixture(scope="module")
def run():
    tower = StackSpec(width=16, depth=1, attention=MultiHead(heads=2))
    adapters = {
        "image": ImageAdapter(features=ImageFeatures(8, 8), items=2, patch=4, tower=tower),
        "audio": AudioAdapter(features=LogMel(seconds=0.5, rate=8000, mels=16), items=1, tower=tower),
    }
    decoder = DecoderSpec(width=16, depth=2, attention=MultiHead(heads=2))
    tokenizer = Bytes().build()
    model = bind(ModelSpec(decoder, adapters), tokenizer.vocabulary)
    evaluation = EvaluationSpec(
        tasks={"sums": EvalTask(Sums(), generate=True), "prose": EvalTask(Prose()), "ends": EvalTask(Prose(), last=4)},
        sampling=Sampling(temperature=0.0, max_tokens=8),
    )
    experiment = SimpleNamespace(
        evaluation=evaluation, data=SimpleNamespace(layout=LayoutSpec(seq_len=160)), train=SimpleNamespace(steps=1)
    )
    return SimpleNamespace(experiment=experiment, model=model, params=lively(model), tokenizer=tokenizer, step=1)


def test_samples_of_every_task_with_their_media(run):
    found, notes = samples.gather(run, per_task=4)
    assert notes == () and list(found) == ["sums", "prose"]
    assert len(found["sums"]) == 4, "corrupt records are passed over"
    for sample in found["sums"]:
        kinds = [part if isinstance(part, str) else part.modality for part in sample.prompt]
        assert kinds == ["image", " and ", "audio", "image", "? "]
        assert sample.truth.startswith("number") and sample.right is False
        audio = sample.prompt[2]
        assert audio.seconds == pytest.approx(len(soundfile.read(io.BytesIO(audio.wav))[0]) / 8000)
        assert sample.prompt[0].grid == (2, 2) and sample.prompt[0].size == (8, 8)
        if sample.words:
            filled = run.model.spec.adapters["audio"].length(audio.size[0])
            (seen_LWP,) = audio.attention.values()
            assert audio.grid == (1, filled) and seen_LWP.shape == (2, len(sample.words), filled)
    again, _ = samples.gather(run, per_task=4)
    assert [s.place for s in again["sums"]] == [s.place for s in found["sums"]]


def test_a_text_without_prompt_is_cut_into_prompt_and_truth(run):
    (sample,) = samples.gather(run)[0]["prose"]
    assert sample.prompt[0] + sample.truth == "a short text of a few plain words here"
    assert sample.right is None and all(word.right is None for word in sample.words)
    long = samples.cut(Example((Text("word " * 1000),), "x"))
    assert 100 < len(long.prompt[0].text) < 200 and 100 < len(long.answer) < 200
    kept = Example((Text("one"),), "x")
    assert samples.cut(kept) == kept, "nothing to cut between"


def test_attention_is_the_models_own_toward_each_item(run):
    """A map equals the weights of the row that the model reads, from the word's tokens to the item's positions."""
    example = samples.choose(Sums().open(), run, 1)[0]
    answer = "nine ab"
    adapters, layout = run.model.spec.adapters, run.experiment.data.layout
    row = lay_out(Example((*example.prompt, Text(answer)), "x"), layout, run.tokenizer, adapters)
    batch = collate([row], layout.seq_len, adapters)
    weights = jax.jit(run.model.attention)(run.params, batch)
    weights_LTT = np.stack([weights[layer][0].mean(axis=0) for layer in range(2)])
    attend, notes = samples._attention(run)
    found = attend(example, answer)["self-attention"]
    assert not notes
    assert set(found) == {("image", 0), ("image", 1), ("audio", 0)}
    end = int((row.segment > 0).sum())  # ... ? nine_ab<eos>: the tokens are predicted one position before they stand
    first = end - 1 - len(answer)
    queries = {"nine": range(first - 1, first + 3), "ab": range(first + 4, first + 6)}
    keys = np.flatnonzero((row.modality == 1) & (row.slot >= run.model.positions["image"]))  # the second picture
    for w, rows in enumerate(queries.values()):
        expected = weights_LTT[:, list(rows)][:, :, keys].mean(axis=1)
        np.testing.assert_allclose(found["image", 1][:, w], expected, rtol=1e-5)
    assert sum(found[item].sum(axis=-1).max() for item in found) < 1


def test_an_encoder_decoder_has_a_map_of_each_kind_of_attention(run):
    """Its decoder reads media through cross-attention alone, whose weights no other heads thin out."""
    decoder = DecoderSpec(width=16, depth=1, attention=MultiHead(heads=2), block=CrossSequential(MultiHead(heads=4)))
    model = bind(EncoderDecoder(decoder, run.model.spec.adapters), 258)
    layout = LayoutSpec(seq_len=160, prompt_span="bidirectional")
    experiment = SimpleNamespace(data=SimpleNamespace(layout=layout), evaluation=run.experiment.evaluation)
    written = {"experiment": experiment, "model": model, "params": lively(model)}
    example = samples.choose(Sums().open(), run, 1)[0]
    attend, notes = samples._attention(SimpleNamespace(**vars(run) | written))
    found = attend(example, "nine ab")
    assert not notes and list(found) == ["cross-attention", "self-attention"]
    row = lay_out(Example((*example.prompt, Text("nine ab")), "x"), layout, run.tokenizer, model.spec.adapters)
    batch = collate([row], layout.seq_len, model.spec.adapters)
    query = int((row.segment > 0).sum()) - 1 - len("ab")
    weights_HT = model.attention(written["params"], batch)[0][0, 2:, [query - 1, query]].mean(axis=0)
    keys = np.flatnonzero((row.modality == 1) & (row.slot < model.positions["image"]))
    np.testing.assert_allclose(found["cross-attention"]["image", 0][0, 1], weights_HT.mean(axis=0)[keys], rtol=1e-5)
    assert all(np.all(weights_LWP == 0) for weights_LWP in found["self-attention"].values())


def test_tokens_belong_to_the_word_that_they_end_in(run):
    text = " é is  ok"
    tokens = [*run.tokenizer.encode(text).tolist(), run.tokenizer.eos]
    assert samples.words_of_tokens(tokens, text, run.tokenizer) == [None, 0, 0, None, 1, 1, None, None, 2, 2, None]


def test_words_are_right_where_the_truth_has_them():
    words = samples.mark("A red, boat here", "a red ship here")
    assert [word.right for word in words] == [True, True, False, True]
    assert samples.mark("", "truth") == ()


def test_a_model_too_large_or_without_weights_has_no_maps(run, monkeypatch):
    monkeypatch.setattr(samples, "LARGEST", 1000)
    found, notes = samples.gather(run, per_task=1)
    assert "GiB" in notes[0] and found["sums"][0].prompt[0].attention == {}
    monkeypatch.undo()

    decoder, rest = run.model.spec.decoder, {name: value for name, value in vars(run).items() if name != "model"}
    for other in (decoder.replace(attention=NothingToSee()), decoder.replace(depth=0)):
        spec = dataclasses.replace(run.model.spec, decoder=other)
        attend, notes = samples._attention(SimpleNamespace(**vars(run) | {"model": bind(spec, 258)}))
        assert "has no weights" in notes[0] and attend(None, "x") == {}
    spec = dataclasses.replace(run.model.spec, decoder=decoder.replace(pattern=(NothingToSee(), None)))
    assert "show blocks 2:" in samples._attention(SimpleNamespace(model=bind(spec, 258), **rest))[1][0]


def test_a_fault_of_the_attention_is_no_model_without_weights(run):
    class Faulty(SimpleNamespace):
        def abstract(self):
            return {}

        def attention(self, params, batch, chosen_R):
            raise AttributeError("a fault")

    faulty = SimpleNamespace(**vars(run) | {"model": Faulty(spec=run.model.spec)})
    with pytest.raises(AttributeError, match="a fault"):
        samples._attention(faulty)


def test_a_task_without_prompts_or_data_leaves_the_others_their_samples(run, monkeypatch):
    def refuse(source):
        raise UserError("the data is not here")

    monkeypatch.setattr(Sums, "open", refuse)
    monkeypatch.setattr(samples, "generate", lambda *given: [Generated("it", (), "eos") for _ in given[3]])
    one = [Example((Text("unbreakable"),), "one"), Example((Text("", 0.0), Text("answer")), "two")]
    assert samples.choose(one, run, 4) == []
    monkeypatch.setattr(Prose, "open", lambda source: [*one, Example((Text("two words"),), "three")])
    found, notes = samples.gather(run)
    assert [sample.place for sample in found["prose"]] == ["three"]
    assert notes == ("No samples of sums: the data is not here",)
    monkeypatch.setattr(Prose, "open", lambda source: one)
    assert samples.gather(run)[1][1] == "prose: no held-out example can be shown"
