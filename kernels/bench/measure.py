"""Timing for `kernels.bench`: one call, one row, a list of rows in a child that may crash."""

import json
import subprocess
import threading
import time

import torch

from kernels.bench.cases import MODELS, cases

SILENCE = 150  # seconds without a word after which the child counts as hung
SHORT = 3e-4  # seconds; below it a call is captured in a graph


def percentiles(times):
    """p20, p50, p80 of a list of seconds, in microseconds.

    >>> percentiles([3e-6, 1e-6, 2e-6, 5e-6, 4e-6])
    {'p20': 2.0, 'p50': 3.0, 'p80': 4.0}
    """
    times = sorted(times)
    pick = {
        f"p{p}": times[min(len(times) - 1, round(p / 100 * (len(times) - 1)))] for p in (20, 50, 80)
    }
    return {name: round(t * 1e6, 2) for name, t in pick.items()}


def time_cpu(call, seconds):
    """Times in seconds of repeated calls, and False: no graph."""
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times, False


def captured(call):
    """The call as a CUDA graph, or None where it can not be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay
    except Exception:
        torch.cuda.synchronize()
        return None


def time_cuda(call, seconds, graph=True):
    """Times in seconds of repeated calls, the L2 cache emptied before each; was a graph used?"""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(max(2 * l2, 2**28), dtype=torch.uint8, device="cuda")

    def once(call, repeat):
        events = []
        for _ in range(repeat):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    estimate = min(once(call, 2))  # the caller has called it before: it is compiled
    replay = captured(call) if graph and estimate < SHORT else None
    repeat = int(min(200, max(3, seconds / (estimate + 1e-4))))
    return once(replay or call, repeat), replay is not None


def ceilings(device, seconds):
    """Measured: bytes/s of a copy (read plus written) and operations/s of a bf16 product."""
    small = device == "cpu"
    timer = time_cpu if small else time_cuda
    size, n = (2**24, 512) if small else (2**30, 8192)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    dtype = torch.float32 if small else torch.bfloat16
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    copy = percentiles(timer(lambda: target.copy_(source), seconds)[0])["p50"] / 1e6
    product = percentiles(timer(lambda: a @ b, seconds)[0])["p50"] / 1e6
    return {"copy": 2 * size / copy, "matmul": 2 * n**3 / product}


def measure(case, name, inputs, device, seconds, ceiling):
    """One row: an implementation at a case. Failing is a row, too."""
    row = {"op": case.op, "phase": case.phase, "model": case.model, "shape": case.shape}
    row |= {"impl": name, "bound": case.bound}
    try:
        call = case.calls[name](*inputs)
        if device == "cpu":
            (times, graph), peak = time_cpu(call, seconds), None
        else:
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            peak = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
            times, graph = time_cuda(call, seconds, graph=case.phase == "forward")
    except Exception as error:
        for cause in (error, error.__cause__):
            if isinstance(cause, ImportError):
                return row | {"missing": cause.name or str(cause)}
        if device != "cpu":
            torch.cuda.synchronize()  # raises again if the context is lost: let the process end
        return row | {"error": first_line(error)}
    spent = percentiles(times)
    rate = (case.flops if case.bound == "matmul" else case.bytes) / (spent["p50"] / 1e6)
    return row | {
        "us": spent,
        "tflops": round(case.flops / spent["p50"] / 1e6, 2),
        "gbs": round(case.bytes / spent["p50"] / 1e3, 2),
        "share": round(rate / ceiling[case.bound], 4),
        "peak_mib": peak,
        "graph": graph,
    }


def first_line(error):
    text = f"{type(error).__name__}: {error}".strip()
    return text.splitlines()[0][:300]


def plan(ops, device, quick):
    """(case, implementation) in the order of running: ours, peers, then what compiles long."""
    models = {"7B": MODELS["7B"]} if quick else MODELS
    every = [case for op in ops for case in cases(op, models, small=device == "cpu")]
    if device == "cpu":
        return [(case, "torch") for case in every]
    rank = {"triton": 0, "compiled": 2}
    listed = [(case, name) for case in every for name in case.calls]
    return sorted(listed, key=lambda pair: rank.get(pair[1], 1))  # stable: cases stay together


def rows(listed, device, seconds, ceiling, skip=0, deadline=float("inf"), started=lambda i: None):
    """Measure from number `skip` on; inputs are made once for neighbours of one case."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    current = inputs = None
    for i, (case, name) in enumerate(listed):
        if i < skip:
            continue
        if time.time() > deadline:
            yield {**named(case, name), "error": "skipped: out of time"}
            continue
        started(i)
        if case is not current:
            current = inputs = None
            torch.manual_seed(0)
            try:
                current, inputs = case, case.inputs(device, dtype)
            except RuntimeError as error:  # out of memory
                torch.cuda.synchronize()
                yield {**named(case, name), "error": first_line(error)}
                continue
        yield measure(case, name, inputs, device, seconds, ceiling)
        if device != "cpu":
            torch.cuda.empty_cache()


def named(case, name):
    return {
        "op": case.op,
        "phase": case.phase,
        "model": case.model,
        "shape": case.shape,
        "impl": name,
    }


def supervise(command, listed, receive, silence=SILENCE):
    """Run children until the list is done; a crash or a hang becomes a row, and on it goes.

    command(skip, ceilings) -> argv of a child that starts at number skip. receive(kind, value).
    """
    skip, ceiling = 0, None
    while skip < len(listed):
        process = subprocess.Popen(
            command(skip, ceiling), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        tail = []
        reader = threading.Thread(target=lambda p=process, t=tail: t.extend(p.stderr), daemon=True)
        reader.start()
        started, done, hung = None, 0, []
        timer = None

        def watch(process=process, hung=hung):
            hung.append(True)
            process.kill()

        def restart(timer):
            if timer:
                timer.cancel()
            timer = threading.Timer(silence, watch)
            timer.daemon = True
            timer.start()
            return timer

        timer = restart(timer)
        for line in process.stdout:
            timer = restart(timer)
            if not line.startswith("@"):
                continue
            kind, _, value = line[1:].partition(" ")
            value = json.loads(value)
            if kind == "start":
                started = value
            elif kind == "row":
                done += 1
                receive("row", value)
            elif kind == "ceilings":
                if ceiling is None:
                    receive("ceilings", value)
                ceiling = value
        timer.cancel()
        process.wait()
        reader.join(5)
        if skip + done >= len(listed):
            return
        reason = "timed out" if hung else f"the process ended with {process.returncode}"
        last = next((x.strip() for x in reversed(tail) if x.strip()), "")
        if started is None or ceiling is None:  # it never got to work: trying again would not help
            raise RuntimeError(f"{reason}: {last}")
        skip += done
        receive("row", {**named(*listed[skip]), "error": f"{reason}: {last}"[:300]})
        skip += 1
