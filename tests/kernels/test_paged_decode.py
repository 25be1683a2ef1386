"""Attention over the paged cache: kernels against the references, decode and prefill."""

import pytest
import torch

from kernels import paged_decode, tiles
from kernels.flash_attention import attention
from kernels.paged_decode import (
    paged_attention,
    paged_prefill,
    probe_decode,
    probe_prefill,
    reference_decode,
    reference_prefill,
)

FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# (query heads, key heads, head size, page, lengths, of which new in the prefill form)
CASES = {
    "group of 2, scattered pages": (4, 2, 32, 16, [5, 70, 33, 128], [1, 20, 33, 2]),
    "group of 7, small pages": (7, 1, 24, 4, [33, 9, 96], [3, 9, 40]),
    "group of 20, page of one token": (20, 1, 16, 1, [17, 40], [17, 1]),
    "no group, one large page": (2, 2, 16, 256, [65, 200, 1], [1, 64, 1]),
    "splits filled exactly": (2, 1, 32, 16, [64, 128, 192], [64, 1, 16]),
}


@pytest.fixture(autouse=True)
def small_splits(monkeypatch, request):
    """64 tokens a split, so that small cases have several."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(paged_decode, "SPLIT", 64)


def case(Hq, Hkv, D, page, lengths, dtype, spare=2, width=0, device="cpu"):
    """q, caches, block_tables and seq_lens. Pages that no sequence uses hold NaN, and so do the
    rows behind a sequence's end; the tables' unused entries name such a page."""
    B, M = len(lengths), max(width, -(-max(lengths) // page))
    pages = B * M + spare
    caches = [torch.full((pages, page, Hkv, D), float("nan")) for _ in "kv"]
    free = torch.randperm(pages).tolist()
    tables = torch.full((B, M), free.pop(), dtype=torch.int32)
    for b, length in enumerate(lengths):
        for i in range(-(-length // page)):
            tables[b, i] = free.pop()
            rows = min(page, length - i * page)
            for cache in caches:
                cache[tables[b, i], :rows] = torch.randn(rows, Hkv, D)
    q = torch.randn(B, Hq, D)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return [x.to(device, dtype) for x in (q, *caches)] + [tables.to(device), seq_lens.to(device)]


def clean(caches):
    """The references multiply what they masked by zero: give them no NaN."""
    return [cache.nan_to_num(0.0) for cache in caches]


def compare_decode(close, q, k_cache, v_cache, tables, seq_lens, **kwargs):
    ours = paged_attention(q, k_cache, v_cache, tables, seq_lens, impl="triton", **kwargs)
    caches = clean((k_cache, v_cache))
    own = reference_decode(q, *caches, tables, seq_lens, **kwargs)
    wide = [x.double() for x in (q, *caches)]
    truth = reference_decode(*wide, tables, seq_lens, **kwargs)
    assert ours.dtype == q.dtype
    close(ours, own, truth, floor=FLOOR[q.dtype])


def compare_prefill(close, new, q, k_cache, v_cache, tables, seq_lens, **kwargs):
    cu_seqlens = torch.tensor([0, *new], device=q.device).cumsum(0).to(torch.int32)
    q = torch.randn(sum(new), *q.shape[1:]).to(q)
    bounds = tables, cu_seqlens, seq_lens
    ours = paged_prefill(q, k_cache, v_cache, *bounds, impl="triton", **kwargs)
    caches = clean((k_cache, v_cache))
    own = reference_prefill(q, *caches, *bounds, **kwargs)
    truth = reference_prefill(*(x.double() for x in (q, *caches)), *bounds, **kwargs)
    assert ours.dtype == q.dtype
    close(ours, own, truth, floor=FLOOR[q.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_decode_matches_reference(close, name, dtype):
    *shape, _ = CASES[name]
    compare_decode(close, *case(*shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_prefill_matches_reference(close, name, dtype):
    *shape, new = CASES[name]
    compare_prefill(close, new, *case(*shape, dtype))


def test_scale_and_large_logits(close):
    q, *rest = case(4, 2, 32, 16, [40, 90], torch.float32)
    compare_decode(close, q * 30, *rest)
    compare_decode(close, q, *rest, scale=1)
    compare_prefill(close, [3, 9], q, *rest, scale=0.5)


def test_the_shipped_split(close, monkeypatch):
    """512 tokens, and more splits than one step of the combine takes."""
    monkeypatch.setattr(paged_decode, "SPLIT", 512)
    values = {"BN": 128, "PROGRAMS": 3}
    monkeypatch.setitem(tiles.TILES, "paged_decode", [("interpret", {}, values)])
    compare_decode(close, *case(2, 1, 16, 64, [1700, 512, 513], torch.float32))


def test_same_bits_in_any_company(monkeypatch):
    """Batch, table width and number of programs do not show in a sequence's result."""
    q, k_cache, v_cache, tables, seq_lens = case(2, 1, 16, 8, [200, 30, 129], torch.float32)
    together = paged_attention(q, k_cache, v_cache, tables, seq_lens, impl="triton")
    for b in range(3):
        one = slice(b, b + 1)
        used = -(-int(seq_lens[b]) // 8)
        alone = paged_attention(
            q[one], k_cache, v_cache, tables[one, :used], seq_lens[one], impl="triton"
        )
        assert torch.equal(alone, together[one])
    for programs in (1, 1000):
        values = {"BN": 16, "PROGRAMS": programs}
        monkeypatch.setitem(tiles.TILES, "paged_decode", [("interpret", {}, values)])
        again = paged_attention(q, k_cache, v_cache, tables, seq_lens, impl="triton")
        assert torch.equal(again, together)


def test_empty_slots_of_a_captured_batch():
    """A graph is captured for a fixed batch: the slots without a sequence have length 0."""
    q, k_cache, v_cache, tables, seq_lens = case(2, 1, 16, 8, [60, 9, 20], torch.float32)
    full = paged_attention(q, k_cache, v_cache, tables, seq_lens, impl="triton")
    seq_lens[1] = 0
    out = paged_attention(q, k_cache, v_cache, tables, seq_lens, impl="triton")
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(out[[0, 2]], full[[0, 2]])
    seq_lens.zero_()
    assert not paged_attention(q, k_cache, v_cache, tables, seq_lens, impl="triton").any()


def test_launch_reads_nothing_from_the_device(monkeypatch):
    """What decides the grid is shapes: a launch that looked at seq_lens could not be captured."""
    inputs = case(2, 1, 16, 8, [60, 9], torch.float32)
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(paged_decode, "decode_kernel", Kernel())
    monkeypatch.setattr(paged_decode, "combine_kernel", Kernel())
    for name in ("item", "tolist", "__int__", "__bool__", "__index__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a host sync"))
    paged_attention(*inputs, 1.0, impl="triton")
    monkeypatch.undo()
    assert grids == [(2, 1), (2, 2)]  # 2 sequences x 1 split of 512; 2 sequences x 2 heads


def test_grid_limits(monkeypatch):
    """512 sequences of 128k tokens: programs share the items, and no dimension nears 65,535."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(paged_decode, "decode_kernel", Kernel())
    monkeypatch.setattr(paged_decode, "combine_kernel", Kernel())
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    q = torch.zeros(512, 28, 128)
    cache = torch.zeros(1, 16, 4, 128)
    tables = torch.zeros(512, 8192, dtype=torch.int32)
    seq_lens = torch.zeros(512, dtype=torch.int32)
    paged_attention(q, cache, cache, tables, seq_lens, impl="triton")
    assert all(y < 65_536 for _, y in grids) and grids[1] == (512, 28)


def test_prefill_with_nothing_cached_is_attention():
    lengths = [37, 5]
    q, k_cache, v_cache, tables, seq_lens = case(4, 2, 16, 8, lengths, torch.float32)
    q = torch.randn(42, 4, 16)
    cu_seqlens = torch.tensor([0, 37, 42])
    index = torch.cat([torch.arange(n) + b * tables.shape[1] * 8 for b, n in enumerate(lengths)])
    k, v = (c[tables.long()].flatten(0, 2)[index] for c in (k_cache, v_cache))
    expected = attention(q, k, v, cu_seqlens, impl="torch")
    found = paged_prefill(q, k_cache, v_cache, tables, cu_seqlens, seq_lens, impl="triton")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_one_new_token_after_a_prefix_hit_is_decoding():
    """A prompt whose every full block was cached: one token left to run, as for a GRPO group."""
    q, k_cache, v_cache, tables, seq_lens = case(4, 2, 16, 8, [64, 33], torch.float32)
    cu_seqlens = torch.tensor([0, 1, 2], dtype=torch.int32)
    a = paged_prefill(q, k_cache, v_cache, tables, cu_seqlens, seq_lens, impl="triton")
    b = paged_attention(q, k_cache, v_cache, tables, seq_lens, impl="triton")
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_shared_pages():
    """Two sequences may list the same pages."""
    q, k_cache, v_cache, tables, seq_lens = case(2, 1, 16, 8, [40, 40], torch.float32)
    tables[1] = tables[0]
    q[1] = q[0]
    out = paged_attention(q, k_cache, v_cache, tables, seq_lens, impl="triton")
    assert torch.equal(out[0], out[1])


def test_strided_caches(close):
    """A layer's slice of one large cache, and q as a slice of a packed projection."""
    q, k_cache, v_cache, tables, seq_lens = case(2, 1, 16, 8, [40, 23], torch.float32)
    both = torch.stack([k_cache, v_cache], 1)  # [blocks, 2, page, Hkv, D]
    packed = torch.cat([q, q], 1)
    compare_decode(close, packed[:, :2], both[:, 0], both[:, 1], tables, seq_lens)
    compare_prefill(close, [7, 1], q, both[:, 0], both[:, 1], tables, seq_lens)


def test_int64_bounds():
    q, k_cache, v_cache, tables, seq_lens = case(2, 1, 16, 8, [40, 23], torch.float32)
    a = paged_attention(q, k_cache, v_cache, tables, seq_lens, impl="triton")
    b = paged_attention(q, k_cache, v_cache, tables.long(), seq_lens.long(), impl="triton")
    assert torch.equal(a, b)


def test_heads_that_do_not_divide():
    q, *rest = case(3, 2, 16, 8, [5], torch.float32)
    with pytest.raises(ValueError, match="3 query heads over 2"):
        paged_attention(q, *rest, impl="triton")


@pytest.mark.parametrize("probe", [probe_decode, probe_prefill])
def test_probes_agree(probe):
    """What `auto` runs before it trusts the kernels."""
    for ours, own in zip(*probe(torch.device("cpu"), torch.float32)):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


GPU_CASES = [
    (14, 2, 64, 16, [1, 511, 4096, 130], [1, 511, 100, 2]),
    (28, 4, 128, 16, [2048, 77, 10_000], [1, 77, 512]),
    (8, 8, 32, 256, [300, 301], [5, 301]),
    (4, 1, 96, 16, [2570, 1], [200, 1]),
    (8, 2, 256, 16, [700, 31], [64, 31]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", GPU_CASES, ids=str)
def test_on_a_gpu(close, shape, dtype):
    *shape, new = shape
    inputs = case(*shape, dtype, device="cuda")
    compare_decode(close, *inputs)
    compare_prefill(close, new, *inputs)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Captured once, replayed with other lengths."""
    inputs = case(28, 4, 128, 16, [900, 2000, 40], torch.bfloat16, device="cuda")
    paged_attention(*inputs, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*inputs, impl="triton")
    for lengths in ([900, 2000, 40], [512, 1, 0]):
        inputs[-1].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, paged_attention(*inputs, impl="triton"))
