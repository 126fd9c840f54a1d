"""The attention lab: what proves, measures and draws a variant, the package's own or a user's."""
