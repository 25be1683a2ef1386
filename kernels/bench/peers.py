"""The public kernels that ours are measured beside, each called as its own documentation says.

Every import is inside its function, so that a missing package is found when it is asked for. The
peers compute what they compute: Liger's and cut-cross-entropy's heads give no entropy, Liger's
takes the mean over rows; Liger's norm with a residual is two calls. Peers that plan ahead
(FlashInfer) plan outside the time that is measured.
"""

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


def sdpa_even(B):
    """scaled_dot_product_attention on B sequences of one length: no padding, its best case."""

    def attend(q, k, v, cu_seqlens):
        q, k, v = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend


def torch_varlen(longest):
    """torch.nn.attention.varlen: causal is a window of (-1, 0)."""

    def attend(q, k, v, cu_seqlens):
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest,
            window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    return attend


def flash_attn(longest):
    """The flash-attn package, told the longest length so that no host sync is timed."""

    def attend(q, k, v, cu_seqlens):
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True
        )

    return attend


def torch_varlen_decode(q, k_cache, v_cache, block_tables, seq_lens):
    """torch.nn.attention.varlen over pages."""
    from torch.nn.attention.varlen import varlen_attn

    B = len(q)
    starts = torch.arange(B + 1, device=q.device, dtype=torch.int32)
    longest = block_tables.shape[1] * k_cache.shape[1]
    return varlen_attn(
        q, k_cache, v_cache, starts, None, 1, longest,
        window_size=(-1, 0), enable_gqa=q.shape[1] != k_cache.shape[2],
        seqused_k=seq_lens, block_table=block_tables,
    )  # fmt: skip


def flash_attn_decode(q, k_cache, v_cache, block_tables, seq_lens):
    """flash-attn over pages (its pages are 256 tokens or a multiple: ours of 16 it refuses)."""
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(
        q[:, None], k_cache, v_cache, cache_seqlens=seq_lens, block_table=block_tables, causal=True
    )


def flashinfer_decode(q, k_cache, v_cache, block_tables, seq_lens):
    """FlashInfer's batched decode; its plan is made once per batch, outside the time."""
    import flashinfer

    page = k_cache.shape[1]
    counts = (seq_lens + page - 1) // page
    indptr = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    used = torch.arange(block_tables.shape[1], device=q.device) < counts[:, None]
    workspace = torch.empty(2**28, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=q.shape[1] >= 4 * k_cache.shape[2]
    )
    wrapper.plan(
        indptr, block_tables[used], (seq_lens - 1) % page + 1,
        q.shape[1], k_cache.shape[2], q.shape[2], page, data_type=q.dtype, q_data_type=q.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, (k_cache, v_cache))


def flashinfer_ragged(q, k, v, cu_seqlens):
    """FlashInfer's attention over packed sequences (forward only)."""
    import flashinfer

    workspace = torch.empty(2**28, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        cu_seqlens, cu_seqlens, q.shape[1], k.shape[1], q.shape[2], causal=True, q_data_type=q.dtype
    )
    return lambda: wrapper.run(q, k, v)


def bf16_logits(hidden, weight, targets):
    """What most trainers do: logits in the model's dtype, softmax of them in fp32."""
    logp = (hidden @ weight.T).float().log_softmax(-1)  # [N, V]
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def cut_cross_entropy(hidden, weight, targets):
    """Log-probs without logits in memory; gradients through locks, no entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, reduction="none")


def liger_linear_cross_entropy(hidden, weight, targets):
    """The mean loss; gradients are made in the forward pass."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)


def liger_rms_norm(x, weight, eps, residual):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    total = x + residual
    return LigerRMSNormFunction.apply(total, weight, eps, 0.0, "llama", False), total


def flashinfer_rms_norm(x, weight, eps, residual):
    """In place on x and residual, as its serving engines use it."""
    from flashinfer import fused_add_rmsnorm

    fused_add_rmsnorm(x, residual, weight, eps)
    return x, residual


def liger_swiglu(gate, up):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)
