"""Runs an objective on eight CPU devices, in a separate process because the number of devices is fixed per process.

Reads an objective as JSON from stdin and writes the error of each way of using the devices as JSON to stdout, see
`process.py`.
"""

import functools
import json
import sys

import jax


def main() -> None:
    """Measures each way."""
    jax.config.update("jax_num_cpu_devices", 8)

    from polygpt.lab import process
    from polygpt.lab.objective import devices
    from polygpt.lab.objective.subject import Subject
    from polygpt.spec import from_json

    objective = from_json(json.load(sys.stdin))
    process.reply(devices.WAYS, functools.partial(devices.error_of, Subject(objective)), type(objective))


if __name__ == "__main__":
    main()
