"""Every operation the models spend time on, one file each; nothing here knows a model.

Each file opens with `reference`, plain PyTorch that defines the operation: it is the oracle of the
tests, the path taken on a CPU, and the lesson. `impl="auto" | "torch" | "triton"` chooses (see
`dispatch.py`). Letters: B sequences, T packed tokens, N rows, Hq/Hkv heads, D head size, V
vocabulary, M blocks per sequence.
"""

from kernels.flash_attention import attention
from kernels.linear_logprob import logprob
from kernels.paged_decode import paged_attention, paged_prefill
from kernels.rms_norm import rms_norm
from kernels.rope_cache import rope, rope_write
from kernels.sampling_head import sample
from kernels.swiglu_act import swiglu

__all__ = [
    "attention", "logprob", "paged_attention", "paged_prefill", "rms_norm", "rope", "rope_write",
    "sample", "swiglu",
]  # fmt: skip
