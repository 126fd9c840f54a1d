"""polygpt objective check MODULE:SPEC: measure every property of an objective against its bound."""

from argparse import Namespace

from polygpt.cli import findings
from polygpt.cli.arguments import Parser
from polygpt.cli.named import Kind

EXAMPLES = """\
examples:
  polygpt objective check polygpt.objectives.next_token:NextToken --label_smoothing 0.1
  polygpt objective check polygpt.objectives.masked_lm:MaskedLM --tokens.rate 0.3 --no-devices
  polygpt objective check mine.py:MyObjective --only "targets unseen, packed = alone"
  polygpt objective check '{"class": "polygpt.objectives.focal:Focal", "gamma": 1}'

Tests a small model with random parameters, which reads packed rows of text, images and audio. The loss of a position
must not depend on the token that it is scored on: tokens are replaced as inputs alone, and the view is drawn again from
other tokens. Total and weight must be sums over positions, so that packing, padding, microbatches, pmap and meshes give
the loss of one batch. Errors are relative to the largest value compared; bounds allow for rounding.

What an objective needs is made for it: the models that it names in `others`, and what its property `needs` names
(polygpt.objectives.needs:Needs): fields of the model, labels, pairs. A class whose fields do not all have defaults
defines a classmethod `small`. Exit code 2 if any property fails."""


def _base() -> type:
    from polygpt.objectives.base import Objective

    return Objective


KIND = Kind("an objective", _base, "polygpt.api.Objective", maker="small", data=True)


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    words = Parser(prog, about, EXAMPLES, KIND.fields)
    about_name = "the objective, package.module:Class, FILE.py:CLASS, JSON or FILE.json; --NAME VALUE sets a field"
    words.add_argument("objective", metavar="MODULE:SPEC", help=about_name)
    findings.add_only(words)
    words.add_argument("--no-devices", action="store_true", help="skip eight simulated devices, the slowest part")
    return words


def run(arguments: Namespace) -> dict:
    """Prints the table; returns it as data, with a `fault` if any property fails."""
    objective = KIND.load(arguments.objective, arguments)

    from polygpt.cli.progress import Progress
    from polygpt.lab.objective import rows
    from polygpt.lab.objective.check import BUILDS, DEVICES, PROPERTIES, check
    from polygpt.spec import to_json

    chosen = findings.chosen(arguments, PROPERTIES, DEVICES if arguments.no_devices else None)
    with Progress("checking", seconds=0) as progress:
        found = check(objective, chosen, progress)
    size = f"{rows.ROWS} rows of {rows.LENGTH} positions, {rows.VOCABULARY} ids, model width {rows.WIDTH}"
    return {"spec": to_json(objective)} | findings.show(
        "objective check", arguments.objective, size, found, BUILDS, arguments.debug
    )
