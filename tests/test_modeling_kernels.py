"""Which way attention takes, and in which pieces."""

import pytest
import torch

from smca.modeling import kernels, piecewise


def test_the_longest_token_decides_whether_the_fused_kernel_has_the_gradients():
    # The bound is on the largest logit that there can be, |query| |key|.
    bound = kernels._MAX_LOGIT
    one_long = torch.zeros(1, 1, 400, 4)
    one_long[0, 0, 7] = 0.6 * bound**0.5  # the norm of a token: 1.2, of a channel: 0.6
    all_short = torch.full((1, 1, 400, 4), 0.4 * bound**0.5)  # 0.8, and 8
    for tokens, can in ((one_long, False), (all_short, True)):
        tokens.requires_grad_()
        assert kernels._can_fuse(tokens, tokens, 1.0, 0.0) is can
        assert kernels._can_fuse(tokens, tokens, 0.1, 0.0)
        assert kernels._can_fuse(tokens.detach(), tokens.detach(), 1.0, 0.0)
        assert not kernels._can_fuse(tokens.detach(), tokens.detach(), 0.1, 0.1)


@pytest.mark.parametrize(
    "images, num_queries, num_keys, sizes",
    [
        (1, 4, 1 << 19, [8 << 19]),  # 16 MiB in float32, of 2 heads: kept whole
        (5, 300, 1500, [2 * 300 * 1500] * 5),  # 2 of 10 rows
        (4, 1100, 1 << 12, [220 << 12] * 40),  # a fifth of each of 8 rows
        (4, 40, 1 << 17, [14 << 17, 14 << 17, 12 << 17] * 8),  # no less than a third
    ],
)
def test_attention_in_pieces_holds_so_many_logits(
    monkeypatch, images, num_queries, num_keys, sizes
):
    held = []
    monkeypatch.setattr(piecewise, "draw_dropped", lambda w, p: held.append(w.numel()))
    monkeypatch.setattr(piecewise, "dropout", lambda w, p: held.append(w.numel()) or w)
    query, key = torch.zeros(images, 2, num_queries, 1), torch.zeros(images, 2, num_keys, 1)
    kernels.attend(query, key, key, dropout_p=0.1)
    assert held == sizes
