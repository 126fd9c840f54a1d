"""The environment of a test process that simulates several devices on a few cores."""

VARIABLES = {
    # Compiles in half the time.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # The size of XLA's thread pool on a CPU; by default as many threads as devices. Independent collectives of one
    # program may be in progress at once, each with a thread per device: too few threads wait for each other forever.
    "NPROC": "32",
}
