"""The properties of attention variants, one function each."""
