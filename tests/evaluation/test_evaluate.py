"""A whole evaluation of a stand-in whose answers, losses and gains are known exactly."""

import dataclasses
import io
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from PIL import Image

from given_examples import Given
from polygpt.adapters.audio import AudioAdapter
from polygpt.adapters.image import ImageAdapter
from polygpt.cli.results import print_results
from polygpt.data.example import Example, Medium, Text
from polygpt.data.layout import LayoutSpec
from polygpt.data.media.audio import LogMel
from polygpt.data.media.image import ImageFeatures
from polygpt.data.tokenizers.bytes import ByteTokenizer
from polygpt.errors import BadRecord, SpecError, UserError
from polygpt.evaluation.classification import Classification
from polygpt.evaluation.evaluate import cut_answers, evaluate
from polygpt.evaluation.likelihood import token_scores
from polygpt.evaluation.modality_gain import shuffle
from polygpt.evaluation.spec import EvalTask, EvaluationSpec
from polygpt.evaluation.transcription import Transcription
from polygpt.generation.sampling import GREEDY
from polygpt.models.decoder import DecoderSpec
from polygpt.models.functional import bind
from polygpt.models.multimodal import ModelSpec
from polygpt.nn.positions import NoPosition
from polygpt.objectives.base import scores_and_best
from polygpt.report import page
from polygpt.runtime.interruption import Interrupted
from polygpt.spec import from_json, to_json

TOKENIZER = ByteTokenizer()
V, EOS = TOKENIZER.vocabulary, TOKENIZER.eos
LETTERS = "abcd"
GREY = [20, 90, 160, 230]
LAYOUT = LayoutSpec(seq_len=24)
ADAPTERS = {
    "image": ImageAdapter(features=ImageFeatures(height=8, width=8, channels=1), patch=4, items=3),
    "audio": AudioAdapter(features=LogMel(rate=8000, mels=8, window=200, hop=80, seconds=0.1), fold=2, items=3),
}
SCALE = 6.0


class Looks:
    """Says the letter that the grey of the picture means, then ends; is deaf. What it predicts has the logit SCALE."""

    spec = ModelSpec(DecoderSpec(position=NoPosition()), adapters=ADAPTERS)

    def init_cache(self, rows, size):
        return jnp.zeros(rows)

    def decode(self, params, batch, cache, last_B=None):
        letter_BT = (batch.tokens_BT >= ord("a")) & (batch.tokens_BT <= ord("d")) & (batch.modality_BT == 0)
        says_BT = jnp.where(letter_BT, EOS, self._letter(batch) if batch.media else 0)
        if last_B is not None:
            says_BT = says_BT[jnp.arange(len(last_B)), last_B][:, None]
        return params * jax.nn.one_hot(says_BT, V), cache

    def apply(self, params, batch, key=None):
        return types.SimpleNamespace(logits_BTV=self.decode(params, batch, None)[0])

    def token_scores(self, params, batch):
        return scores_and_best(self.apply(params, batch).logits_BTV, batch.target_BT)

    def replicated(self, tree):
        return tree

    @property
    def merged(self):
        return self

    def unstacked(self, params):
        return params

    def _letter(self, batch):
        """What the picture at a position means; 0 where there is none."""
        grey_BN = batch.media["image"].features.mean(axis=(2, 3, 4))
        item_BT = batch.slot_BT // ADAPTERS["image"].positions
        grey_BT = jnp.take_along_axis(grey_BN, item_BT, axis=1, mode="clip")
        levels = (jnp.asarray(GREY) / 255 - 0.5) / 0.5
        means_BT = ord("a") + jnp.abs(grey_BT[..., None] - levels[None, None]).argmin(axis=-1)
        return jnp.where(batch.modality_BT == 1, means_BT, 0)


def picture(letter):
    Image.fromarray(np.full((8, 8), GREY[LETTERS.index(letter)], np.uint8)).save(data := io.BytesIO(), "PNG")
    return Medium("image", data.getvalue())


def recording(seed, samples=600):
    wave = np.random.default_rng(seed).uniform(-1, 1, samples)
    soundfile.write(data := io.BytesIO(), wave, 8000, format="WAV")
    return Medium("audio", data.getvalue())


def seen(n):
    """Pictures and their letters."""
    return [Example((picture(LETTERS[i % 4]), Text(LETTERS[i % 4])), f"seen {i}") for i in range(n)]


def both(n):
    """A recording, a picture and the picture's letter; every fifth letter is a lie."""
    letters = [LETTERS[i * i % 4] for i in range(n)]
    told = ["d" if i % 5 == 0 else letter for i, letter in enumerate(letters)]
    return [
        Example((recording(i), Text("?", 0.0), picture(letter), Text(truth)), f"both {i}")
        for i, (letter, truth) in enumerate(zip(letters, told, strict=True))
    ]


SPEC = EvaluationSpec(
    tasks={
        "seen": EvalTask(Given(seen(10)), generate=True),
        "both": EvalTask(Given(both(21)), generate=True, metrics=(Transcription(),)),
        "words": EvalTask(Given([Example((Text("plain words"),), "words 0")])),
    },
    batch_size=8,
    sampling=GREEDY.replace(max_tokens=4),
)
MODEL = Looks()
NLL = np.log(1 + (V - 1) * np.exp(-SCALE))  # of a token that the model predicts; of another it is SCALE more


def run(spec=SPEC, **options):
    return evaluate(MODEL, jnp.float32(SCALE), TOKENIZER, ADAPTERS, LAYOUT, spec, **options)


@pytest.fixture(scope="module")
def results():
    return run()


def test_likelihood_of_each_task_is_exact(results):
    examples = both(21)
    wrong = sum(MEDIA[e.parts[2].source] != e.answer for e in examples)
    assert 0 < wrong < 6
    tasks = results["tasks"]
    assert tasks["seen"]["loss"] == pytest.approx(NLL, rel=1e-5)
    assert tasks["seen"]["token_accuracy"] == 1.0
    assert tasks["seen"]["bits_per_byte"] == pytest.approx(
        2 * NLL / np.log(2), rel=1e-5
    )  # two tokens, one of them a byte
    assert tasks["both"]["loss"] == pytest.approx(NLL + SCALE * wrong / 42, rel=1e-5)
    assert tasks["both"]["token_accuracy"] == pytest.approx(1 - wrong / 42)
    assert tasks["words"]["n"] == 1 and "accuracy" not in tasks["words"]


MEDIA = {picture(letter).source: letter for letter in LETTERS}


def test_answers_are_generated_and_judged(results):
    assert results["tasks"]["seen"] | {"exact_match": 1.0, "accuracy": 1.0, "f1": 1.0} == results["tasks"]["seen"]
    wrong = sum(MEDIA[e.parts[2].source] != e.answer for e in both(21))
    assert results["tasks"]["both"]["wer"] == results["tasks"]["both"]["cer"] == pytest.approx(wrong / 21)


def test_answers_that_are_cut_are_counted_and_told(capsys):
    tasks = {"seen": SPEC.tasks["seen"]}
    assert "cut" not in run(SPEC.replace(tasks=tasks, sampling=GREEDY))["tasks"]["seen"]
    spec = SPEC.replace(tasks=tasks, sampling=GREEDY.replace(max_tokens=1))  # the letter, and no room for the end
    results = run(spec) | {"step": 3}
    assert results["tasks"]["seen"]["cut"] == 10
    (line,) = cut_answers(results["tasks"])
    assert "seen: 10 of 10 answers were cut" in line and "max_tokens" in line
    print_results(results, spec.measures())
    printed = capsys.readouterr().out
    assert line in printed and re.search(r"\bcut\b", printed.splitlines()[1] + printed.splitlines()[2])
    table = page._results(results["tasks"], spec.measures(), "task")
    assert dict(zip(table["titles"], table["rows"][0][1], strict=True))["answers cut"]["text"] == "10"


def test_the_modality_gain_is_exact_for_eyes_and_zero_for_deaf_ears(results):
    examples = both(21)
    _, shuffled = shuffle(examples, "image", 0)
    loss = [[SCALE * (MEDIA[e.parts[2].source] != e.answer) / 2 for e in some] for some in (examples, shuffled)]
    gain = results["modality_gain"]["both/image"]
    assert gain["gain"] == pytest.approx(np.mean(loss[1]) - np.mean(loss[0]), rel=1e-5)
    assert 0 < gain["low"] < gain["gain"] < gain["high"]
    assert results["modality_gain"]["both/audio"] == {"gain": 0.0, "low": 0.0, "high": 0.0, "n": 21}
    assert set(results["modality_gain"]) == {"seen/image", "both/audio", "both/image"}


def test_figures_by_the_media_of_the_examples(results):
    modalities = results["modalities"]
    assert {name: figures["n"] for name, figures in modalities.items()} == {"audio+image": 21, "image": 10, "text": 1}
    assert modalities["image"]["loss"] == pytest.approx(results["tasks"]["seen"]["loss"])


def test_results_are_plain(results):
    assert json.loads(json.dumps(results)) == results
    assert all(type(value) in (int, float) for value in jax.tree.leaves(results))


@pytest.mark.parametrize("rows, length, packing", [(1, 24, True), (5, 60, True), (40, 24, False)])
def test_figures_depend_neither_on_the_batch_size_nor_on_packing(results, rows, length, packing):
    layout, spec = LayoutSpec(seq_len=length, packing=packing), SPEC.replace(batch_size=rows)
    again = evaluate(MODEL, jnp.float32(SCALE), TOKENIZER, ADAPTERS, layout, spec)
    assert jax.tree.structure(again) == jax.tree.structure(results)
    assert jax.tree.leaves(again) == pytest.approx(jax.tree.leaves(results), rel=1e-6, abs=1e-9)


def test_the_loss_is_compiled_once_for_all_tasks_passes_and_calls(results):
    before = token_scores._cache_size()
    assert run() == results
    assert token_scores._cache_size() == before


def test_without_gain_and_answers_only_losses_are_measured():
    tasks = {name: task.replace(generate=False) for name, task in SPEC.tasks.items()}
    results = run(SPEC.replace(tasks=tasks, modality_gain=False))
    assert results["modality_gain"] == {}
    assert set(results["tasks"]["seen"]) == {"loss", "perplexity", "bits_per_byte", "token_accuracy", "n"}


def test_a_limit_draws_the_same_examples_again():
    examples = seen(40)
    tasks = {"seen": EvalTask(Given(examples), limit=6), "all": EvalTask(Given(examples))}
    first = run(SPEC.replace(tasks=tasks, seed=1))
    assert first["tasks"]["seen"]["n"] == 6 and first["tasks"]["all"]["n"] == 40
    assert run(SPEC.replace(tasks=tasks, seed=1)) == first


def test_progress_is_told_up_to_the_end():
    told = []
    run(progress=lambda *said: told.append(said))
    losses = [done for what, done, total in told if what == "both: loss" and total == 21]
    assert losses == sorted(losses) and 0 < losses[0] < losses[-1] == 21
    assert ("both/audio gain", 21, 21) in told and ("seen: answers", 10, 10) in told


BAD = [
    BadRecord("corrupt image", "seen 99"),
    Example((Medium("image", b"no picture"), Text("a")), "seen 98"),
    Example((picture("a"), Text("a" * 50)), "seen 97"),
]


def test_a_bad_record_is_an_error_or_counted():
    tasks = {"seen": EvalTask(Given([*seen(5), *BAD]), generate=True)}
    with pytest.raises(BadRecord, match="seen 9"):
        run(SPEC.replace(tasks=tasks))
    figures = run(SPEC.replace(tasks=tasks, on_bad_record="skip"))["tasks"]["seen"]
    assert (figures["n"], figures["skipped"], figures["accuracy"]) == (5, 3, 1.0)


@pytest.mark.parametrize("examples", [[], BAD, BAD[1:]])
def test_a_task_without_usable_examples_is_an_error(examples):
    with pytest.raises(UserError, match="evaluation task 'seen': "):
        run(SPEC.replace(tasks={"seen": EvalTask(Given(examples))}, on_bad_record="skip"))


def test_a_task_without_prompts_cannot_be_answered():
    examples = [Example((Text("words"),), "words 0")]
    with pytest.raises(UserError, match="'words': words 0 has no prompt to answer: set generate to false"):
        run(SPEC.replace(tasks={"words": EvalTask(Given(examples), generate=True)}))


@dataclasses.dataclass(frozen=True)
class Fails(Classification):
    """A metric with a mistake in it."""

    def __call__(self, predictions, truths):
        raise KeyError("no such\nanswer")


def test_a_task_that_cannot_be_measured_takes_no_others_results_away(results):
    """What was measured of it before its error stays; the figures of the others are what they are without it."""
    bad = {
        "broken": EvalTask(Given(BAD)),
        "words": EvalTask(SPEC.tasks["words"].source, generate=True),
        "fails": SPEC.tasks["seen"].replace(metrics=(Fails(),)),
    }
    faults = {}
    found = run(SPEC.replace(tasks={**bad, "both": SPEC.tasks["both"]}), faults=faults)
    assert "seen 99: corrupt image" in faults["broken"] and "words 0 has no prompt" in faults["words"]
    assert faults["fails"] == "KeyError: 'no such\\nanswer'" and list(faults) == ["broken", "words", "fails"]
    assert found["tasks"]["both"] == results["tasks"]["both"] and "broken" not in found["tasks"]
    assert found["tasks"]["words"] == results["tasks"]["words"]
    assert found["tasks"]["fails"]["loss"] == results["tasks"]["seen"]["loss"]
    assert found["modality_gain"]["both/image"] == results["modality_gain"]["both/image"]


def test_an_error_is_raised_where_nothing_can_be_measured_and_a_signal_always():
    with pytest.raises(BadRecord, match="seen 99"):
        run(SPEC.replace(tasks={"broken": EvalTask(Given(BAD))}), faults={})

    def proceed():
        raise Interrupted

    with pytest.raises(Interrupted):
        run(faults={}, proceed=proceed)


def test_shuffled_media_that_no_longer_fit_are_left_out():
    # Beside its own short recording the first text just fits; beside either long one it does not.
    lengths = [ADAPTERS["audio"].length(samples // 80) for samples in (160, 800)]
    assert lengths[0] < lengths[1]
    examples = [Example((recording(0, 160), Text("a" * (LAYOUT.seq_len - 2 - lengths[0]))), "full")]
    examples += [Example((picture("a"), recording(i, 800), Text("a")), f"long {i}") for i in range(2)]
    results = run(SPEC.replace(tasks={"heard": EvalTask(Given(examples))}))
    assert results["tasks"]["heard"]["n"] == 3
    assert results["modality_gain"]["heard/audio"]["n"] == 2


def test_one_example_has_no_gain():
    assert run(SPEC.replace(tasks={"seen": EvalTask(Given(seen(1)))}))["modality_gain"] == {}


def test_an_evaluation_travels_as_json():
    spec = SPEC.replace(tasks={"seen": EvalTask(Given(["x"]), metrics=(Transcription(normalized=False),))})
    assert from_json(to_json(spec)).tasks["seen"].metrics == spec.tasks["seen"].metrics
    with pytest.raises(SpecError, match="EvalTask.limit is 0"):
        EvalTask(Given([]), limit=0)


def test_the_real_model_is_evaluated_and_a_model_without_eyes_gains_nothing():
    model = bind(ModelSpec(decoder=DecoderSpec(width=16, depth=1), adapters=ADAPTERS), V)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), model.abstract())
    params["adapters"]["image"] = jax.tree.map(np.zeros_like, params["adapters"]["image"])
    spec = SPEC.replace(tasks={"both": EvalTask(Given(both(9)), generate=True)}, batch_size=4)
    results = evaluate(model, params, TOKENIZER, ADAPTERS, LAYOUT, spec)
    figures, gain = results["tasks"]["both"], results["modality_gain"]
    assert figures["n"] == 9 and np.isfinite(figures["loss"]) and 0 <= figures["accuracy"] <= 1
    assert gain["both/image"]["gain"] == gain["both/image"]["low"] == gain["both/image"]["high"] == 0
    assert gain["both/audio"]["low"] < gain["both/audio"]["high"]
