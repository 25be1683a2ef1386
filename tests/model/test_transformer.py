"""The model's two entrances against one another (test_checkpoint.py: against transformers)."""

import pytest
import tiny
import torch

from nanorrm.model.transformer import Transformer

LENGTHS = (1, 7, 30, 12)


def sequences(vocab, lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def test_packed_sequences_do_not_see_one_another():
    model = tiny.model()
    drawn = sequences(261)
    ids, bounds = tiny.pack(drawn)
    before = model(ids, bounds)
    changed = [list(s) for s in drawn]
    changed[2][10] = (changed[2][10] + 1) % 261
    after = model(tiny.pack(changed)[0], bounds)
    same = (before == after).all(1)
    seam = int(bounds[2]) + 10
    assert same[:seam].all()  # neither other sequences nor earlier tokens of this one
    assert not same[seam : int(bounds[3])].any()  # but the token itself and all later ones
    assert same[int(bounds[3]) :].all()


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4, 16])
def test_cached_forward_equals_packed(size):
    """Prefill in two pieces, then decode token by token, through blocks scattered at random."""
    model = tiny.model()
    c, B = model.config, 3
    drawn = sequences(261, (9, 33, 21))
    wanted = model(*tiny.pack(drawn))
    bounds = tiny.pack(drawn)[1]
    M = -(-40 // size)
    scattered = torch.randperm(4 * B * M, generator=torch.Generator().manual_seed(5))
    tables = scattered[: B * M].view(B, M)
    shape = (c.num_hidden_layers, 4 * B * M, size, c.num_key_value_heads, c.head_dim)
    cache = torch.full(shape, 7.0), torch.full(shape, -7.0)  # garbage where nothing is written

    def step(first, last, decode=False):
        news = [s[f:e] for s, f, e in zip(drawn, first, last)]
        ids, cu = tiny.pack(news)
        positions = torch.cat([torch.arange(f, e) for f, e in zip(first, last)])
        owner = torch.repeat_interleave(torch.arange(B), cu.diff())
        slots = tables[owner, positions // size] * size + positions % size
        ends = torch.tensor(last)
        attends = {"decode": (tables, ends)} if decode else {"prefill": (tables, cu, ends)}
        out = model.forward_cached(ids, cache, positions, slots, **attends)
        for b in range(B):
            got = out[cu[b] : cu[b + 1]]
            at = int(bounds[b])
            torch.testing.assert_close(
                got, wanted[at + first[b] : at + last[b]], atol=1e-5, rtol=1e-5
            )

    step([0, 0, 0], [3, 20, 1])
    step([3, 20, 1], [5, 29, 17])
    for i in range(4):
        step([5 + i, 29 + i, 17 + i], [6 + i, 30 + i, 18 + i], decode=True)


def test_initial_weights_depend_on_the_seed_alone():
    first, again, other = (Transformer(tiny.config()).init_weights(s) for s in (3, 3, 4))
    for p, q in zip(first.parameters(), again.parameters()):
        assert torch.equal(p, q)
    assert not torch.equal(first.head, other.head)
