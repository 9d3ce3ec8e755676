"""A regular expression for one of many texts, such as the special tokens of a tokenizer."""

import itertools
import re
from collections.abc import Sequence


def longest_of(texts: Sequence[str]) -> str:
    """A regular expression for the longest of some texts at a place. Their common beginnings are
    read once, so the time does not grow with the number of texts."""
    if not texts:
        return "(?!)"
    pairs = zip(min(texts), max(texts), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    begin = texts[0][:common]
    rest = sorted({text[len(begin) :] for text in texts})
    groups = [list(group) for _, group in itertools.groupby(filter(None, rest), lambda t: t[0])]
    found = "|".join(map(longest_of, groups))
    if not groups:
        return re.escape(begin)
    return f"{re.escape(begin)}(?:{found})" + ("?" if "" in rest else "")
