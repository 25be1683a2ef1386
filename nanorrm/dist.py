"""Several processes under `torchrun`: who they are, and rollouts shared among them.

Each rank has its own engine and weights. Since a completion depends on its prompt, seed and index
only, the ranks can split the prompts any way they like and the result is the same.
"""

import atexit
import os

import torch
import torch.distributed as dist

from nanorrm.config import UserError


def init():
    """Join the process group that torchrun describes; nothing to do in a single process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)  # or the ranks abort one another on leaving


def rank():
    """This process's number, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def generate(engine, prompts, params):
    """`engine.generate` with the prompts dealt out, longest first; every rank gets all results.

    All ranks must call it with the same prompts and params (SamplingParams, or one per prompt).
    """
    if world_size() == 1:
        return engine.generate(prompts, params)
    each = params if isinstance(params, list) else [params] * len(prompts)
    for i, (prompt, p) in enumerate(zip(prompts, each)):  # on every rank, or the others would wait
        if refusal := engine.refusal(prompt, p):
            raise UserError(f"request {i}: {refusal}")
    cost = [len(p) + q.n * q.max_tokens for p, q in zip(prompts, each)]
    order = sorted(range(len(prompts)), key=lambda i: -cost[i])
    mine = order[rank() :: world_size()]
    done = engine.generate([prompts[i] for i in mine], [each[i] for i in mine])
    shares = [None] * world_size()
    dist.all_gather_object(shares, dict(zip(mine, done)))
    results = {i: group for share in shares for i, group in share.items()}
    return [results[i] for i in range(len(prompts))]
