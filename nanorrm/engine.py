"""Generation: continuous batching over the paged cache.

One request is a prompt and n samples. A prompt is computed once and its samples share its full
blocks; each step decodes one token for every running sequence; finished ones leave, waiting ones
join. When the pool runs out, the newest sequence gives its blocks back and is computed again later,
losing nothing: its noise depends on its stream and positions only. Per-sequence state lives in
tensors (`rows`), so that a step costs no Python loop over sequences.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import chain

import torch
from tqdm import tqdm

from nanorrm.cache import BlockPool
from nanorrm.checkpoint import resolve_model
from nanorrm.config import EngineConfig, UserError
from nanorrm.model import Transformer
from nanorrm.sampling import SamplingParams, draw, stream_id
from nanorrm.tokenizer import Tokenizer


@dataclass
class Completion:
    """One sampled continuation. The lists run parallel, one entry per new token."""

    ids: list[int]  # the end token included, if it was sampled
    text: str  # without end token and stop string
    logprobs: list[float]  # nats, of the distribution sampled from
    raw_logprobs: list[float]  # nats, of the model at temperature 1
    forced: list[bool]  # put there by the engine, never trained on
    finish_reason: str  # "stop" | "length" | "abort"
    think_tokens: int  # tokens of the thinking, tags not counted


@dataclass
class Sequence:
    """A sample on its way: what the engine knows of it outside the tensors."""

    prompt: list[int]
    request: int
    sample: int
    stream: int
    blocks: list[int] = field(default_factory=list)
    done: dict = field(default_factory=dict)  # what was generated before a preemption, as rows

    def __len__(self):
        return len(self.prompt) + len(self.generated)

    @property
    def generated(self):
        return self.done["ids"] if self.done else []


class Engine:
    """Generates for one model. `generate` is all that callers need; `stats` counts its work."""

    def __init__(self, model, tokenizer, config=None):
        """model: Transformer; tokenizer: Tokenizer; config: EngineConfig."""
        self.model, self.tokenizer = model, tokenizer
        self.config = config = config or EngineConfig()
        c, size = model.config, config.block_size
        self.device = model.device
        per_block = 2 * c.num_hidden_layers * size * c.num_key_value_heads * c.head_dim
        per_block *= model.head.element_size()
        num_blocks = config.num_blocks or int(config.cache_gib * 2**30) // per_block
        # no more than every sequence of the largest batch at full context could fill
        num_blocks = min(num_blocks, config.max_batch * -(-c.max_position_embeddings // size))
        shape = (c.num_hidden_layers, num_blocks, size, c.num_key_value_heads, c.head_dim)
        self.cache = tuple(
            torch.zeros(shape, dtype=model.head.dtype, device=self.device) for _ in range(2)
        )
        self.pool = BlockPool(num_blocks)
        self.stats = {"prompt_tokens": 0, "new_tokens": 0, "steps": 0, "preemptions": 0}

    @classmethod
    def from_pretrained(cls, name, config=None):
        """An engine for a model folder or a shipped model (toy, toy-judge), on the GPU if any."""
        folder = resolve_model(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = Transformer.from_pretrained(folder, device=device)
        return cls(model, Tokenizer.from_pretrained(folder), config)

    def blocks_for(self, tokens):
        """Blocks that hold so many tokens."""
        return -(-tokens // self.config.block_size)

    def refusal(self, prompt, params):
        """Why a prompt can never be served with these parameters, or None."""
        total, context = len(prompt) + params.max_tokens, self.model.config.max_position_embeddings
        asked = f"prompt of {len(prompt)} tokens + {params.max_tokens} new ones"
        if not prompt:
            return "the prompt is empty"
        if total > context:
            return f"{asked} exceeds the model's context of {context}"
        if self.blocks_for(total) > len(self.pool.owners):
            pool = len(self.pool.owners) * self.config.block_size
            return f"{asked} exceeds the cache of {pool} tokens (cache_gib, num_blocks)"
        return None

    @torch.inference_mode()
    def generate(self, prompts, params=None, progress=None):
        """prompts: lists of token ids -> for each prompt, a list of params.n Completions.

        params: SamplingParams; progress: label of a progress bar, or None. A completion depends on
        its prompt, params and its place among the n, on nothing else in the batch. Raises UserError
        if a prompt does not fit the context or the cache, before anything is generated.
        """
        params = params or SamplingParams()
        for i, prompt in enumerate(prompts):
            if refusal := self.refusal(prompt, params):
                raise UserError(f"request {i}: {refusal}")
        self.params = params
        self.stop_ids = params.stop_token_ids
        if self.stop_ids is None:
            self.stop_ids = tuple(self.model.config.eos_token_id)
        self.stop_tensor = torch.tensor(self.stop_ids, dtype=torch.long, device=self.device)
        # longest first: neighbours in a batch are of like lengths, and no straggler starts last
        self.waiting = deque(
            Sequence(prompts[i], i, j, stream_id(params.seed, prompts[i], j))
            for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
            for j in range(params.n)
        )
        self.running, self.rows = [], {}
        self.results = [[None] * params.n for _ in prompts]
        bar = tqdm(total=len(self.waiting), desc=progress, leave=False, disable=progress is None)
        try:
            while self.waiting or self.running:
                admitted = self._admit()
                if admitted:
                    self._prefill(admitted)
                elif self.running:
                    self._decode()
                bar.update(self._retire())
                self.stats["steps"] += 1
        finally:  # interrupted: give every block back
            for sequence in self.running:
                self.pool.release(sequence.blocks)
            self.running, self.rows = [], {}
            bar.close()
        return self.results

    # -- what runs next

    def _admit(self):
        """Move waiting sequences that fit to admitted groups [[leader, follower, ...], ...].

        A follower is a fresh sample of the leader's prompt: it shares the leader's full blocks and
        gets its own copy of the last, partial one.
        """
        groups, tokens, count = [], 0, len(self.running)
        reserve = count // self.config.block_size + 1  # blocks that running rows soon ask for
        while self.waiting and count < self.config.max_batch:
            sequence = self.waiting[0]
            leader = groups[-1][0] if groups else sequence
            follows = bool(groups) and leader.request == sequence.request
            follows = follows and not (leader.done or sequence.done)
            if groups and not follows and tokens + len(sequence) > self.config.max_prefill_tokens:
                break
            shared = leader.blocks[: len(leader.prompt) // self.config.block_size * follows]
            need = self.blocks_for(len(sequence)) - len(shared)
            if need + (reserve if count else 0) > self.pool.free:
                break
            self.pool.share(shared)
            sequence.blocks = shared + self.pool.allocate(need)
            if follows:
                groups[-1].append(sequence)
            else:
                groups.append([sequence])
                tokens += len(sequence)
            self.waiting.popleft()
            count += 1
        return groups

    def _make_room(self):
        """Give each row whose next token begins a block that block; preempt the newest if none."""
        size = self.config.block_size
        begins = (self.rows["length"] - 1) % size == 0  # that token is the first of a block
        wanting = begins.nonzero()[:, 0].tolist()
        while len(wanting) > self.pool.free:
            last = len(self.running) - 1
            self._preempt(last)
            wanting = [r for r in wanting if r != last]
        for row, block in zip(wanting, self.pool.allocate(len(wanting))):
            blocks = self.running[row].blocks
            self.rows["table"][row, len(blocks)] = block
            blocks.append(block)

    def _preempt(self, row):
        """Take the last row out; it waits at the front with what it has generated so far."""
        sequence = self.running[row]
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.done = [], self._written(row)
        self.waiting.appendleft(sequence)
        self._keep(list(range(row)))
        self.stats["preemptions"] += 1

    # -- model steps

    def _prefill(self, groups):
        """Compute the leaders' tokens, copy partial blocks for followers, draw the first tokens."""
        size, leaders = self.config.block_size, [group[0] for group in groups]
        tokens = [leader.prompt + leader.generated for leader in leaders]
        lengths = torch.tensor([len(t) for t in tokens])
        cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
        tables = self._tables(leaders, max(len(leader.blocks) for leader in leaders))
        positions = torch.cat([torch.arange(len(t)) for t in tokens])
        owner = torch.repeat_interleave(torch.arange(len(leaders)), lengths)
        slots = tables[owner, positions // size] * size + positions % size
        arguments = (positions, slots, tables, lengths, cu_seqlens)
        hidden = self.model.forward_cached(
            torch.tensor(list(chain.from_iterable(tokens))).to(self.device),
            self.cache,
            *(x.to(self.device) for x in arguments),
        )
        self.stats["prompt_tokens"] += len(hidden)
        source, target = [], []
        for leader, *followers in groups:
            if followers and len(leader.prompt) % size:
                source += [leader.blocks[-1]] * len(followers)
                target += [follower.blocks[-1] for follower in followers]
        if target:
            for cache in self.cache:
                cache[:, target] = cache[:, source]
        members = [sequence for group in groups for sequence in group]
        self._join(members)
        last = hidden[(cu_seqlens[1:] - 1).to(self.device)]  # [leaders, C]
        repeats = torch.tensor([len(group) for group in groups], device=self.device)
        first = len(self.running) - len(members)
        self._extend(last.repeat_interleave(repeats, 0), slice(first, None))

    def _decode(self):
        """One token for every running sequence."""
        self._make_room()
        rows, size = self.rows, self.config.block_size
        position = rows["length"] - 1  # of the token whose key and value are computed now
        width = self.blocks_for(int(rows["length"].max()))
        table = rows["table"][:, :width]
        block = table.gather(1, (position // size)[:, None])[:, 0]
        slots = block * size + position % size
        hidden = self.model.forward_cached(
            rows["last"], self.cache, position, slots, table, rows["length"]
        )
        self._extend(hidden, slice(None))

    def _extend(self, hidden, which):
        """Draw the next token of some rows from their hidden states [B, C] and record it."""
        rows = {name: tensor[which] for name, tensor in self.rows.items()}  # views
        params, (_, end_think) = self.params, self.tokenizer.think_ids
        forced = None
        if params.max_think_tokens is not None and end_think is not None:
            over = rows["thinking"] & (rows["think_tokens"] >= params.max_think_tokens)
            forced = torch.where(over, end_think, -1)
        logits = hidden @ self.model.head.T  # [B, V]
        ids, logp, raw = draw(logits, params, rows["stream"], rows["length"], forced)
        at = rows["count"][:, None]
        rows["ids"].scatter_(1, at, ids[:, None])
        if params.logprobs:
            rows["logp"].scatter_(1, at, logp[:, None])
            rows["raw"].scatter_(1, at, raw[:, None])
        if forced is not None:
            rows["forced"].scatter_(1, at, (forced >= 0)[:, None])
        rows["last"].copy_(ids)
        rows["count"] += 1
        rows["length"] += 1
        self._track_thinking(rows, ids)
        self.stats["new_tokens"] += len(ids)

    def _track_thinking(self, rows, ids):
        """Count the tokens between <think> and </think>."""
        begin, end = self.tokenizer.think_ids
        if end is None:
            return
        rows["thinking"] &= ids != end
        rows["think_tokens"] += rows["thinking"]
        if begin is not None:
            rows["thinking"] |= ids == begin

    # -- rows: one entry per running sequence in every tensor

    def _tables(self, sequences, width):
        """Block tables [B, width] of sequences, padded with block 0."""
        return torch.tensor([s.blocks + [0] * (width - len(s.blocks)) for s in sequences])

    def _join(self, members):
        """Append rows for newly admitted sequences."""
        B, N = len(members), self.params.max_tokens
        longest = max(len(prompt) for prompt in (s.prompt for s in members))
        width = self.blocks_for(longest + N)
        begin, end = self.tokenizer.think_ids
        zeros = torch.zeros
        rows = {
            "table": self._tables(members, width),
            "length": torch.tensor([len(s) for s in members]),
            "count": torch.tensor([len(s.generated) for s in members]),
            "last": zeros(B, dtype=torch.long),
            "stream": torch.tensor([s.stream for s in members]),
            "thinking": torch.tensor([inside_thinking(s.prompt, begin, end) for s in members]),
            "think_tokens": zeros(B, dtype=torch.long),
            "ids": zeros(B, N, dtype=torch.long),
            "logp": zeros(B, N),
            "raw": zeros(B, N),
            "forced": zeros(B, N, dtype=torch.bool),
        }
        for row, sequence in enumerate(members):
            for name, value in sequence.done.items():
                if rows[name].dim() == 2:
                    rows[name][row, : len(value)] = torch.tensor(value)
                else:
                    rows[name][row] = value
            sequence.done = {}
        rows = {name: tensor.to(self.device) for name, tensor in rows.items()}
        if self.rows:
            wide = max(width, self.rows["table"].shape[1])
            for part in (self.rows, rows):
                missing = wide - part["table"].shape[1]
                part["table"] = torch.nn.functional.pad(part["table"], (0, missing))
            rows = {name: torch.cat((self.rows[name], rows[name])) for name in rows}
        self.rows = rows
        self.running += members

    def _keep(self, kept):
        """Drop all rows but these."""
        self.running = [self.running[row] for row in kept]
        index = torch.tensor(kept, dtype=torch.long, device=self.device)
        self.rows = {name: t[index] for name, t in self.rows.items()} if kept else {}

    def _written(self, row):
        """What a row has generated so far, as plain numbers."""
        count = int(self.rows["count"][row])
        out = {name: self.rows[name][row, :count].tolist() for name in ("ids", "logp", "raw")}
        out["forced"] = self.rows["forced"][row, :count].tolist()
        out["thinking"] = bool(self.rows["thinking"][row])
        out["think_tokens"] = int(self.rows["think_tokens"][row])
        return out

    def _retire(self):
        """Finish the rows that are done, free their blocks; returns how many."""
        rows = self.rows
        if not rows:
            return 0
        stopped = torch.isin(rows["last"], self.stop_tensor)
        done = stopped | (rows["count"] >= self.params.max_tokens)
        cut = self._stop_strings() if self.params.stop else {}
        finished = sorted(set(done.nonzero()[:, 0].tolist()) | set(cut))
        for row in finished:
            sequence, out = self.running[row], self._written(row)
            ended = bool(stopped[row])
            ids = out["ids"]
            self.results[sequence.request][sequence.sample] = Completion(
                ids=ids,
                text=cut[row] if row in cut else self.tokenizer.decode(ids[:-1] if ended else ids),
                logprobs=out["logp"] if self.params.logprobs else [],
                raw_logprobs=out["raw"] if self.params.logprobs else [],
                forced=out["forced"],
                finish_reason="stop" if ended or row in cut else "length",
                think_tokens=out["think_tokens"],
            )
            self.pool.release(sequence.blocks)
        if finished:
            gone = set(finished)
            self._keep([row for row in range(len(self.running)) if row not in gone])
        return len(finished)

    def _stop_strings(self):
        """{row: text before the stop string} of the rows whose text now holds one."""
        found = {}
        for row in range(len(self.running)):
            count = int(self.rows["count"][row])
            text = self.tokenizer.decode(self.rows["ids"][row, :count].tolist())
            places = [text.find(stop) for stop in self.params.stop if stop in text]
            if places:
                found[row] = text[: min(places)]
        return found


def inside_thinking(prompt, begin, end):
    """Whether a prompt (ids) ends between <think> and </think>."""
    for token in reversed(prompt):
        if token in (begin, end):
            return token == begin and begin is not None
    return False
