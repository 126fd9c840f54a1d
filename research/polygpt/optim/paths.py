"""Names of parameters: the path through the tree, "decoder/blocks/attention/query/kernel"."""

import jax


def name_of(path) -> str:
    """The name of a leaf from its path as `jax.tree_util.tree_flatten_with_path` gives it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
