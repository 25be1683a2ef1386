"""The generator against published vectors, the draw against naive versions and its distribution."""

import hashlib
import math
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.philox import philox, uniform
from nanorrm.config import UserError
from nanorrm.engine.sampling import SamplingParams, draw, stream_id, truncate

# Random123's known-answer file, philox4x32 with 10 rounds: counter, key, result
KNOWN = [
    (" ".join(["00000000"] * 4), "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (" ".join(["ffffffff"] * 4), "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(counter, key, result):
    low, high = words(key)
    key = struct.unpack("<q", struct.pack("<II", low, high))[0]
    out = philox(torch.tensor([key]), *words(counter))
    assert [int(word) for word in out] == words(result)


def test_philox_broadcasts_counters():
    keys = torch.tensor([3, -5, 1 << 40])[:, None]
    counters = torch.arange(4)[None]
    table = philox(keys, counters, 9)[0]
    assert table.shape == (3, 4)
    assert table[1, 2] == philox(torch.tensor([-5]), 2, 9)[0][0]


def test_uniform_is_triton_s():
    """tl.rand: the first word, its upper half mirrored down, times a scale."""
    keys = torch.arange(1000)
    first = philox(keys, 7)[0].tolist()
    got = uniform(keys, 7)
    for word, u in zip(first, got.tolist()):
        folded = 0xFFFFFFFF - word if word >> 31 else word
        wanted = torch.tensor(folded).float() * torch.tensor(4.6566127342e-10)
        assert u == wanted.item()
    assert got.dtype == torch.float32 and got.min() >= 0 and got.max() < 1
    top = torch.tensor(0x7FFFFFFF).float() * 4.6566127342e-10
    assert top < 1  # the largest word still gives less than one


def draws(logits, n, **settings):
    """n draws from one distribution: half over streams, half over positions of one stream."""
    params = SamplingParams(**settings)
    many = torch.arange(n // 2)
    stream = torch.cat((many, torch.full((n // 2,), 123456789)))
    position = torch.cat((torch.full((n // 2,), 5), many))
    return draw(logits.expand(n, -1), params, stream, position)


# chi-square quantiles at 1 - 1e-4
QUANTILE = {7: 29.88, 15: 44.26}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("size", [8, 16])
def test_draws_follow_the_distribution(temperature, size):
    """Chi-square of 2 x 10,000 draws; a right sampler fails with chance 1e-4 (fixed seed)."""
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(size))
    n = 20000
    wanted = (logits[0].double() / temperature).softmax(-1)
    ids = draws(logits, n, temperature=temperature)[0]
    for half in ids.chunk(2):
        seen = half.bincount(minlength=size).double()
        expected = wanted * len(half)
        assert expected.min() > 5
        assert ((seen - expected) ** 2 / expected).sum() < QUANTILE[size - 1]


def naive_support(logits, p):
    """Which tokens may be drawn, one plain list step after another."""
    weights = [math.exp(x / p.temperature) for x in logits]
    alive = dict(enumerate(w / sum(weights) for w in weights))
    ranked = sorted(alive, key=lambda i: -alive[i])
    if p.top_k:
        ranked = ranked[: p.top_k]
    ranked = [i for i in ranked if alive[i] >= p.min_p * alive[ranked[0]]]
    total = sum(alive[i] for i in ranked)
    kept, reached = [], 0.0
    for i in ranked:
        if reached >= p.top_p:
            break
        kept.append(i)
        reached += alive[i] / total
    return sorted(kept)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 30),
    temperature=st.floats(0.3, 3),
    top_k=st.integers(0, 35),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 1.0)),
)
def test_cut_supports_equal_a_naive_version(seed, size, temperature, top_k, top_p, min_p):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, size, generator=generator)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probs = truncate((logits / temperature).softmax(-1), params)
    kept = naive_support(logits[0].tolist(), params)
    assert probs[0].nonzero()[:, 0].tolist() == kept
    # the log-prob of a draw is that of the cut distribution, renormalised
    n = 50
    ids, logp, raw = draw(
        logits.expand(n, -1), params, torch.arange(n), torch.full((n,), seed % 1000)
    )
    assert set(ids.tolist()) <= set(kept)
    wide = logits[0].double()
    cut = (wide[kept] / temperature).log_softmax(-1)
    wanted = torch.stack([cut[kept.index(i)] for i in ids.tolist()])
    torch.testing.assert_close(logp.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(raw.double(), wide.log_softmax(-1)[ids], atol=1e-5, rtol=1e-5)


def test_zero_probability_is_never_drawn():
    """Dead tokens first, last and in between, over 40,000 draws."""
    logits = torch.tensor([[-1e9, 0.3, -1e9, 1.0, -math.inf, -0.5, -1e9, -math.inf]])
    ids, logp, _ = draws(logits, 40000)
    assert set(ids.tolist()) == {1, 3, 5}
    assert torch.isfinite(logp).all()


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-24, 1.0])
def test_ends_of_the_unit_interval_draw_living_tokens(monkeypatch, u):
    """Even if rounding lifts u to the very end of the cumulative sum."""
    monkeypatch.setattr("nanorrm.engine.sampling.uniform", lambda s, p: torch.full(s.shape, u))
    logits = torch.tensor([[-math.inf, 0.1, 0.2, 0.3, -math.inf]])
    ids, logp, _ = draw(logits, SamplingParams(), torch.zeros(1).long(), torch.zeros(1).long())
    assert ids.item() == (1 if u == 0 else 3) and torch.isfinite(logp).all()


def test_greedy_takes_the_largest_with_log_probs_at_temperature_one():
    logits = torch.randn(9, 20, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(9).long()
    ids, logp, raw = draw(logits, SamplingParams(temperature=0), zero, zero)
    assert torch.equal(ids, logits.argmax(-1))
    wanted = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(logp, wanted)
    torch.testing.assert_close(raw, wanted)


def test_forced_tokens_are_taken_and_count_nothing():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    stream, position = torch.arange(3), torch.arange(3)
    free = draw(logits, SamplingParams(), stream, position)
    ids, logp, raw = draw(
        logits, SamplingParams(), stream, position, forced=torch.tensor([-1, 4, -1])
    )
    assert ids.tolist() == [free[0][0], 4, free[0][2]]
    assert logp.tolist() == [free[1][0], 0.0, free[1][2]]
    torch.testing.assert_close(raw[1], logits[1].log_softmax(-1)[4])


def test_log_probs_can_be_left_out():
    logits, one = torch.randn(2, 5), torch.ones(2).long()
    assert draw(logits, SamplingParams(logprobs=False), one, one)[1:] == (None, None)


def expected_stream(seed, prompt, index):
    """Little-endian signed 64-bit words: seed, index, prompt; hashed to 8 bytes."""
    data = b"".join(struct.pack("<q", number) for number in (seed, index, *prompt))
    return struct.unpack("<q", hashlib.blake2b(data, digest_size=8).digest())[0]


def test_stream_differs_by_seed_prompt_and_index():
    keys = [(0, [1, 2], 0), (1, [1, 2], 0), (0, [1, 3], 0), (0, [1], 0), (0, [2, 1], 0)]
    keys += [(0, [1, 2], 1), (1, [0, 1, 2], 0), (0, [1, 2, 0], 0)]
    ids = [stream_id(*key) for key in keys]
    assert ids == [expected_stream(*key) for key in keys]
    assert len(set(ids)) == len(keys)


def test_stream_is_the_same_in_every_process(root):
    code = "from nanorrm.engine.sampling import stream_id; print(stream_id(7, [5, 0, 260], 3))"
    env = {"PYTHONHASHSEED": "99", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert int(done.stdout) == expected_stream(7, [5, 0, 260], 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"max_tokens": 0},
        {"max_think_tokens": -1},
    ],
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingParams(**wrong)
