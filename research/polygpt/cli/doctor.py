"""polygpt doctor: examine the installation and this machine."""

from argparse import Namespace

from polygpt.cli.arguments import Parser

EXAMPLES = """\
examples:
  polygpt doctor
  polygpt doctor --json

Takes about ten seconds, two of which measure matrix multiplication. The exit code is 0 unless something required for
training is broken. Missing optional parts are listed with the command that installs them."""

MARKS = {"ok": "ok", "note": "--", "broken": "BROKEN"}


def parser(prog: str, about: str) -> Parser:
    """The verb's arguments."""
    return Parser(prog, about, EXAMPLES)


def run(arguments: Namespace) -> dict:
    """Prints each check as it finishes; returns all of them."""
    from polygpt.runtime.doctor import examine

    checks, figures = [], {}
    for check, measured in examine():
        print(f"{MARKS[check.status]:7}{check.name:16} {check.found}", flush=True)
        if check.remedy:
            print(f"{'':24}{'fix: ' if check.status == 'broken' else ''}{check.remedy}", flush=True)
        checks.append(vars(check))
        if "extra" in measured:
            figures.setdefault("extras", {})[measured["extra"]] = measured["installed"]
        else:
            figures |= measured
    broken = [check["name"] for check in checks if check["status"] == "broken"]
    result = {"ok": not broken, "checks": checks, **figures}
    return result | ({"broken": f"doctor: broken: {', '.join(broken)}"} if broken else {})
