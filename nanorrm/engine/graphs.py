"""One CUDA graph per batch size over the whole decode step, from embedding to recorded token.

Launching the hundreds of small kernels of a step one by one costs more than running them; a graph
launches them at once. Graphs are captured for batch sizes in steps (1, 2, 4, 8, then multiples of
16), and a smaller batch uses the next larger graph: rows beyond it are done, which makes them write
nowhere. On a CPU the same step runs directly.
"""

import warnings

import torch


class DecodeGraphs:
    """Runs `rows.decode(n, width)`, through graphs where the device has them."""

    def __init__(self, rows, config):
        self.rows, self.config = rows, config
        self.usable = rows.model.device.type == "cuda" and config.cuda_graphs
        self.captured = {}  # (bucket, width of tables, generated tokens, settings) -> graph

    def run(self, n, width):
        """Decode the first n rows, tables cut to `width` blocks."""
        rows = self.rows
        if not self.usable:
            return rows.decode(n, width)
        bucket = next((b for b in (1, 2, 4, 8) if b >= n), -(-n // 16) * 16)
        bucket = min(bucket, self.config.max_batch)
        key = bucket, rows.width, rows.new, rows.settings
        rows.state.done[n:bucket] = True
        rows.state.length[n:bucket] = 1
        if key not in self.captured:
            try:
                self.captured[key] = self._capture(bucket)
            except RuntimeError as error:  # an operation that waits for the device, say
                warnings.warn(f"no CUDA graphs, decoding without: {error}", stacklevel=2)
                self.usable = False
                return rows.decode(n, width)
        self.captured[key].replay()

    def _capture(self, bucket):
        """Warm up on the side, then record one step."""
        rows, done = self.rows, self.rows.state.done.clone()
        rows.state.done.fill_(True)  # of a row that is done, a step changes nothing that is read
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):
                    rows.decode(bucket, rows.width)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            rows.state.done.copy_(done)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # recorded, not run
            rows.decode(bucket, rows.width)
        return graph
