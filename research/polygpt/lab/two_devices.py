"""Runs a variant on two CPU devices, in a separate process because the number of devices is fixed per process.

Reads a variant as JSON from stdin and writes the error of each mesh as JSON to stdout, see `process.py`.
"""

import json
import sys

import jax


def main() -> None:
    """Measures each mesh."""
    jax.config.update("jax_num_cpu_devices", 2)

    from polygpt.lab import process
    from polygpt.lab.properties import meshes
    from polygpt.lab.subject import Subject
    from polygpt.spec import from_json

    asked = json.load(sys.stdin)
    spec = from_json(asked["spec"])
    subject = Subject(spec, asked["width"], asked["length"])
    process.reply(meshes.MESHES, lambda name: meshes.off_by(subject, name), type(spec))


if __name__ == "__main__":
    main()
