"""Masks are applied as xgrammar applies them."""

import numpy as np
import pytest
import torch

from serve.grammar.mask import apply_masks, n_words, only, pack


@pytest.mark.parametrize("n_tokens", [1, 2, 31, 32, 300, 1000])
def test_apply(n_tokens: int) -> None:
    import xgrammar  # imports transformers

    rng = np.random.default_rng(n_tokens)
    flags = rng.random((3, n_tokens)) < 0.5
    masks = np.stack([pack(row) for row in flags])
    logits = torch.randn(5, n_tokens + 8)
    found = logits.clone()
    apply_masks(found[:, :n_tokens], [4, 0, 2], masks)
    for row, allowed in zip((4, 0, 2), flags, strict=True):
        expected = logits[row].clone()
        expected[:n_tokens][~torch.from_numpy(allowed)] = -torch.inf
        assert torch.equal(found[row], expected)
        if n_tokens > 2:  # xgrammar 0.2.9 leaves masked tokens of tiny vocabularies
            one = logits[row : row + 1].clone()
            mask = torch.from_numpy(pack(allowed)[None])
            xgrammar.apply_token_bitmask_inplace(one, mask, vocab_size=n_tokens)
            assert torch.equal(found[row], one[0])
    assert torch.equal(found[[1, 3]], logits[[1, 3]])


def test_one_token() -> None:
    for token in (0, 31, 32, 63, 299):
        mask = only(token, 300)
        assert len(mask) == n_words(300)
        assert np.array_equal(mask, pack(np.arange(300) == token))
