"""A tokenizer with more special tokens."""

import dataclasses

from polygpt.data.tokenizers.base import Tokenizer, TokenizerSpec


@dataclasses.dataclass(frozen=True)
class SpecialTokens(TokenizerSpec):
    """Another tokenizer, followed by named special tokens. All ids of the other tokenizer are unchanged.

    A special token enters an example as `Text(name, weight, special=True)`. No text is ever encoded to it, so a literal
    "<|fim_prefix|>" in the data is harmless.
    """

    tokenizer: TokenizerSpec
    """The other tokenizer."""
    names: tuple[str, ...]
    """Names of the special tokens, in the order of their ids; a transformation lists those that it inserts as
    `special`."""

    def validate(self):
        super().validate()
        names = self.special
        self.require(all(names) and len(set(names)) == len(names), "names", "different, not empty, and new")

    @property
    def special(self) -> tuple[str, ...]:
        return (*self.tokenizer.special, *self.names)

    def build(self) -> Tokenizer:
        return self.tokenizer.build().with_special(self.names).padded(self.multiple)
