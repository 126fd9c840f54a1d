"""`polygpt`: finds the verb, runs it, and turns exceptions into exit codes.

Exit codes: 0 for success; 2 for invalid user input, with one line on stderr; 1 for anything else, with a traceback if
`--debug`. Heavy modules are imported only once the verb is known, so that help is fast.
"""

import importlib
import os
import sys
import traceback

from polygpt.cli import output
from polygpt.errors import UserError, one_line

VERBS = {
    "train": ("polygpt.cli.train", "train an experiment, evaluate it, write its report"),
    "evaluate": ("polygpt.cli.evaluate", "evaluate a run on held-out data"),
    "generate": ("polygpt.cli.generate", "generate text from a prompt of text, images and audio"),
    "adapter save": ("polygpt.cli.adapter_save", "write what a run trained beside a frozen base into one file"),
    "adapter list": ("polygpt.cli.adapter_list", "show what adapter files hold, and whether they fit a run"),
    "report": ("polygpt.cli.report", "write a run's report as one HTML file"),
    "doctor": ("polygpt.cli.doctor", "check the installation: versions, devices and their speed, folders, extras"),
    "data show": ("polygpt.cli.data_show", "print and draw a few rows as the model sees them"),
    "data check": ("polygpt.cli.data_check", "check every record of a dataset"),
    "data score": ("polygpt.cli.data_score", "cache log-probabilities under a model, for distillation and DPO"),
    "data fetch": ("polygpt.cli.data_fetch", "download a text corpus, or list the corpora"),
    "tokenizer train": ("polygpt.cli.tokenizer_train", "train a BPE tokenizer on text files"),
    "model show": ("polygpt.cli.model_show", "count a model's parameters and its FLOPs per token"),
    "attention list": ("polygpt.cli.attention_list", "list attention variants with their papers, backends and costs"),
    "attention check": ("polygpt.cli.attention_check", "test a variant: measure every property against its bound"),
    "attention bench": ("polygpt.cli.attention_bench", "measure a variant's time, memory and FLOPs by sequence length"),
    "attention show": ("polygpt.cli.attention_show", "draw a variant's mask and the blocks that a kernel skips"),
    "attention new": ("polygpt.cli.attention_new", "write a template for your own variant"),
    "objective list": ("polygpt.cli.objective_list", "list objectives with their papers, views and needs"),
    "objective check": ("polygpt.cli.objective_check", "test an objective: measure every property against its bound"),
    "ablate": ("polygpt.cli.ablate", "run an ablation, test its claims and write its README"),
    "compare": ("polygpt.cli.compare", "compare finished runs over seeds and list the fields that differ"),
    "tune": ("polygpt.cli.tune", "tune hyperparameters, or trade loss against FLOPs"),
    "plan": ("polygpt.cli.plan", "compile a step for devices you need not have: memory, time, collectives"),
    "plan check": ("polygpt.cli.plan_check", "recompile committed plans; fails if memory or communication grew"),
    "launch local": ("polygpt.cli.launch_local", "run a command in several processes on this machine"),
    "launch slurm": ("polygpt.cli.launch_slurm", "submit a command as a multi-node SLURM job"),
    "launch gke": ("polygpt.cli.launch_gke", "print a JobSet and an xpk command for a TPU slice on GKE"),
    "launch skypilot": ("polygpt.cli.launch_skypilot", "print a SkyPilot task for TPUs or GPUs"),
}
"""Module and description of each verb."""

EXAMPLES = """\
examples:
  polygpt train experiments/quickstart.py
  polygpt train experiments/quickstart.py --train.steps 200 --model.decoder.depth 2 --workdir runs/small
  polygpt train experiments/quickstart.py --help        every field that can be set, with its value and meaning
  polygpt evaluate runs/quickstart --json
  polygpt generate runs/quickstart --image digit.png --text "plus" --audio seven.wav --text "is"
  polygpt report runs/quickstart

Every verb accepts --help, --json (one JSON object on stdout, everything else on stderr) and --debug (tracebacks)."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except SystemExit as leave:  # argparse, after --help
        return leave.code if isinstance(leave.code, int) else 0
    except UserError as error:
        return _fail(error, str(error), 2, argv)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", 1, argv)
    except BrokenPipeError:  # the reader of stdout closed it, as in `polygpt ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _fail(error, f"{type(error).__name__}: {error} (run with --debug for the traceback)", 1, argv)


def _dispatch(argv: list[str]) -> int:
    verb = next((name for name in (" ".join(argv[:2]), " ".join(argv[:1])) if name in VERBS), None)
    if verb is None:
        return _without_verb(argv)
    path, about = VERBS[verb]
    module = importlib.import_module(path)
    sys.path.append(os.getcwd())  # experiments may import the user's modules
    with output.quiet():
        arguments = module.parser(f"polygpt {verb}", about).read(argv[len(verb.split()) :])
        with output.json_alone(arguments.json) as write:
            result = module.run(arguments)
            write(result)
    if result.get("fault"):  # completed, but the input is invalid
        raise UserError(result["fault"])
    for reason in ("interrupted", "broken"):  # has a result but failed: `polygpt train ... && next` must stop
        if result.get(reason):
            print(one_line(result[reason]), file=sys.stderr)
            return 1
    return 0


def _without_verb(argv: list[str]) -> int:
    words = [word for word in argv if not word.startswith("-")]
    group = {verb: about for verb, (_, about) in VERBS.items() if words and verb.split()[0] == words[0]}
    asked_for_help = not argv or "-h" in argv or "--help" in argv
    if "--version" in argv:
        from polygpt import __version__

        print(f"polygpt {__version__}")
    elif asked_for_help and (group or not words):
        print(
            "usage: polygpt VERB ...\n\nTrains, evaluates and samples GPTs that read text, images and audio.\n\nverbs:"
        )
        print("\n".join(f"  {verb:17}{about}" for verb, (_, about) in VERBS.items() if not group or verb in group))
        print("" if group else f"\n{EXAMPLES}")
    else:
        from polygpt.spec import nearest

        typed = " ".join(words[: 2 if group else 1]) or argv[0]
        if group and len(words) == 1:
            raise UserError(f"{typed} alone is not a verb: write {', '.join(group)} (see polygpt {typed} --help)")
        raise UserError(f"no verb {typed!r}: {nearest(typed, group or VERBS)}")
    return 0


def _fail(error: BaseException, message: str, code: int, argv: list[str]) -> int:
    if "--debug" in argv:
        traceback.print_exception(error)
    print(one_line(message), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
