"""Runs a variant on two CPU devices, in a separate process because the number of devices is fixed per process.

Reads a variant as JSON from stdin and writes the error of each mesh as JSON to stdout.
"""

import json
import sys

import jax


def main() -> None:
    """Measures each mesh; an error is written in its place."""
    jax.config.update("jax_num_cpu_devices", 2)

    from polygpt.lab.blame import told
    from polygpt.lab.properties import meshes
    from polygpt.lab.subject import Subject
    from polygpt.spec import from_json

    asked = json.load(sys.stdin)
    spec = from_json(asked["spec"])
    subject = Subject(spec, asked["width"], asked["length"])
    found = {}
    for name in meshes.MESHES:
        try:
            found[name] = {"error": meshes.off_by(subject, name)}
        except Exception as error:
            found[name] = {"raised": told(error, type(spec))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
