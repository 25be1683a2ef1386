"""Rotary position embedding, alone and together with the write into the paged cache.

Dimension i is paired with i + D/2 (the layout of Hugging Face checkpoints), and the pair is
rotated by the angle position * theta**(-2i/D), whose cosines and sines come in tables:

    a' = a cos - b sin        b' = b cos + a sin        with a = x[i], b = x[i + D/2]

A rotation's transpose is the rotation back, so the gradient is the same kernel with -sin.

A program does one token, all its heads, so that the angles are read once. In a decode step the
rotated k goes straight to its place in the cache, and v with it: three launches are one.
Traffic only: each of q, k and v read once and written once, 2 * 2 * (Hq + 2 Hkv) * D bytes a token.
"""

import torch

from kernels.dispatch import both_ways, choose, dense
from kernels.tiles import aot_case, choices, tile
from kernels.triton_compat import jit, tl, triton


def rotate(x, cos, sin):
    """x [T, H, D], cos and sin [T, D/2] -> [T, H, D]."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def reference_rope(q, k, cos, sin, positions):
    """Look the angles up, turn q and k."""
    cos, sin = cos[positions], sin[positions]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def reference_write(q, k, v, cos, sin, positions, k_cache, v_cache, slots):
    """Turn q and k; store k and v where the slots say."""
    q, k = reference_rope(q, k, cos, sin, positions)
    if (slots < 0).any():
        k, v, slots = k[slots >= 0], v[slots >= 0], slots[slots >= 0]
    k_cache.view(-1, *k_cache.shape[2:])[slots] = k.to(k_cache.dtype)
    v_cache.view(-1, *v_cache.shape[2:])[slots] = v.to(v_cache.dtype)
    return q


@jit
def turn(
    x, out, head_x, head_out, cos, sin,
    HEADS: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rotate one token's heads: x [HEADS, D] -> out [HEADS, D]; cos and sin [BD] fp32."""
    h, i = tl.arange(0, BH)[:, None], tl.arange(0, BD)[None, :]
    inside = (h < HEADS) & (i < D // 2)
    a = tl.load(x + h * head_x + i, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + h * head_x + i + D // 2, mask=inside, other=0.0).to(tl.float32)
    first = a * cos[None, :] - b * sin[None, :]
    second = b * cos[None, :] + a * sin[None, :]
    kind = out.dtype.element_ty
    tl.store(out + h * head_out + i, first.to(kind), mask=inside)
    tl.store(out + h * head_out + i + D // 2, second.to(kind), mask=inside)


@jit
def rope_kernel(
    q, k, v, q_out, k_out, v_out, cos, sin, positions, slots,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head, v_out_token, v_out_head,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BKV: tl.constexpr,
    BD: tl.constexpr, WRITE: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Grid (T,). q_out [T, HQ, D]. WRITE: k and v go to row slots[t] of the caches k_out and v_out,
    nowhere if that is negative; else k goes to row t of k_out. BACK: rotate the other way."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BD)
    angle = tl.load(positions + token).to(tl.int64) * (D // 2) + i
    c = tl.load(cos + angle, mask=i < D // 2, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=i < D // 2, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    turn(q + token * q_token, q_out + token * HQ * D, q_head, D, c, s, HQ, D, BQ, BD)
    row = tl.load(slots + token).to(tl.int64) if WRITE else token
    if row >= 0:
        k_to = k_out + row * out_token
        turn(k + token * k_token, k_to, k_head, out_head, c, s, HKV, D, BKV, BD)
        if WRITE:
            h, d = tl.arange(0, BKV)[:, None], tl.arange(0, 2 * BD)[None, :]
            inside = (h < HKV) & (d < D)
            value = tl.load(v + token * v_token + h * v_head + d, mask=inside, other=0.0)
            v_at = v_out + row * v_out_token + h * v_out_head + d
            tl.store(v_at, value.to(v_out.dtype.element_ty), mask=inside)


def shapes(Hq, Hkv, D):
    """The kernel's constexprs that follow from the shape."""
    power = triton.next_power_of_2
    return {"HQ": Hq, "HKV": Hkv, "D": D, "BQ": power(Hq), "BKV": power(Hkv), "BD": power(D // 2)}


def launch(q, k, cos, sin, positions, back=False, v=None, caches=None, slots=None):
    """Launch the kernel: (q, k) rotated, or q rotated and k and v written to the caches."""
    q, k, cos, sin = dense(q), dense(k), cos.contiguous(), sin.contiguous()
    (T, Hq, D), Hkv = q.shape, k.shape[1]
    q_out = torch.empty(T, Hq, D, dtype=q.dtype, device=q.device)
    write = caches is not None
    if not write:
        v, slots = k, positions  # not read
        caches = [torch.empty(T, Hkv, D, dtype=k.dtype, device=k.device)] * 2
    v, k_out, v_out = dense(v), *(x.view(-1, Hkv, D) for x in caches)  # raises for gaps in caches
    strides = [stride for x in (q, k, v, k_out, v_out) for stride in x.stride()[:2]]
    rope_kernel[(T,)](
        q, k, v, q_out, k_out, v_out, cos, sin, positions, slots, *strides,
        WRITE=write, BACK=back, **shapes(Hq, Hkv, D), **tile("rope", q),
    )  # fmt: skip
    return q_out, k_out


class Rope(torch.autograd.Function):
    """The kernel as a differentiable operation: backward turns the gradients back."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, positions):
        ctx.save_for_backward(cos, sin, positions)
        return launch(q, k, cos, sin, positions)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_q, grad_k):
        return *launch(grad_q, grad_k, *ctx.saved_tensors, back=True), None, None, None


def rope(q, k, cos, sin, positions, impl="auto"):
    """q [T, Hq, D], k [T, Hkv, D] rotated to positions [T]; cos, sin [P, D/2] are the tables.

    Returns new q and k. Differentiable in q and k.
    """
    impl = choose(impl, "rope", q, k, probe=probe)
    if impl == "torch" or q.shape[0] == 0:
        return reference_rope(q, k, cos, sin, positions)
    return Rope.apply(q, k, cos, sin, positions)


def rope_write(q, k, v, cos, sin, positions, k_cache, v_cache, slots, impl="auto"):
    """Rotate q [T, Hq, D] and k [T, Hkv, D]; write k and v [T, Hkv, D] into the caches.

    Caches [num_blocks, block_size, Hkv, D] are written in place at slots [T] (block * block_size
    + offset; negative = not written). Returns the rotated q. No gradient.
    """
    impl = choose(impl, "rope_write", q, k, v, probe=probe_write)
    if impl == "torch" or q.shape[0] == 0:
        return reference_write(q, k, v, cos, sin, positions, k_cache, v_cache, slots)
    caches, slots = (k_cache, v_cache), slots.contiguous()
    return launch(q, k, cos, sin, positions, v=v, caches=caches, slots=slots)[0]


def probe(device, dtype):
    """The trial launch of `rope`."""
    q, k = (torch.randn(20, h, 64, device=device, dtype=dtype, requires_grad=True) for h in (6, 2))
    angles = torch.randn(100, 32, device=device)
    positions = torch.randint(0, 100, (20,), device=device)
    return both_ways(rope, q, k, angles.cos(), angles.sin(), positions)


def probe_write(device, dtype):
    """The trial launch of `rope_write`: rotated q and both caches."""
    q, k, v = (torch.randn(20, h, 64, device=device, dtype=dtype) for h in (6, 2, 2))
    angles = torch.randn(100, 32, device=device)
    caches = torch.zeros(2, 4, 8, 2, 64, device=device, dtype=dtype)
    slots = torch.randperm(32, device=device)[:20]
    slots[5] = -1

    def write(*args, impl):
        return rope_write(*args, impl=impl), *args[6:8]

    positions = slots + 50
    return both_ways(write, q, k, v, angles.cos(), angles.sin(), positions, *caches, slots)


def aot_cases(arch):
    """What `kernels/check.py` compiles: the head shapes of Qwen2.5 0.5B, 7B and 32B."""
    for _, values in choices("rope", arch):
        for heads in ((14, 2, 64), (28, 4, 128), (40, 8, 128)):
            for name, write in (("rope", False), ("rope_write", True)):
                shape = {"WRITE": write, "BACK": False, **shapes(*heads)}
                yield aot_case(name, rope_kernel, values, **shape)
