"""Byte-level BPE by tiktoken, which encodes several times as fast as the tokenizers library."""

import json
from collections.abc import Mapping

import tiktoken
import tokenizers

LONGEST = 1 << 16
"""Characters of a text that it encodes; its regular expressions abort in a million of white space."""
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2's pieces, as tiktoken writes them: the same as those of the library's `ByteLevel`, without backtracking."""


def ranked(model: tokenizers.Tokenizer, letters: Mapping[str, int]) -> tiktoken.Encoding | None:
    """The same encoding, or None if it could differ.

    tiktoken merges the neighbours whose union has the lowest id, the library the pair that comes first in its list. The
    results are the same if the ids of unions follow the list, every token longer than a byte is the result of one
    merge, and the library encodes the bytes of every token as this token. For suppose that tiktoken first departs from
    the library by merging x and y, which are not a pair of the list, to t: up to there only earlier merges were made,
    so the library also ends with x and y side by side, and not with t, where it encodes the bytes of t alone.

    Args:
        model: a byte-level BPE, without added tokens or normalizer, with consecutive ids.
        letters: the byte that each letter of its tokens stands for.
    """
    state = json.loads(model.to_str())
    options, vocabulary = state["model"], state["model"]["vocab"]
    unusual = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    if any(options.get(name) for name in (*unusual, "ignore_merges")) or not state["pre_tokenizer"]["use_regex"]:
        return None
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in options["merges"]]
    ids = [vocabulary[first + second] for first, second in pairs]
    if any(a >= b for a, b in zip(ids, ids[1:], strict=False)) or len(vocabulary) != len(set(letters)) + len(ids):
        return None
    if any(len(model.model.tokenize(token)) != 1 for token in vocabulary):
        return None
    ranks = {bytes(letters[letter] for letter in token): number for token, number in vocabulary.items()}
    return tiktoken.Encoding("polygpt", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
