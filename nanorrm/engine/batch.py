"""The running sequences as tensors, one row each, and the step that gives every row a token.

All per-sequence state that a decode step reads or writes is here, on the device, in buffers of
fixed size; rows 0 .. n-1 are in use. A step is tensor operations only: no loop over sequences, no
value read back. That keeps Python out of the way on a CPU and lets a CUDA graph hold a whole step.
"""

import numpy as np
import torch

import kernels
from nanorrm.engine.sampling import draw


class DecodeBatch:
    """Buffers of `capacity` rows. `length` counts prompt and generated tokens of a row."""

    def __init__(self, model, tokenizer, cache, block_size, capacity):
        self.model, self.cache, self.size = model, cache, block_size
        self.begin_think, self.end_think = tokenizer.think_ids
        self.capacity, self.device = capacity, model.device
        self.n = 0
        self.sequences = []  # the Sequence of each row in use
        # what the host knows without reading the device: length, its end, blocks in the table
        self.lengths, self.totals, self.held = np.zeros((3, capacity), dtype=np.int64)
        self.width = self.new = 0
        one = torch.ones(capacity, dtype=torch.long, device=self.device)
        flag = torch.zeros(capacity, dtype=torch.bool, device=self.device)
        self.narrow = {
            "length": one.clone(),
            "count": one * 0,  # tokens generated
            "limit": one * 0,  # tokens to generate at most
            "last": one * 0,  # id of the newest token, whose key and value are not computed yet
            "stream": one * 0,
            "budget": one * 0,  # thinking tokens at most
            "think_tokens": one * 0,
            "answered": one * 0,  # tokens since </think>, -1 before it
            "thinking": flag.clone(),
            "done": flag.clone(),
        }
        self.constants = {}  # by settings; kept, because recorded graphs read them
        self.wide = {}  # [capacity, width or new]: block table, what was generated

    def configure(self, params, stop_ids, fused):
        """Take the settings that all rows share; only while no row is in use. fused: draw without
        logits in memory, where the settings allow it."""
        self.params, self.settings = params, (params.shared(), stop_ids)
        if self.settings not in self.constants:
            self.constants[self.settings] = self._constants(params, stop_ids)
        self.stop_ids, self.ends, self.slots, self.only = self.constants[self.settings]
        # the fused head gives the log-prob of what it draws from: the raw one as well only if the
        # temperature changes nothing
        plain = not (params.top_k or params.min_p or params.answer_slots) and params.top_p == 1
        self.fused = fused and plain and (params.temperature in (0, 1) or not params.logprobs)

    def _constants(self, params, stop_ids):
        """Tensors made from the settings: stop ids; ends [V] bool; what may stand at each place of
        a forced answer, slots [S, V] bool; the only id of each place, or -1."""
        stop = torch.tensor(stop_ids, dtype=torch.long, device=self.device)
        if not params.answer_slots:
            return stop, None, None, None
        shape = len(params.answer_slots), self.model.config.vocab_size
        ends = torch.zeros(shape[1], dtype=torch.bool, device=self.device)
        ends[stop] = True
        slots = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for place, ids in enumerate(params.answer_slots):
            slots[place, list(ids)] = True
        only = [ids[0] if len(ids) == 1 else -1 for ids in params.answer_slots]
        return stop, ends, slots, torch.tensor(only, device=self.device)

    def reserve(self, width, new):
        """Make the buffers wide enough: `width` blocks a row, `new` generated tokens."""
        if width <= self.width and new <= self.new:
            return
        width, new = max(width, self.width), max(new, self.new)
        sizes = {"table": width, "ids": new, "logp": new, "raw": new, "forced": new}
        kinds = {"logp": torch.float32, "raw": torch.float32, "forced": torch.bool}
        wide = {}
        for name, columns in sizes.items():
            kind = kinds.get(name, torch.long)
            wide[name] = torch.zeros(self.capacity, columns, dtype=kind, device=self.device)
            if self.n:
                old = self.wide[name]
                wide[name][: self.n, : old.shape[1]] = old[: self.n]
        self.wide, self.width, self.new = wide, width, new

    def join(self, sequences):
        """Append rows for sequences whose prompts have been computed."""
        first, B = self.n, len(sequences)
        self.reserve(
            max(-(-(len(s.prompt) + s.params.max_tokens) // self.size) for s in sequences),
            max(s.params.max_tokens for s in sequences),
        )
        started = [s.started(self.begin_think, self.end_think) for s in sequences]
        for name, buffer in self.narrow.items():
            values = torch.tensor([row[name] for row in started], dtype=buffer.dtype)
            buffer[first : first + B] = values.to(self.device)
        table = [s.blocks + [0] * (self.width - len(s.blocks)) for s in sequences]
        self.wide["table"][first : first + B] = torch.tensor(table).to(self.device)
        for row, s in enumerate(sequences, first):
            for name, values in s.written.items():  # from before a preemption
                buffer = self.wide[name]
                buffer[row, : len(values)] = torch.tensor(values, dtype=buffer.dtype)
            self.lengths[row] = len(s)
            self.totals[row] = len(s.prompt) + s.params.max_tokens
            self.held[row] = len(s.blocks)
        self.sequences += sequences
        self.n += B

    def add_block(self, row, block):
        """Append one block to a row's table."""
        blocks = self.sequences[row].blocks
        self.wide["table"][row, len(blocks)] = block
        blocks.append(block)
        self.held[row] += 1

    def remove(self, rows):
        """Drop rows; the last ones move into the holes."""
        gone = set(rows)
        n = self.n - len(gone)
        holes = [row for row in gone if row < n]
        movers = [row for row in range(n, self.n) if row not in gone]
        if holes:
            to = torch.tensor(holes, device=self.device)
            source = torch.tensor(movers, device=self.device)
            for buffer in (*self.narrow.values(), *self.wide.values()):
                buffer[to] = buffer[source]
            for known in (self.lengths, self.totals, self.held):
                known[holes] = known[movers]
            for hole, mover in zip(holes, movers):
                self.sequences[hole] = self.sequences[mover]
        del self.sequences[n:]
        self.n = n

    def inputs(self, n, width):
        """What the model needs to decode the first n rows: ids, positions, slots, tables, lengths.

        A row that is done writes nowhere (slot -1).
        """
        length, table = self.narrow["length"][:n], self.wide["table"][:n, :width]
        position = length - 1
        block = table.gather(1, (position // self.size)[:, None])[:, 0]
        slot = block * self.size + position % self.size
        slot = torch.where(self.narrow["done"][:n], -1, slot)
        return self.narrow["last"][:n], position, slot, table, length

    def decode(self, n, width):
        """One step of the first n rows, from embedding to recorded token."""
        last, position, slot, table, length = self.inputs(n, width)
        hidden = self.model.forward_cached(last, self.cache, position, slot, decode=(table, length))
        self.extend(hidden)

    def extend(self, hidden):
        """Draw and record the next token of the first rows from their hidden states [n, C]."""
        n, params = len(hidden), self.params
        r = {name: buffer[:n] for name, buffer in self.narrow.items()}
        w = {name: buffer[:n] for name, buffer in self.wide.items()}
        alive = ~r["done"]
        forced, allowed = self._constraints(r)
        if self.fused:
            where = (
                torch.full((n,), params.temperature, device=self.device),
                r["stream"],
                r["length"],
            )
            ids, logp, _ = kernels.sample(hidden, self.model.head, *where)
            raw = logp
            if forced is not None:
                ids, logp = torch.where(forced >= 0, forced, ids), logp.masked_fill(forced >= 0, 0)
                raw = logp  # of a token that was not drawn the fused head knows nothing
        else:
            logits = hidden @ self.model.head.T  # [n, V]
            ids, logp, raw = draw(logits, params, r["stream"], r["length"], forced, allowed)
        at = r["count"].clamp(max=self.new - 1)[:, None]

        def record(name, values):
            kept = torch.where(alive[:, None], values[:, None], w[name].gather(1, at))
            w[name].scatter_(1, at, kept)

        record("ids", ids)
        if params.logprobs:
            record("logp", logp)
            record("raw", raw)
        if forced is not None:
            record("forced", forced >= 0)
        r["last"].copy_(torch.where(alive, ids, r["last"]))
        r["count"] += alive
        r["length"] += alive
        r["answered"] += alive & (r["answered"] >= 0)
        stops = torch.isin(ids, self.stop_ids)
        if self.end_think is not None:
            closes = alive & (ids == self.end_think)
            r["thinking"] &= ~closes
            r["think_tokens"] += alive & r["thinking"] & ~stops
            r["answered"].masked_fill_(closes, 0)
            if self.begin_think is not None:
                r["thinking"] |= alive & (ids == self.begin_think)
        r["done"] |= stops | (r["count"] >= r["limit"])

    def _constraints(self, r):
        """Tokens the engine decides: forced ids [n] (-1: none) or None, allowed [n, V] or None."""
        forced = allowed = None
        if self.end_think is not None:
            over = r["thinking"] & (r["think_tokens"] >= r["budget"])
            forced = torch.where(over, self.end_think, -1)
        if self.slots is not None:
            place = r["answered"].clamp(0, len(self.slots) - 1)
            inside = (r["answered"] >= 0) & (r["answered"] < len(self.slots))
            # before the answer nothing may end the completion, after it anything may stand
            outside = ~self.ends | (r["answered"] >= 0)[:, None]
            allowed = torch.where(inside[:, None], self.slots[place], outside)
            only = torch.where(inside, self.only[place], -1)
            forced = only if forced is None else torch.where(inside, only, forced)
        return forced, allowed

    def written(self, row):
        """What a row has generated so far, as plain lists."""
        count = int(self.narrow["count"][row])
        names = ("ids", "logp", "raw", "forced")
        return {name: self.wide[name][row, :count].tolist() for name in names}
