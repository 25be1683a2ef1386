"""The public kernels that ours are measured beside, each called as its own documentation says.

A peer takes the inputs, imports and plans, and returns the function of nothing that is timed; a
missing package raises ImportError before that, and the table says so. Peers compute what they
compute: Liger's and cut-cross-entropy's heads give no entropy, Liger's takes the mean over rows;
Liger's norm with a residual is two calls.
"""

from functools import partial
from importlib import metadata

import torch
import torch.nn.functional as F

PACKAGES = {
    "flash-attn": "flash-attn",
    "liger": "liger-kernel",
    "cut-cross-entropy": "cut-cross-entropy",
    "flashinfer": "flashinfer-python",
}


def versions():
    """Installed version of each peer, or None: {"liger": "0.6.1", "flash-attn": None, ...}."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def always(function):
    """A peer that has nothing to plan."""
    return lambda *inputs: partial(function, *inputs)


def compiled(function):
    """torch.compile of it, which forgets earlier shapes first: after eight of one function it
    would fall back to eager without a word."""

    def plan(*inputs):
        torch._dynamo.reset()
        return partial(torch.compile(function, dynamic=False), *inputs)

    return plan


def bf16_logits(hidden, weight, targets):
    """What most trainers do: logits in the model's dtype, softmax of them in fp32."""
    logp = (hidden @ weight.T).float().log_softmax(-1)  # [N, V]
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def cut_cross_entropy(hidden, weight, targets):
    """Log-probs without logits in memory; gradients through locks, no entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(hidden, weight, targets, reduction="none")


def liger_cross_entropy(hidden, weight, targets):
    """The mean loss; gradients are made in the forward pass."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return lambda: LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)


def sdpa(q, k, v, cu_seqlens):
    """scaled_dot_product_attention on sequences of one length: no padding, its best case."""
    B = len(cu_seqlens) - 1
    q, k, v = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in (q, k, v))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def torch_varlen(q, k, v, cu_seqlens):
    """torch.nn.attention.varlen: causal is a window of (-1, 0)."""
    from torch.nn.attention.varlen import varlen_attn

    longest, gqa = int(cu_seqlens.diff().max()), q.shape[1] != k.shape[1]
    bounds = cu_seqlens, cu_seqlens, longest, longest
    return lambda: varlen_attn(q, k, v, *bounds, window_size=(-1, 0), enable_gqa=gqa)


def flash_attn(q, k, v, cu_seqlens):
    """The flash-attn package, told the longest length so that no host sync is timed."""
    from flash_attn import flash_attn_varlen_func

    longest = int(cu_seqlens.diff().max())
    bounds = cu_seqlens, cu_seqlens, longest, longest
    return lambda: flash_attn_varlen_func(q, k, v, *bounds, causal=True)


def flashinfer_ragged(q, k, v, cu_seqlens):
    """FlashInfer's attention over packed sequences (forward only)."""
    import flashinfer

    workspace = torch.empty(2**28, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        cu_seqlens, cu_seqlens, q.shape[1], k.shape[1], q.shape[2], causal=True, q_data_type=q.dtype
    )
    return lambda: wrapper.run(q, k, v)


def torch_varlen_decode(q, k_cache, v_cache, block_tables, seq_lens):
    """torch.nn.attention.varlen over pages."""
    from torch.nn.attention.varlen import varlen_attn

    starts = torch.arange(len(q) + 1, device=q.device, dtype=torch.int32)
    longest = block_tables.shape[1] * k_cache.shape[1]
    return lambda: varlen_attn(
        q, k_cache, v_cache, starts, None, 1, longest,
        window_size=(-1, 0), enable_gqa=q.shape[1] != k_cache.shape[2],
        seqused_k=seq_lens, block_table=block_tables,
    )  # fmt: skip


def flashinfer_decode(q, k_cache, v_cache, block_tables, seq_lens):
    """FlashInfer's batched decode; its plan is made once per batch."""
    import flashinfer

    (Hq, D), (page, Hkv) = q.shape[1:], k_cache.shape[1:3]
    counts = (seq_lens + page - 1) // page
    indptr = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    used = torch.arange(block_tables.shape[1], device=q.device) < counts[:, None]
    workspace = torch.empty(2**28, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=Hq >= 4 * Hkv
    )
    wrapper.plan(
        indptr, block_tables[used], (seq_lens - 1) % page + 1, Hq, Hkv, D, page,
        data_type=q.dtype, q_data_type=q.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, (k_cache, v_cache))


def liger_rms_norm(x, weight, eps, residual):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def norm():
        total = x + residual
        return LigerRMSNormFunction.apply(total, weight, eps, 0.0, "llama", False), total

    return norm


def flashinfer_rms_norm(x, weight, eps, residual):
    """In place on x and residual, as its serving engines use it."""
    from flashinfer import fused_add_rmsnorm

    return lambda: fused_add_rmsnorm(x, residual, weight, eps)


def liger_swiglu(gate, up):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda: LigerSiLUMulFunction.apply(gate, up)


WHOLE = {  # a part of their backward pass is in the forward pass: not measured alone
    "cut-cross-entropy": cut_cross_entropy,
    "liger": liger_cross_entropy,
}
PEERS = {  # operation, or operation and phase -> name -> peer
    "logprob": {"bf16 logits": always(bf16_logits), "compiled": compiled(bf16_logits)},
    "logprob forward": WHOLE,
    "logprob forward+backward": WHOLE,
    "attention": {"varlen": torch_varlen, "flash-attn": flash_attn, "sdpa": sdpa},
    "attention forward": {"flashinfer": flashinfer_ragged},
    "paged_attention": {"varlen": torch_varlen_decode, "flashinfer": flashinfer_decode},
    "rms_norm": {"liger": liger_rms_norm},
    "rms_norm forward": {"flashinfer": flashinfer_rms_norm},
    "swiglu": {"liger": liger_swiglu},
}
