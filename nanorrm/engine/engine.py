"""Generation: continuous batching with chunked prefill over a paged cache with prefix reuse.

A request is a prompt and n samples. Its prompt is computed once, in chunks under the step's token
budget, beside the sequences that decode; then the samples fork, sharing the prompt's full blocks.
Each step gives every running sequence one token; finished ones leave, waiting ones join. When the
pool runs out, the newest sequence gives its blocks back and is computed again later. Nothing is
lost by that: a sequence's noise depends on its stream and positions only.
"""

import time
from collections import deque
from itertools import chain

import numpy as np
import torch
from tqdm import tqdm

from nanorrm import ranks
from nanorrm.config import EngineConfig, UserError
from nanorrm.engine.batch import DecodeBatch
from nanorrm.engine.cache import BlockPool, block_names
from nanorrm.engine.graphs import DecodeGraphs
from nanorrm.engine.sampling import SamplingParams
from nanorrm.engine.sequence import Completion, Sequence
from nanorrm.model.hf_folder import resolve_model
from nanorrm.model.tokenizer import Tokenizer
from nanorrm.model.transformer import Transformer

STATS = (
    "steps",
    "seconds",
    "host_seconds",
    "prompt_tokens",
    "cached_tokens",
    "new_tokens",
    "preemptions",
    "rows",  # summed over steps, as is kv_use
    "kv_use",
    "kv_use_max",
)


class Engine:
    """Generates for one model. `generate` is all that most callers need."""

    def __init__(self, model, tokenizer, config=None):
        """model: Transformer; tokenizer: Tokenizer; config: EngineConfig."""
        self.model, self.tokenizer = model, tokenizer
        self.config = config = config or EngineConfig()
        c, size = model.config, config.block_size
        per_block = 2 * c.num_hidden_layers * size * c.num_key_value_heads * c.head_dim
        per_block *= model.head.element_size()
        gib = 0.5 if config.cache_gib is None else config.cache_gib
        if config.cache_gib is None and model.device.type == "cuda":
            gib = 0.6 * torch.cuda.mem_get_info(model.device)[0] / 2**30
        num_blocks = config.num_blocks or int(gib * 2**30) // per_block
        # no more than every sequence of the largest batch at full context could fill
        num_blocks = min(num_blocks, config.max_batch * -(-c.max_position_embeddings // size))
        self.pool = BlockPool(num_blocks)
        self.waiting, self.prefilling = deque(), []  # sequences; groups [leader, follower, ...]
        self.requests = 0  # how many were ever added
        self.weights = (
            None,
            None,
        )  # where the parameters were, and how often written, at the last request
        self.stats = dict.fromkeys(STATS, 0)
        self.wake()

    @classmethod
    def from_pretrained(cls, name, config=None, dtype=None):
        """An engine for a model folder or a shipped model (toy, toy-judge), on the GPU if any.

        dtype: of the weights; None: bf16 on a GPU, fp32 on a CPU.
        """
        folder = resolve_model(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
        model = Transformer.from_pretrained(folder, dtype, device)
        return cls(model, Tokenizer.from_pretrained(folder), config)

    # -- generate: all at once

    def generate(self, prompts, params=None, progress=None, on_done=None):
        """prompts: lists of token ids -> for each prompt, a list of n Completions.

        params: SamplingParams, or one for each prompt (they may differ in n, lengths and seed);
        progress: label of a progress bar, or None; on_done(index of the prompt, sample, Completion)
        is called for each as it finishes. A completion depends on its prompt, params and
        its place among the n, on nothing else in the batch. Raises UserError if a prompt does not
        fit the context or the cache, before anything is generated.
        """
        if self.unfinished:
            raise UserError("generate while other requests are in flight: use add and step")
        params = params or SamplingParams()
        each = params if isinstance(params, list) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"{len(each)} SamplingParams for {len(prompts)} prompts")
        for i, (prompt, p) in enumerate(zip(prompts, each)):
            if refusal := self.refusal(prompt, p):
                raise UserError(f"request {i}: {refusal}")
        # longest prompts first: those computed together are of like lengths
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        place = {}  # request number -> index of the prompt
        results = [[None] * p.n for p in each]
        total = sum(p.n for p in each)
        quiet = True if progress is None else None  # None: quiet unless stderr is a terminal
        bar = tqdm(total=total, desc=progress, leave=False, disable=quiet)
        try:
            for i in order:
                place[self.add(prompts[i], each[i])] = i
            while self.unfinished:
                for request, sample, completion in self.step():
                    results[place[request]][sample] = completion
                    if on_done:
                        on_done(place[request], sample, completion)
                    bar.update(1)
        finally:  # interrupted: nothing may stay behind
            for request in place:
                self.abort(request)
            bar.close()
        return results

    # -- request by request

    @property
    def unfinished(self):
        """Whether anything waits or runs."""
        return bool(self.waiting or self.prefilling or (self.rows and self.rows.n))

    def add(self, prompt, params=None):
        """Queue a request; returns its number. Raises UserError if it can never be served."""
        params = params or SamplingParams()
        if refusal := self.refusal(prompt, params):
            raise UserError(refusal)
        if self.rows is None:
            self.wake()
        if not self.unfinished:
            self._notice_new_weights()
            stop = params.stop_token_ids
            stop = tuple(self.model.config.eos_token_id) if stop is None else stop
            fused = self.config.fused_head
            fused = self.model.device.type == "cuda" if fused is None else fused
            self.rows.configure(params, stop, fused)
        elif params.shared() != self.rows.params.shared():
            raise UserError("requests in flight together may differ in n, lengths and seed only")
        number, self.requests = self.requests, self.requests + 1
        self.waiting.extend(
            Sequence(list(prompt), params, number, j, number * 2**20 + j) for j in range(params.n)
        )
        return number

    @torch.inference_mode()
    def step(self):
        """One turn of the batch. Returns what finished: [(request, sample, Completion), ...]."""
        clock = [time.perf_counter()]
        turns = self.config.read_every if self.graphs.usable and not self.rows.params.stop else 1
        self._make_room(turns)
        chunks = self._schedule()
        clock.append(time.perf_counter())
        if chunks:
            self._mixed(chunks)
        elif self.rows.n:
            for _ in range(turns):
                self._decode(turns)
        done = self.rows.narrow["done"][: self.rows.n].nonzero()[:, 0].tolist()  # waits for a GPU
        clock.append(time.perf_counter())
        stats, used = self.stats, 1 - self.pool.free / len(self.pool)
        stats["steps"] += 1
        stats["rows"] += self.rows.n
        stats["kv_use"] += used
        stats["kv_use_max"] = max(stats["kv_use_max"], used)
        finished = self._collect(done)
        clock.append(time.perf_counter())
        stats["seconds"] += clock[3] - clock[0]
        stats["host_seconds"] += clock[3] - clock[2] + clock[1] - clock[0]
        return finished

    def report(self):
        """What the engine did since the last report: counts, and shares of what was possible.

        host_share is the share of time in which no model work was under way: scheduling and
        bookkeeping. kv_use counts blocks that a sequence owns, not prefixes kept for reuse.
        """
        s, steps = self.stats, max(1, self.stats["steps"])
        read = max(1, s["prompt_tokens"] + s["cached_tokens"])
        self.stats = dict.fromkeys(STATS, 0)
        return {
            "engine/steps": s["steps"],
            "engine/tokens_per_s": s["new_tokens"] / max(s["seconds"], 1e-9),
            "engine/batch_occupancy": s["rows"] / steps / self.config.max_batch,
            "engine/cache_hit_rate": s["cached_tokens"] / read,
            "engine/preemptions": s["preemptions"],
            "engine/kv_use_mean": s["kv_use"] / steps,
            "engine/kv_use_max": s["kv_use_max"],
            "engine/host_share": s["host_seconds"] / max(s["seconds"], 1e-9),
        }

    @torch.inference_mode()
    def abort(self, request):
        """Stop a request. Returns [(request, sample, Completion)] of its unfinished samples."""
        out = []
        for s in [s for s in self.waiting if s.request == request]:
            self.waiting.remove(s)
            out.append(
                (request, s.sample, self._completion(s, s.written, "abort", self._thought(s)))
            )
        for group in [g for g in self.prefilling if g[0].request == request]:
            self.prefilling.remove(group)
            for s in group:
                self.pool.release(s.blocks)
                out.append(
                    (request, s.sample, self._completion(s, s.written, "abort", self._thought(s)))
                )
        rows = [i for i, s in enumerate(self.rows.sequences) if s.request == request]
        return out + self._finish(dict.fromkeys(rows, "abort"))

    def refusal(self, prompt, params):
        """Why a prompt can never be served with these parameters, or None."""
        total, context = len(prompt) + params.max_tokens, self.model.config.max_position_embeddings
        asked = f"prompt of {len(prompt)} tokens + {params.max_tokens} new ones"
        if not prompt:
            return "the prompt is empty"
        if max(prompt) >= self.model.config.vocab_size or min(prompt) < 0:
            return f"a token id outside the model's vocabulary of {self.model.config.vocab_size}"
        if self.tokenizer.think_ids[1] is None and (
            params.answer_slots or params.max_think_tokens is not None
        ):
            return "the tokenizer has no </think>, which a thinking budget or forced answer needs"
        if total > context:
            return f"{asked} exceeds the model's context of {context}"
        if self.blocks_for(total) > len(self.pool):
            pool = len(self.pool) * self.config.block_size
            return f"{asked} exceeds the cache of {pool} tokens (cache_gib, num_blocks)"
        return None

    # -- weights and memory, for training

    def _notice_new_weights(self):
        """A guard for callers who forget `sync`: drop the prefixes if a parameter was replaced or
        written in place (writes through `.data` go unseen)."""
        places = [p.data_ptr() for p in self.model.parameters()]
        weights = places, [p._version for p in self.model.parameters()]
        if weights != self.weights:
            self.pool.drop()
            if places != self.weights[0]:
                self.graphs.captured.clear()  # recorded graphs read the old places
            self.weights = weights

    @torch.no_grad()
    def sync(self, model=None):
        """The weights changed: copy them from `model` (None or our own: they are shared; sharded:
        one by one gathered from all ranks) and forget every cached prefix."""
        assert not self.unfinished, "sync while requests are in flight"
        if model is not None and model is not self.model:
            for ours, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                ours.copy_(ranks.whole(theirs))
        self.pool.drop()

    def sleep(self):
        """Give the memory of the cache back, until `wake`."""
        assert not self.unfinished, "sleep while requests are in flight"
        self.pool.drop()
        self.cache = self.rows = self.graphs = None

    def wake(self):
        """Take the memory of the cache again."""
        c = self.model.config
        shape = (c.num_hidden_layers, len(self.pool), self.config.block_size)
        shape += (c.num_key_value_heads, c.head_dim)
        like = self.model.head
        self.cache = tuple(torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in "kv")
        capacity = self.config.max_batch
        size = self.config.block_size
        self.rows = DecodeBatch(self.model, self.tokenizer, self.cache, size, capacity)
        self.graphs = DecodeGraphs(self.rows, self.config)

    # -- what runs next

    def blocks_for(self, tokens):
        """Blocks that hold so many tokens."""
        return -(-tokens // self.config.block_size)

    def _make_room(self, turns):
        """Give every row the blocks its next `turns` tokens need; preempt the newest if short."""
        rows, size = self.rows, self.config.block_size
        while True:
            ends = np.minimum(rows.lengths[: rows.n] + turns - 1, rows.totals[: rows.n])
            lacking = -(-ends // size) - rows.held[: rows.n]
            if lacking.sum() <= self.pool.free:
                break
            self._preempt()
        for row in lacking.nonzero()[0].tolist():
            for block in self.pool.allocate(int(lacking[row])):
                rows.add_block(row, block)

    def _preempt(self):
        """Send the newest sequence, or group in prefill, back to the front of the queue."""
        self.stats["preemptions"] += 1
        if self.prefilling:
            group = self.prefilling.pop()
        else:
            row = max(range(self.rows.n), key=lambda i: self.rows.sequences[i].order)
            group = [self.rows.sequences[row]]
            group[0].written = self.rows.written(row)
            self.rows.remove([row])
        for s in reversed(group):
            self.pool.release(s.blocks)
            s.blocks, s.computed = [], 0
            self.waiting.appendleft(s)

    def _schedule(self):
        """Chunks of prompts to compute in this step: [(group, end), ...], each from the leader's
        `computed` to end. Decoding rows come first in the token budget."""
        budget = self.config.max_step_tokens - self.rows.n
        chunks = []
        for group in self.prefilling:
            budget -= self._chunk(group, budget, chunks)
        while self.waiting and (budget > 0 or not (chunks or self.rows.n)):
            group = self._admit(budget if chunks else None)
            if group is None:
                break
            self.prefilling.append(group)
            budget -= self._chunk(group, budget, chunks)
        return chunks

    def _chunk(self, group, budget, chunks):
        """Append a group's next chunk if the budget allows one; returns its length."""
        leader = group[0]
        left = len(leader) - leader.computed
        if self.config.chunked_prefill:
            left = min(left, max(budget, 0))
        elif left > budget and chunks:
            return 0
        if left:
            chunks.append((group, leader.computed + left))
        return left

    def _admit(self, budget):
        """Take the first waiting sequence, and all fresh ones of the same prompt right behind it,
        out of the queue with all blocks they need now; None if there is no room."""
        size, config = self.config.block_size, self.config
        running = self.rows.n + sum(map(len, self.prefilling))
        leader = self.waiting[0]
        if running >= config.max_batch:
            return None
        if not config.chunked_prefill and budget is not None and len(leader) > budget:
            return None
        tokens, found = leader.tokens, []
        if config.prefix_cache:
            leader.names = block_names(tokens, size, self.pool.epoch)
            # the last token is always computed: its hidden state draws the next one
            found = self.pool.find(leader.names[: (len(tokens) - 1) // size])
        self.pool.share(found)
        spare = running // size + 1 if running else 0  # what running rows will soon ask for
        need = self.blocks_for(len(tokens)) - len(found)
        if need + spare > self.pool.free:
            self.pool.release(found)
            return None
        leader.blocks = found + self.pool.allocate(need)
        leader.computed = len(found) * size
        self.stats["cached_tokens"] += leader.computed
        group = [self.waiting.popleft()]
        full, partial = divmod(len(leader.prompt), size)
        while self.waiting and running + len(group) < config.max_batch:
            s = self.waiting[0]
            alike = s.request == leader.request or (
                config.prefix_cache and s.prompt == leader.prompt
            )
            if not alike or s.written or leader.written:
                break
            if bool(partial) + spare > self.pool.free:
                break
            self.pool.share(leader.blocks[:full])
            s.blocks = leader.blocks[:full] + self.pool.allocate(bool(partial))
            group.append(self.waiting.popleft())
        return group

    # -- model steps

    def _decode(self, turns):
        """One token for every row."""
        rows = self.rows
        width = self.blocks_for(int(rows.lengths[: rows.n].max()) + turns)
        self.graphs.run(rows.n, min(width, rows.width))
        rows.lengths[: rows.n] += 1

    def _mixed(self, chunks):
        """Chunks of prompts beside one token for every row."""
        rows, size, device = self.rows, self.config.block_size, self.model.device
        spans = [(group[0], group[0].computed, end) for group, end in chunks]
        lengths = torch.tensor([end - start for _, start, end in spans])
        ends = torch.tensor([end for *_, end in spans])
        cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
        width = self.blocks_for(int(ends.max()))
        tables = [(s.blocks + [0] * width)[:width] for s, *_ in spans]
        tables = torch.tensor(tables)
        positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
        owner = torch.repeat_interleave(torch.arange(len(spans)), lengths)
        slots = tables[owner, positions // size] * size + positions % size
        ids = torch.tensor(list(chain.from_iterable(s.tokens[a:b] for s, a, b in spans)))
        ids, positions, slots = (x.to(device) for x in (ids, positions, slots))
        prefill = tuple(x.to(device) for x in (tables, cu_seqlens, ends))
        decode, n = None, rows.n
        if n:
            wide = min(self.blocks_for(int(rows.lengths[:n].max())), rows.width)
            last, position, slot, table, length = rows.inputs(n, wide)
            decode = (table, length)
            ids, positions, slots = (
                torch.cat(pair) for pair in ((last, ids), (position, positions), (slot, slots))
            )
        hidden = self.model.forward_cached(ids, self.cache, positions, slots, decode, prefill)
        self.stats["prompt_tokens"] += int(lengths.sum())
        rows.lengths[:n] += 1
        heads, members = [hidden[:n]], []
        for (group, end), last in zip(chunks, (n - 1 + cu_seqlens[1:]).tolist()):
            leader = group[0]
            leader.computed = end
            for block, name in zip(leader.blocks, leader.names[: end // size]):
                self.pool.name(block, name)
            if end == len(leader):
                self.prefilling.remove(group)
                members += group
                heads.append(hidden[last : last + 1].expand(len(group), -1))
                self._fork(group)
        if members:
            rows.join(members)
            rows.lengths[n : rows.n] += 1
        if rows.n:
            rows.extend(torch.cat(heads))

    def _fork(self, group):
        """Give each follower its copy of the leader's last, partial block."""
        leader, *followers = group
        if followers and len(leader.prompt) % self.config.block_size:
            targets = [follower.blocks[-1] for follower in followers]
            for cache in self.cache:
                cache[:, targets] = cache[:, [leader.blocks[-1]] * len(targets)]

    # -- what is done

    def _collect(self, done):
        """Finish the rows that are done: [(request, sample, Completion), ...]."""
        rows = self.rows
        if not rows.n:
            return []
        reasons = dict.fromkeys(done)  # stop or length: the last id tells
        texts = {}
        if rows.params.stop:
            texts = self._stop_strings()
            reasons |= dict.fromkeys(texts, "stop")
        return self._finish(reasons, texts)

    def _finish(self, reasons, texts=None):
        """Turn rows {row: finish reason, None to be told by the last id} into Completions."""
        out, rows = [], self.rows
        for row, reason in reasons.items():
            s, written = rows.sequences[row], rows.written(row)
            ended = bool(torch.isin(rows.narrow["last"][row], rows.stop_ids))
            reason = reason or ("stop" if ended else "length")
            think = int(rows.narrow["think_tokens"][row])
            completion = self._completion(s, written, reason, think, ended)
            if texts and row in texts:
                completion.text = texts[row]
            out.append((s.request, s.sample, completion))
            self.pool.release(s.blocks)
        rows.remove(list(reasons))
        return out

    def _completion(self, sequence, written, reason, think, ended=False):
        ids = written.get("ids", [])
        self.stats["new_tokens"] += len(ids)
        logprobs = sequence.params.logprobs
        return Completion(
            ids=ids,
            text=self.tokenizer.decode(ids[:-1] if ended else ids),
            logprobs=written.get("logp", []) if logprobs else [],
            raw_logprobs=written.get("raw", []) if logprobs else [],
            forced=written.get("forced", []),
            finish_reason=reason,
            think_tokens=think,
        )

    def _thought(self, sequence):
        """Thinking tokens of a sequence that has no row."""
        return sequence.started(*self.tokenizer.think_ids)["think_tokens"]

    def _stop_strings(self):
        """{row: text before the stop string} of the rows whose text now holds one."""
        found = {}
        for row in range(self.rows.n):
            text = self.tokenizer.decode(self.rows.written(row)["ids"])
            places = [text.find(stop) for stop in self.rows.params.stop if stop in text]
            if places:
                found[row] = text[: min(places)]
        return found
