"""Several processes under `torchrun`: who they are, what they share, and FSDP2 for the weights.

Every rank runs the same script. Rollouts are dealt out (each rank has an engine with all weights);
since a completion depends on its prompt, seed and index only, the ranks can split the prompts any
way they like. Training is sharded: fp32 master weights, gradients and optimizer state lie in equal
parts on the ranks, a layer's weights are gathered in the compute dtype when it runs.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from nanorrm.config import UserError


def init(single=False):
    """Join the process group that torchrun describes; single: make one for a lone process too."""
    if dist.is_initialized():
        return
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone and not single:
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    here = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **here)


def finish():
    """Leave when all ranks are done: to be called last; with several processes it ends this one.

    Torn down with the interpreter, gloo's threads abort about one process in six after all is done.
    """
    if world_size() > 1:
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def rank():
    """This process's number, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def same(value):
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag):
    """Whether the flag is set on any rank: a Ctrl-C may reach one before another."""
    return bool(maximum(float(flag)))


def maximum(value):
    """The largest of a number over all ranks."""
    return reduced([value], dist.ReduceOp.MAX)[0]


def total(numbers):
    """{name: number} summed over all ranks; every rank brings the same names."""
    names = sorted(numbers)
    return dict(zip(names, reduced([numbers[name] for name in names], dist.ReduceOp.SUM)))


def gathered(value):
    """The values of all ranks, in their order."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def merged(part):
    """The dictionaries of all ranks in one."""
    return {key: value for each in gathered(part) for key, value in each.items()}


def reduced(values, operation):
    """A list of numbers combined over all ranks, in fp64."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


# -- sharded weights


def shard(model, dtype, device=None):
    """Split a Transformer's parameters over all ranks, in place; it computes in `dtype`.

    device: where it will compute, if the model is a skeleton (on meta) yet. Gradients are averaged
    over the ranks in fp32: a loss that is to be summed over them is multiplied by their number
    first.
    """
    init(single=True)
    mesh = init_device_mesh(torch.device(device or model.device).type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "logprobs")
    return model


def put_part(parameter, tensor):
    """Copy this rank's part of a whole tensor into a sharded parameter (see checkpoint.fill)."""
    here = parameter.to_local()
    parts = tensor.chunk(world_size())  # along the first dimension, as FSDP cuts
    if rank() < len(parts):
        with torch.no_grad():
            here.copy_(parts[rank()])


def is_sharded(model):
    """Whether `shard` was called on a model."""
    return isinstance(next(model.parameters()), DTensor)


def whole(tensor):
    """A parameter or a norm with all its parts, gathered if it is sharded (all ranks call it)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# -- shared rollouts


def generate(engine, prompts, params, progress=None, on_done=None):
    """`engine.generate` with the prompts dealt out, longest first; every rank gets all results.

    All ranks must call it with the same prompts and params (SamplingParams, or one per prompt).
    on_done: as in Engine.generate; of several ranks it hears all at once, when all are done.
    """
    if world_size() == 1:
        return engine.generate(prompts, params, progress, on_done)
    each = params if isinstance(params, list) else [params] * len(prompts)
    for i, (prompt, p) in enumerate(zip(prompts, each)):  # on every rank, or the others would wait
        if refusal := engine.refusal(prompt, p):
            raise UserError(f"request {i}: {refusal}")
    cost = [len(p) + q.n * q.max_tokens for p, q in zip(prompts, each)]
    order = sorted(range(len(prompts)), key=lambda i: -cost[i])
    mine = order[rank() :: world_size()]
    bar = progress if rank() == 0 else None
    done = engine.generate([prompts[i] for i in mine], [each[i] for i in mine], bar)
    results = merged(dict(zip(mine, done)))
    for i in range(len(prompts)) if on_done else ():
        for sample, completion in enumerate(results[i]):
            on_done(i, sample, completion)
    return [results[i] for i in range(len(prompts))]


class RankSharedEngine:
    """An engine whose `generate` is shared among the ranks; all else is the engine's own."""

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def generate(self, prompts, params=None, progress=None, on_done=None):
        """As Engine.generate; all ranks call it alike and get all results."""
        return generate(self.engine, prompts, params, progress, on_done)
