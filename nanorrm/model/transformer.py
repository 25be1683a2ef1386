"""A decoder-only transformer: Qwen2, Qwen3 and Llama (RMSNorm, RoPE, grouped heads, SwiGLU).

Parameters carry the names of Hugging Face checkpoints, so a folder loads without a mapping. The
layers do not know where keys and values come from: they call `attend(layer, q, k, v)`, and the two
entrances, `forward` (packed sequences, for training) and `forward_cached` (new tokens against a
paged cache, for generation), differ in nothing else.
"""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

import kernels
from nanorrm.model import hf_folder


class RMSNorm(nn.Module):
    """x / rms(x) * weight, after adding the residual where one is given."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, residual=None):
        return kernels.rms_norm(x, self.weight, self.eps, residual)


class Attention(nn.Module):
    """Projections around `attend`; query heads in groups share a key-value head."""

    def __init__(self, c):
        super().__init__()
        C, D, bias = c.hidden_size, c.head_dim, c.attention_bias
        self.head_dim = D
        self.q_proj = nn.Linear(C, c.num_attention_heads * D, bias)
        self.k_proj = nn.Linear(C, c.num_key_value_heads * D, bias)
        self.v_proj = nn.Linear(C, c.num_key_value_heads * D, bias)
        self.o_proj = nn.Linear(c.num_attention_heads * D, C, bias=False)
        self.q_norm = RMSNorm(D, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, attend, layer):
        T = len(x)
        q = self.q_norm(self.q_proj(x).view(T, -1, self.head_dim))  # [T, C] -> [T, Hq, D]
        k = self.k_norm(self.k_proj(x).view(T, -1, self.head_dim))
        v = self.v_proj(x).view(T, -1, self.head_dim)
        return self.o_proj(attend(layer, q, k, v).reshape(T, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer. The residual travels beside x, so that each norm adds and normalises at once.

    With `recompute`, training keeps only the layer's inputs and runs it again for the gradient: a
    third more arithmetic for a fraction of the memory.
    """

    def __init__(self, c):
        super().__init__()
        self.recompute = False
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, *inputs):
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self.run, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self.run(*inputs)

    def run(self, x, residual, attend, layer):
        """x, residual (None in the first layer) [T, C] -> the same after this layer."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, attend, layer)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """Embedding, layers, final norm: ids [T] -> hidden [T, C]."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids, attend):
        x, residual = self.embed_tokens(ids), None
        for layer, block in enumerate(self.layers):
            x, residual = block(x, residual, attend, layer)
        return self.norm(x, residual)[0]


def rope_frequencies(head_dim, theta, scaling=None):
    """Radians per position of each pair of dimensions [D/2], in fp32 arithmetic as transformers has
    it: weights are trained with these very numbers.

    scaling (RopeScaling): a pair that turns fewer than low_freq_factor times within the old context
    is slowed down by the factor, one that turns more than high_freq_factor times is left alone, and
    in between the two are blended. Here the pairs turn 20, 2 and 0.2 times in the old context:

    >>> rope_frequencies(6, 1000.0)
    tensor([1.0000, 0.1000, 0.0100])
    >>> from nanorrm.model.architectures import RopeScaling
    >>> rope_frequencies(6, 1000.0, RopeScaling(4.0, 1.0, 4.0, 126))
    tensor([1.0000, 0.0501, 0.0025])
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if scaling is None:
        return frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rope_tables(c):
    """cos and sin of every position's angles, each [P, D/2]."""
    positions = torch.arange(c.max_position_embeddings).float()
    angles = torch.outer(positions, rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
    return angles.cos(), angles.sin()


class Transformer(nn.Module):
    """The whole model. `head` is the [V, C] matrix of the output layer (the embedding if tied)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def head(self):
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def device(self):
        return self.cos.device

    def forward(self, ids, cu_seqlens):
        """Packed causal forward. ids [T], cu_seqlens [B+1] -> hidden [T, C].

        Sequence b is ids[cu_seqlens[b]:cu_seqlens[b+1]]; sequences do not see one another.
        """
        starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
        positions = torch.arange(len(ids), device=ids.device) - starts

        def attend(layer, q, k, v):
            q, k = kernels.rope(q, k, self.cos, self.sin, positions)
            return kernels.attention(q, k, v, cu_seqlens)

        return self.model(ids, attend)

    def logprobs(self, ids, cu_seqlens, rows, targets, temperature=1.0):
        """Log-prob and entropy of target tokens, each [N] in fp32, without logits in memory.

        ids [T] and cu_seqlens [B+1] as in `forward`; rows [N]: the positions in ids that predict
        targets [N].
        """
        hidden = self(ids, cu_seqlens)[rows]  # [T, C] -> [N, C]
        return kernels.logprob(hidden, self.head, targets, temperature)

    def forward_cached(self, ids, cache, positions, slots, decode=None, prefill=None):
        """New tokens against the paged cache, which they are written to. ids [T] -> hidden [T, C].

        cache: (k, v), each [layers, num_blocks, block_size, Hkv, D]; positions [T]; slots [T]
        (where each token's key and value go, negative: nowhere). The tokens are those of decoding
        sequences, one each, then those of sequences in prefill, packed. Each kind brings what its
        attention needs (None: there is none of it):
        decode: (block_tables [B, M], seq_lens [B]);
        prefill: (block_tables [B, M], cu_seqlens [B+1], seq_lens [B]).
        """
        k_cache, v_cache = cache
        n = 0 if decode is None else len(decode[1])

        def attend(layer, q, k, v):
            pages = k_cache[layer], v_cache[layer]
            q = kernels.rope_write(q, k, v, self.cos, self.sin, positions, *pages, slots)
            if prefill is None:
                return kernels.paged_attention(q, *pages, *decode)
            out = kernels.paged_prefill(q[n:], *pages, *prefill)
            if n:
                out = torch.cat((kernels.paged_attention(q[:n], *pages, *decode), out))
            return out

        return self.model(ids, attend)

    def init_weights(self, seed):
        """Random weights: linear maps keep variance, the writes into the residual start small."""
        generator = torch.Generator().manual_seed(seed)
        depth = 2 * self.config.num_hidden_layers
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.data.zero_()
            elif p.dim() == 2:
                std = 0.02 if "embed_tokens" in name else p.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= depth**0.5
                p.data.copy_(torch.randn(p.shape, generator=generator) * std)
        return self

    @classmethod
    def skeleton(cls, folder, dtype=torch.float32):
        """The model that a folder's config.json describes, on meta: shapes without memory.

        What remains is `materialise`, before which a caller may shard it, and `hf_folder.fill`.
        """
        with torch.device("meta"):
            model = cls(hf_folder.read_config(folder))
        for p in model.parameters():  # not model.to(dtype): the RoPE tables stay fp32
            p.data = p.data.to(dtype)
        return model

    def materialise(self, device):
        """Memory on `device` for a skeleton (a sharded one: for this rank's parts), in place.

        The RoPE tables are made, the weights are what the memory held.
        """
        self.to_empty(device=device)
        self.cos, self.sin = (table.to(device) for table in rope_tables(self.config))
        return self

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Load a Hugging Face folder straight onto the device, tensor by tensor.

        Raises UserError naming what config.json asks for and is not built, and each file and tensor
        that does not fit.
        """
        model = cls.skeleton(folder, dtype).materialise(device)
        hf_folder.fill(model, folder)
        return model

    def save_pretrained(self, folder, tokenizer=None, dtype=None, **limits):
        """Write a Hugging Face folder that transformers and vLLM open.

        dtype of the files: by default the model's own; shard_bytes: as hf_folder.write_model.
        """
        dtype = dtype or self.head.dtype
        tensors = dict(self.named_parameters())
        hf_folder.write_model(folder, self.config, tensors, dtype, tokenizer, **limits)
