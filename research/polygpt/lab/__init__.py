"""The attention lab: checks, benchmarks and draws attention variants, the package's own or a user's."""
