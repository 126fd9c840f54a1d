"""polygpt: a JAX research codebase for GPTs that read text, images and audio."""

__version__ = "0.2.0"
