"""The running sequences as tensors, one row each, and the step that gives every row a token.

All per-sequence state that a decode step reads or writes is here, on the device, in buffers of
fixed size; rows 0 .. n-1 are in use. A step is tensor operations only: no loop over sequences, no
value read back. That keeps Python out of the way on a CPU and lets a CUDA graph hold a whole step.
"""

from itertools import chain

import numpy as np
import torch

import kernels
from nanorrm.engine.cache import blocks_for
from nanorrm.engine.sampling import AnswerSlots, SamplingParams, draw
from nanorrm.engine.sequence import Generated, RowState


class DecodeBatch:
    """Buffers of config.max_batch rows: the state of each, its block table, what it generated."""

    def __init__(self, model, tokenizer, cache, config):
        """cache: (k, v) as in Transformer.forward_cached; config: EngineConfig."""
        self.model, self.cache, self.config = model, cache, config
        self.begin_think, self.end_think = tokenizer.think_ids
        self.n, self.sequences = 0, []  # the Sequence of each row in use
        # what the host knows without reading the device: length, its end, blocks in the table
        self.lengths, self.totals, self.held = np.zeros((3, config.max_batch), dtype=np.int64)
        self.width = self.new = 0  # columns: blocks of a table, tokens that can be generated
        self.params = SamplingParams()  # see `configure`
        self.constants = {}  # by settings; kept, because recorded graphs read them

        def buffer(kind, *columns):
            return torch.full((config.max_batch, *columns), kind(), device=model.device)

        self.state = RowState(*map(buffer, RowState.__annotations__.values()))
        self.table = buffer(int, 0)
        self.generated = Generated(*(buffer(kind, 0) for kind in (int, float, float, bool)))

    def configure(self, params):
        """Take the settings that all rows share; only while no row is in use."""
        model, slots, device = self.model, params.answer_slots, self.model.device
        stop = params.stop_token_ids
        self.stop = tuple(model.config.eos_token_id) if stop is None else stop
        self.params, self.settings = params, (params.shared(), self.stop)
        if self.settings not in self.constants:
            stop_ids = torch.tensor(self.stop, dtype=torch.long, device=device)
            slots = slots and AnswerSlots(slots, stop_ids, model.config.vocab_size)
            self.constants[self.settings] = stop_ids, slots
        self.stop_ids, self.slots = self.constants[self.settings]
        # drawing without logits gives the log-prob of what is drawn from: the raw one as well only
        # if the temperature changes nothing
        fused = self.config.fused_head
        fused = device.type == "cuda" if fused is None else fused
        plain = not (params.top_k or params.min_p or params.answer_slots) and params.top_p == 1
        self.fused = fused and plain and (params.temperature in (0, 1) or not params.logprobs)

    # -- who is in

    def join(self, sequences):
        """Append rows for sequences whose prompts have been computed."""
        rows = slice(self.n, self.n + len(sequences))
        totals = [len(s.prompt) + s.params.max_tokens for s in sequences]
        width = blocks_for(max(totals), self.config.block_size)
        self._widen(width, max(s.params.max_tokens for s in sequences))
        started = [s.started(self.begin_think, self.end_think) for s in sequences]
        for column, values in zip(self.state, zip(*started)):
            column[rows] = torch.tensor(values)
        table = [s.blocks + [0] * (self.width - len(s.blocks)) for s in sequences]
        self.table[rows] = torch.tensor(table)
        for row, s in enumerate(sequences, self.n):
            for buffer, values in zip(self.generated, s.generated):  # from before a preemption
                buffer[row, : len(values)] = torch.tensor(values)
        self.lengths[rows] = [len(s) for s in sequences]
        self.totals[rows] = totals
        self.held[rows] = [len(s.blocks) for s in sequences]
        self.sequences += sequences
        self.n += len(sequences)

    def _widen(self, width, new):
        """Make the buffers wide enough: `width` blocks a row, `new` generated tokens."""
        if width <= self.width and new <= self.new:
            return
        self.width, self.new = max(width, self.width), max(new, self.new)

        def wider(old, columns):
            buffer = old.new_zeros(len(old), columns)
            buffer[: self.n, : old.shape[1]] = old[: self.n]
            return buffer

        self.table = wider(self.table, self.width)
        # one column more, where rows that are done write
        self.generated = Generated(*(wider(old, self.new + 1) for old in self.generated))

    def remove(self, rows):
        """Drop rows; the last ones move into the holes."""
        gone = set(rows)
        n = self.n - len(gone)
        holes = [row for row in gone if row < n]
        movers = [row for row in range(n, self.n) if row not in gone]
        if holes:
            to, source = torch.tensor([holes, movers], device=self.model.device)
            for buffer in (*self.state, self.table, *self.generated):
                buffer[to] = buffer[source]
            for known in (self.lengths, self.totals, self.held):
                known[holes] = known[movers]
            for hole, mover in zip(holes, movers):
                self.sequences[hole] = self.sequences[mover]
        del self.sequences[n:]
        self.n = n

    def pop_newest(self):
        """Drop the row that came last -> its Sequence, with what it has generated."""
        newest = max(self.sequences, key=lambda s: (s.request, s.sample))
        row = self.sequences.index(newest)
        newest.generated = self.read(row)
        self.remove([row])
        return newest

    def read(self, row):
        """What a row has generated so far, as plain lists."""
        count = int(self.state.count[row])
        return Generated(*(buffer[row, :count].tolist() for buffer in self.generated))

    # -- blocks

    def lacking(self, turns):
        """How many blocks each row needs for its next `turns` tokens, beyond those it has [n]."""
        ends = np.minimum(self.lengths[: self.n] + turns - 1, self.totals[: self.n])
        return blocks_for(ends, self.config.block_size) - self.held[: self.n]

    def add_block(self, row, block):
        """Append one block to a row's table."""
        blocks = self.sequences[row].blocks
        self.table[row, len(blocks)] = block
        blocks.append(block)
        self.held[row] += 1

    def width_for(self, turns):
        """How many columns of the tables the rows read within so many turns."""
        longest = int(self.lengths[: self.n].max()) + turns
        return min(blocks_for(longest, self.config.block_size), self.width)

    # -- a step

    def inputs(self, n, width):
        """What the model needs to decode the first n rows: ids, positions, slots [n] (-1: a row
        that is done writes nowhere) and (tables [n, width], lengths [n])."""
        s, size, table = self.state, self.config.block_size, self.table[:n, :width]
        position = s.length[:n] - 1
        block = table.gather(1, (position // size)[:, None])[:, 0]
        slot = torch.where(s.done[:n], -1, block * size + position % size)
        return s.last[:n], position, slot, (table, s.length[:n])

    def decode(self, n, width):
        """One step of the first n rows, from embedding to recorded token."""
        ids, positions, slots, pages = self.inputs(n, width)
        self.extend(self.model.forward_cached(ids, self.cache, positions, slots, decode=pages))

    def extend(self, hidden):
        """Draw and record the next token of the first rows from their hidden states [n, C]."""
        n = len(hidden)
        s = RowState(*(column[:n] for column in self.state))
        alive = ~s.done
        forced = allowed = None  # what the engine decides: ids [n] (-1: nothing), allowed [n, V]
        if self.end_think is not None:
            spent = s.thinking & (s.think_tokens >= s.budget)
            forced = torch.where(spent, self.end_think, -1)
        if self.slots:
            forced, allowed = self.slots.constrain(s.answered, forced)
        ids, logp, raw = self._draw(hidden, s, forced, allowed)
        at = torch.where(alive, s.count, self.new)[:, None]
        drawn = Generated(ids, logp, raw, None if forced is None else forced >= 0)
        for buffer, values in zip(self.generated, drawn):
            if values is not None:
                buffer[:n].scatter_(1, at, values[:, None])
        s.last.copy_(torch.where(alive, ids, s.last))
        s.count.add_(alive)
        s.length.add_(alive)
        stops = torch.isin(ids, self.stop_ids)
        if self.end_think is not None:
            self._think(s, ids, alive, stops)
        s.done.logical_or_(stops | (s.count >= s.limit))

    def _draw(self, hidden, s, forced, allowed):
        """ids, logp and raw log-prob of the next tokens, as `draw` has them."""
        if not self.fused:
            logits = hidden @ self.model.head.T  # [n, V]
            return draw(logits, self.params, s.stream, s.length, forced, allowed)
        heat = torch.full((len(hidden),), self.params.temperature, device=hidden.device)
        ids, logp, _ = kernels.sample(hidden, self.model.head, heat, s.stream, s.length)
        if forced is not None:  # of a token that it has not drawn the fused head knows nothing
            ids, logp = torch.where(forced >= 0, forced, ids), logp.masked_fill(forced >= 0, 0)
        return ids, logp, logp

    def _think(self, s, ids, alive, stops):
        """Open and close the thinking of rows, and count its tokens."""
        closes = alive & (ids == self.end_think)
        s.thinking.logical_and_(~closes)
        s.think_tokens.add_(alive & s.thinking & ~stops)
        if self.begin_think is not None:
            s.thinking.logical_or_(alive & (ids == self.begin_think))
        if self.slots:
            s.answered.add_(alive & (s.answered >= 0)).masked_fill_(closes, 0)


def prefill_inputs(chunks, size):
    """What the model needs to compute chunks of prompts, [(group, end), ...] as scheduled, packed.

    Returns ids, positions, slots [T] and (tables [B, M], cu_seqlens [B+1], ends [B]), on the CPU.
    """
    leaders, ends = [group[0] for group, _ in chunks], torch.tensor([end for _, end in chunks])
    starts = torch.tensor([leader.computed for leader in leaders])
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.long), (ends - starts).cumsum(0)))
    width = blocks_for(int(ends.max()), size)
    tables = torch.tensor([(leader.blocks + [0] * width)[:width] for leader in leaders])
    spans = list(zip(starts.tolist(), ends.tolist()))
    positions = torch.cat([torch.arange(*span) for span in spans])
    owner = torch.repeat_interleave(torch.arange(len(chunks)), ends - starts)
    slots = tables[owner, positions // size] * size + positions % size
    tokens = (leader.tokens[start:end] for leader, (start, end) in zip(leaders, spans))
    return torch.tensor(list(chain(*tokens))), positions, slots, (tables, cu_seqlens, ends)
