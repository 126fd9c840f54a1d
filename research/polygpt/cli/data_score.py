"""polygpt data score FILE|RUN RUN: cache the log-probabilities of the training data under a run's model."""

from argparse import Namespace

from polygpt.cli import experiment
from polygpt.cli.arguments import Parser
from polygpt.cli.evaluate import add_adapter, add_run, open_named
from polygpt.errors import UserError

EXAMPLES = """\
examples:
  polygpt data score experiments/distillation.py runs/distillation/teacher --top 16 --out scores/teacher
  polygpt data score experiments/dpo.py runs/dpo/first --out scores/first       for DPO(scores="first")
  polygpt data score experiments/quickstart.py runs/quickstart --adapter french.npz --out scores/french

Then --data.scores '{"teacher": "scores/teacher"}' in training, and in its objectives TopKDistillation.

The model need not be in memory when the scores are read. FILE is the experiment that will read them; a run folder
stands for its own. All devices share the rows; --spread splits the model too. The command resumes where it was
interrupted; it refuses augmentations and random transforms, whose examples differ in each epoch. With a model of
another tokenizer, scores are of the spans of bytes between the token boundaries that both have, for
SpanDistillation."""


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, experiment.fields)
    words.add_argument("file", metavar="FILE|RUN", help=experiment.EITHER)
    add_run(words, "run folder of the model that scores, such as runs/teacher")
    add_adapter(words)
    experiment.add_phase(words)
    words.add_argument("--out", metavar="DIR", required=True, help="the folder to write")
    words.add_argument("--top", type=int, default=0, help="number of likely tokens per position (default: 0)")
    words.add_argument("--batch-size", type=int, default=16, help="rows per batch (default: 16)")
    longest = "positions per row of the model that scores (default: the larger of both experiments')"
    words.add_argument("--seq-len", type=int, help=longest)
    return words


def run(arguments: Namespace) -> dict:
    """Writes the scores; returns their numbers."""
    for name in ("batch_size", "seq_len"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')} is {given}: it must be at least 1")
    chosen = experiment.load(arguments.file, arguments.changes, arguments.options, runs=True)
    chosen, _ = experiment.of_phase(chosen, arguments.phase, "data score")

    from polygpt.cli.progress import Progress
    from polygpt.evaluation.scoring import Scorer, write_scores

    trained = open_named(arguments)
    seq_len = arguments.seq_len or max(chosen.data.layout.seq_len, trained.experiment.data.layout.seq_len)
    origin = f"{arguments.run}, step {trained.step}" + (f", with {trained.adapter}" if trained.adapter else "")
    scorer = Scorer(trained.model, trained.params, trained.tokenizer, origin, seq_len).on_all_devices()
    given = chosen.data, chosen.tokenizer.build(), chosen.model.adapters, arguments.out
    with Progress("scoring") as progress:
        found = write_scores(scorer, *given, top=arguments.top, batch_size=arguments.batch_size, progress=progress)
    skipped = f", {found['skipped']:,} unusable records left out" if found["skipped"] else ""
    print(
        f"{arguments.out}: {found['examples']:,} examples, {found['tokens']:,} tokens, {found['bytes'] / 1e6:,.1f} MB"
        f'{skipped}\nread them with --data.scores \'{{"NAME": "{arguments.out}"}}\''
    )
    return {"folder": arguments.out} | found
