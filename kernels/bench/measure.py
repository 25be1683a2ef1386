"""Timing for `kernels.bench`: a call, a row, a list of rows in a child that may crash."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache

import torch
from torch.utils.benchmark import Timer

from kernels.bench.cases import MODELS, cases
from kernels.triton_compat import triton

SILENCE = 150  # seconds without a word after which the child counts as hung
SHORT = 1e-3  # seconds; below it a call is captured in a graph


def percentiles(times):
    """p20, p50, p80 of a list of seconds, in microseconds.

    >>> percentiles([3e-6, 1e-6, 2e-6, 5e-6, 4e-6])
    {'p20': 2.0, 'p50': 3.0, 'p80': 4.0}
    """
    times = sorted(times)
    return {f"p{p}": round(1e6 * times[round(p / 100 * (len(times) - 1))], 2) for p in (20, 50, 80)}


def time_cpu(call, seconds, graph=False):
    """As `time_cuda`, on a CPU: (means of blocks of calls, False, None)."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).times, False, None


def time_cuda(call, seconds, graph=True):
    """Times in seconds of three calls or more; was a graph used; peak memory of a call, MiB."""
    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, begin = torch.cuda.memory_allocated(), time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = time.perf_counter() - begin
    peak = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    replay = captured(call) if graph and once < SHORT else None
    rep = 1e3 * max(seconds, 4 * once)
    times = triton.testing.do_bench(replay or call, rep=rep, return_mode="all")
    return [ms / 1e3 for ms in times], replay is not None, peak


def captured(call):
    """The call as a CUDA graph, or None where it can not be captured."""
    try:
        torch.cuda.set_sync_debug_mode("error")  # a wait for the GPU would break a capture, and
        call()  # memory that a broken capture took stays taken: find it beforehand
        torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        return graph.replay
    except Exception:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


TIMERS = {"cpu": time_cpu, "cuda": time_cuda}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def ceilings(device, seconds):
    """Measured: bytes/s of a copy (read plus written) and operations/s of a bf16 product.

    On a CPU: of a smaller copy and a small fp32 product.
    """
    size, n = (2**24, 512) if device == "cpu" else (2**30, 8192)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[device]) for _ in range(2))
    calls = lambda: target.copy_(source), lambda: a @ b
    copy, matmul = (percentiles(TIMERS[device](f, seconds)[0])["p50"] / 1e6 for f in calls)
    return {"copy": 2 * size / copy, "matmul": 2 * n**3 / matmul}


@lru_cache(maxsize=1)
def inputs(case, device):
    """Made once for the implementations that follow each other."""
    return case.inputs(device, DTYPES[device])


def first_line(error):
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def measure(case, name, device, seconds, ceiling):
    """One row: an implementation at a case. Failing is a row, too; raises if the GPU is lost."""
    row = case.row(name)
    torch.cuda.empty_cache()  # of the row before
    try:
        call = case.calls[name](*inputs(case, device))
        times, graph, peak = TIMERS[device](call, seconds, case.phase == "forward")
    except ImportError as error:
        return row | {"missing": error.name or str(error)}
    except Exception as error:
        if device == "cuda":
            torch.cuda.synchronize()  # raises again if the context is lost
        return row | {"error": first_line(error)}
    spent = percentiles(times)
    s = spent["p50"] / 1e6
    least = {"matmul": case.flops / ceiling["matmul"], "copy": case.bytes / ceiling["copy"]}
    bound = max(least, key=least.get)  # the ceiling that takes longer is the one to reach
    rates = {"tflops": round(case.flops / s / 1e12, 2), "gbs": round(case.bytes / s / 1e9, 2)}
    row |= {"bound": bound, "us": spent, **rates, "share": round(least[bound] / s, 4)}
    return row | {"peak_mib": peak, "graph": graph}


def plan(ops, device, quick):
    """(case, implementation) in the order of running: ours, peers, then what compiles long."""
    models = {"7B": MODELS["7B"]} if quick else MODELS
    every = [case for op in ops for case in cases(op, models, small=device == "cpu")]
    if device == "cpu":
        return [(case, "torch") for case in every]
    rank = {"triton": 0, "compiled": 2}
    listed = [(case, name) for case in every for name in case.calls]
    return sorted(listed, key=lambda pair: rank.get(pair[1], 1))  # stable: cases stay together


def rows(jobs, deadline, *settings, measure=measure, silence=SILENCE):
    """Yield measure(case, name, *settings) of each job (case, name), from a child process.

    A crash, a hang or a lost GPU costs its own row: the rows behind it are another child's.
    """
    pool = None
    try:
        for case, name in jobs:
            if time.time() > deadline:
                yield case.row(name) | {"error": "skipped: out of time"}
                continue
            pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            try:
                row = pool.submit(measure, case, name, *settings).result(silence)
            except Exception as error:
                why = "timed out" if isinstance(error, TimeoutError) else first_line(error)
                row = case.row(name) | {"error": why}
                end_children()
                pool = None
            yield row
    finally:
        end_children()


def end_children():
    """Kill them and wait, for the sake of the memory that they hold."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join(5)
