"""The public kernels that ours are measured beside, each called as its own documentation says.

A peer takes the inputs, imports and plans, and returns the function of nothing that is timed
(`partial(partial, f)` has nothing to plan); a missing package raises ImportError before that. Peers
are pickled for the process that measures, so no lambdas. They compute what they compute: Liger's
and cut-cross-entropy's heads give no entropy, Liger's takes the mean over rows; its norm with a
residual is two calls.
"""

from functools import partial
from importlib import import_module, metadata

import torch
import torch.nn.functional as F

PACKAGES = {
    "flash-attn": "flash-attn",
    "liger": "liger-kernel",
    "cut-cross-entropy": "cut-cross-entropy",
    "flashinfer": "flashinfer-python",
}
CUT = "cut_cross_entropy", "linear_cross_entropy"
LIGER = "liger_kernel.transformers.functional"
VARLEN = "torch.nn.attention.varlen", "varlen_attn"
CAUSAL = {"window_size": (-1, 0), "enable_gqa": True}  # its way to say it


def versions():
    """Installed version of each peer, or None: {"liger": "0.6.1", "flash-attn": None, ...}."""
    installed = {str(found.name).replace("_", "-"): found for found in metadata.distributions()}
    return {name: getattr(installed.get(of), "version", None) for name, of in PACKAGES.items()}


def imported(module, name, *inputs, **settings):
    """A function of a module that may be missing."""
    return partial(getattr(import_module(module), name), *inputs, **settings)


def compiled(function, *inputs, **settings):
    """torch.compile of it, which forgets earlier shapes first: after eight of one function it
    would fall back to eager without a word."""
    torch._dynamo.reset()
    return partial(torch.compile(function, dynamic=False), *inputs, **settings)


def bf16_logits(hidden, weight, targets):
    """What most trainers do: logits in the model's dtype, softmax of them in fp32."""
    logp = (hidden @ weight.T).float().log_softmax(-1)  # [N, V]
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def sdpa(q, k, v, cu_seqlens):
    """scaled_dot_product_attention on sequences of one length: no padding, its best case."""
    B = len(cu_seqlens) - 1
    q, k, v = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in (q, k, v))
    return partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)


def packed(module, name, q, k, v, cu_seqlens, **settings):
    """A peer that is told the longest length, so that no host sync is timed."""
    longest = int(cu_seqlens.diff().max())
    bounds = cu_seqlens, cu_seqlens, longest, longest
    return imported(module, name, q, k, v, *bounds, **settings)


def varlen_decode(q, k_cache, v_cache, block_tables, seq_lens):
    """torch.nn.attention.varlen over pages."""
    starts = torch.arange(len(q) + 1, device=q.device, dtype=torch.int32)
    longest = block_tables.shape[1] * k_cache.shape[1]
    inputs = q, k_cache, v_cache, starts, None, 1, longest
    return imported(*VARLEN, *inputs, **CAUSAL, seqused_k=seq_lens, block_table=block_tables)


def flashinfer_ragged(q, k, v, cu_seqlens):
    """FlashInfer's attention over packed sequences (forward only)."""
    import flashinfer

    workspace = torch.empty(2**28, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    sizes = q.shape[1], k.shape[1], q.shape[2]
    wrapper.plan(cu_seqlens, cu_seqlens, *sizes, causal=True, q_data_type=q.dtype)
    return partial(wrapper.run, q, k, v)


def flashinfer_decode(q, k_cache, v_cache, block_tables, seq_lens):
    """FlashInfer's batched decode, planned once per batch; tables must have no unused entries."""
    import flashinfer

    (B, M), (page, Hkv), (Hq, D) = block_tables.shape, k_cache.shape[1:3], q.shape[1:]
    workspace = torch.empty(2**28, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=Hq >= 4 * Hkv
    )
    starts = M * torch.arange(B + 1, device=q.device, dtype=torch.int32)
    tables = starts, block_tables.flatten(), (seq_lens - 1) % page + 1
    wrapper.plan(*tables, Hq, Hkv, D, page, data_type=q.dtype, q_data_type=q.dtype)
    return partial(wrapper.run, q, (k_cache, v_cache))


def liger_rms_norm(x, weight, eps, residual):
    from liger_kernel.transformers import functional

    def norm():
        total = x + residual
        return functional.liger_rms_norm(total, weight, eps, in_place=False), total

    return norm


def flashinfer_rms_norm(x, weight, eps, residual):
    """In place on x and residual, as its serving engines use it."""
    return imported("flashinfer", "fused_add_rmsnorm", x, residual, weight, eps)


WHOLE = {  # a part of their backward pass is in the forward pass: not measured alone
    "cut-cross-entropy": partial(imported, *CUT, reduction="none"),
    "liger": partial(imported, LIGER, "liger_fused_linear_cross_entropy"),
}
PEERS = {  # operation, or operation and phase -> name -> peer
    "logprob": {
        "bf16 logits": partial(partial, bf16_logits),
        "compiled": partial(compiled, bf16_logits),
    },
    "logprob forward": WHOLE,
    "logprob forward+backward": WHOLE,
    "attention": {
        "varlen": partial(packed, *VARLEN, **CAUSAL),
        "flash-attn": partial(packed, "flash_attn", "flash_attn_varlen_func", causal=True),
        "sdpa": sdpa,
    },
    "attention forward": {"flashinfer": flashinfer_ragged},
    "paged_attention": {"varlen": varlen_decode, "flashinfer": flashinfer_decode},
    "rms_norm": {"liger": liger_rms_norm},
    "rms_norm forward": {"flashinfer": flashinfer_rms_norm},
    "swiglu": {"liger": partial(imported, LIGER, "liger_swiglu")},
}
