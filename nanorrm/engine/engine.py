"""Generation: continuous batching with chunked prefill over a paged cache with prefix reuse.

A request is a prompt and n samples. Its prompt is computed once, in chunks under the step's token
budget, beside the sequences that decode; then the samples fork. Each step gives every running
sequence one token; finished ones leave, waiting ones join (scheduler.py). What a sequence draws
depends on its stream and positions only, so it may be preempted and computed again.
"""

import time
from collections import Counter

import torch
from tqdm import tqdm

from nanorrm import ranks
from nanorrm.config import EngineConfig, UserError
from nanorrm.engine.batch import DecodeBatch, prefill_inputs
from nanorrm.engine.cache import blocks_for
from nanorrm.engine.graphs import DecodeGraphs
from nanorrm.engine.sampling import SamplingParams
from nanorrm.engine.scheduler import Scheduler
from nanorrm.engine.sequence import Completion, Sequence
from nanorrm.model.hf_folder import resolve_model
from nanorrm.model.tokenizer import Tokenizer
from nanorrm.model.transformer import Transformer


class Engine:
    """Generates for one model: the weights, the rows that decode, and who runs when.

    `generate` is all that most callers need. on_step: None, or a function that is called with what
    finished after every step.
    """

    def __init__(self, model, tokenizer, config=None):
        """model: Transformer; tokenizer: Tokenizer; config: EngineConfig."""
        self.model, self.tokenizer = model, tokenizer
        self.config = config or EngineConfig()
        self.stats = Counter()  # of what was done since the last report
        self.scheduler = Scheduler(self.config, self._pool_size(), self.stats)
        self.requests = 0  # how many were ever added
        self.weights = None, None  # at the last request: where they lay, and how often written
        self.on_step = None
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
        each = self.params_for(prompts, params)
        # longest prompts first: those computed together are of like lengths
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        place = {}  # request number -> index of the prompt
        results = [[None] * p.n for p in each]
        quiet = True if progress is None else None  # None: quiet unless stderr is a terminal
        bar = tqdm(total=sum(p.n for p in each), desc=progress, leave=False, disable=quiet)
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

    def params_for(self, prompts, params):
        """One SamplingParams per prompt; raises UserError where one can't be served."""
        params = params or SamplingParams()
        each = params if isinstance(params, list) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"{len(each)} SamplingParams for {len(prompts)} prompts")
        for i, (prompt, p) in enumerate(zip(prompts, each)):
            if refusal := self.refusal(prompt, p):
                raise UserError(f"request {i}: {refusal}")
        return each

    # -- request by request

    @property
    def unfinished(self):
        """Whether anything waits or runs."""
        return bool(self.scheduler.unfinished or (self.rows and self.rows.n))

    def add(self, prompt, params=None):
        """Queue a request; returns its number. Raises UserError if it can never be served."""
        params = params or SamplingParams()
        if refusal := self.refusal(prompt, params):
            raise UserError(refusal)
        if self.rows is None:
            self.wake()
        if not self.unfinished:
            self._notice_new_weights()
            self.rows.configure(params)
        elif params.shared() != self.rows.params.shared():
            raise UserError("requests in flight together may differ in n, lengths and seed only")
        number, self.requests = self.requests, self.requests + 1
        self.scheduler.waiting.extend(
            Sequence(list(prompt), params, number, sample) for sample in range(params.n)
        )
        return number

    @torch.inference_mode()
    def step(self):
        """One turn of the batch. Returns what finished: [(request, sample, Completion), ...]."""
        clock = [time.perf_counter()]
        rows, scheduler, stats = self.rows, self.scheduler, self.stats
        # with graphs the host looks only now and then at who is done, unless it has texts to read
        turns = self.config.read_every if self.graphs.usable and not rows.params.stop else 1
        scheduler.make_room(rows, turns)
        chunks = scheduler.schedule(rows.n)
        clock.append(time.perf_counter())
        if chunks:
            self._mixed(chunks)
        elif rows.n:
            for _ in range(turns):
                self.graphs.run(rows.n, rows.width_for(turns))
                rows.lengths[: rows.n] += 1
        done = rows.state.done[: rows.n].nonzero()[:, 0].tolist()  # waits for a GPU
        clock.append(time.perf_counter())
        used = 1 - scheduler.pool.free / len(scheduler.pool)
        stats.update(steps=1, rows=rows.n, kv_use=used)
        stats["kv_use_max"] = max(stats["kv_use_max"], used)
        finished = self._collect(done)
        clock.append(time.perf_counter())
        stats["seconds"] += clock[3] - clock[0]
        stats["host_seconds"] += clock[3] - clock[2] + clock[1] - clock[0]
        if self.on_step:
            self.on_step(finished)
        return finished

    def report(self):
        """What the engine did since the last report: counts, and shares of what was possible.

        host_share is the share of time in which no model work was under way: scheduling and
        bookkeeping. kv_use counts blocks that a sequence owns, not prefixes kept for reuse.
        """
        s = self.stats.copy()
        self.stats.clear()
        steps, seconds = max(1, s["steps"]), max(s["seconds"], 1e-9)
        read = max(1, s["prompt_tokens"] + s["cached_tokens"])
        return {
            "engine/steps": s["steps"],
            "engine/tokens_per_s": s["new_tokens"] / seconds,
            "engine/batch_occupancy": s["rows"] / steps / self.config.max_batch,
            "engine/cache_hit_rate": s["cached_tokens"] / read,
            "engine/preemptions": s["preemptions"],
            "engine/kv_use_mean": s["kv_use"] / steps,
            "engine/kv_use_max": s["kv_use_max"],
            "engine/host_share": s["host_seconds"] / seconds,
        }

    @torch.inference_mode()
    def abort(self, request):
        """Stop a request. Returns [(request, sample, Completion)] of its unfinished samples."""
        out, tags = [], self.tokenizer.think_ids
        for s in self.scheduler.remove(request):
            out.append(self._completion(s, s.generated, s.started(*tags).think_tokens, "abort"))
        rows = [i for i, s in enumerate(self.rows.sequences) if s.request == request]
        return out + self._finish(dict.fromkeys(rows, "abort"))

    def refusal(self, prompt, params):
        """Why a prompt can never be served with these parameters, or None."""
        total, context = len(prompt) + params.max_tokens, self.model.config.max_position_embeddings
        asked = f"prompt of {len(prompt)} tokens + {params.max_tokens} new ones"
        size, blocks = self.config.block_size, len(self.scheduler.pool)
        if not prompt:
            return "the prompt is empty"
        if max(prompt) >= self.model.config.vocab_size or min(prompt) < 0:
            return f"a token id outside the model's vocabulary of {self.model.config.vocab_size}"
        thinks = params.answer_slots or params.max_think_tokens is not None
        if thinks and self.tokenizer.think_ids[1] is None:
            return "the tokenizer has no </think>, which a thinking budget or forced answer needs"
        if total > context:
            return f"{asked} exceeds the model's context of {context}"
        if blocks_for(total, size) > blocks:
            return f"{asked} exceeds the cache of {blocks * size} tokens (cache_gib, num_blocks)"
        return None

    # -- weights and memory

    def _notice_new_weights(self):
        """A guard for callers who forget `sync`: drop the prefixes if a parameter was replaced or
        written in place (writes through `.data` go unseen)."""
        places = [p.data_ptr() for p in self.model.parameters()]
        weights = places, [p._version for p in self.model.parameters()]
        if weights != self.weights:
            self.scheduler.pool.drop()
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
        self.scheduler.pool.drop()

    def sleep(self):
        """Give the memory of the cache back, until `wake`."""
        assert not self.unfinished, "sleep while requests are in flight"
        self.scheduler.pool.drop()
        self.cache = self.rows = self.graphs = None

    def wake(self):
        """Take the memory of the cache again."""
        c, blocks = self.model.config, len(self.scheduler.pool)
        shape = blocks, self.config.block_size, c.num_key_value_heads, c.head_dim
        like = self.model.head
        self.cache = tuple(like.new_zeros(c.num_hidden_layers, *shape) for _ in "kv")
        self.rows = DecodeBatch(self.model, self.tokenizer, self.cache, self.config)
        self.graphs = DecodeGraphs(self.rows, self.config)

    def _pool_size(self):
        """Blocks of the cache: as many as are asked for, or as cache_gib holds."""
        c, config, device = self.model.config, self.config, self.model.device
        gib = config.cache_gib or 0.5
        if config.cache_gib is None and device.type == "cuda":
            gib = 0.6 * torch.cuda.mem_get_info(device)[0] / 2**30
        token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        token *= self.model.head.element_size()
        num_blocks = config.num_blocks or int(gib * 2**30) // (token * config.block_size)
        # no more than every sequence of the largest batch at full context could fill
        longest = blocks_for(c.max_position_embeddings, config.block_size)
        return min(num_blocks, config.max_batch * longest)

    # -- a step with prompts in it

    def _mixed(self, chunks):
        """Chunks of prompts beside one token for every row, in one pass."""
        rows, n, device = self.rows, self.rows.n, self.model.device
        ids, positions, slots, prefill = prefill_inputs(chunks, self.config.block_size)
        lasts = (n - 1 + prefill[1][1:]).tolist()  # where each chunk's last token comes to stand
        ids, positions, slots, *prefill = (x.to(device) for x in (ids, positions, slots, *prefill))
        pages = None
        if n:
            last, position, slot, pages = rows.inputs(n, rows.width_for(0))
            ids, positions = torch.cat((last, ids)), torch.cat((position, positions))
            slots = torch.cat((slot, slots))
        hidden = self.model.forward_cached(ids, self.cache, positions, slots, pages, prefill)
        self.stats["prompt_tokens"] += len(ids) - n
        # the last hidden state of a prompt draws the first token of each of its samples
        heads, members = [hidden[:n]], []
        for (group, end), last in zip(chunks, lasts):
            if self.scheduler.computed(group, end):
                self._fork(group)
                members += group
                heads.append(hidden[last].expand(len(group), -1))
        if members:
            rows.join(members)
        if rows.n:
            rows.extend(torch.cat(heads))
            rows.lengths[: rows.n] += 1

    def _fork(self, group):
        """Give each follower its copy of the leader's last, partial block."""
        leader, *followers = group
        if followers and len(leader.prompt) % self.config.block_size:
            targets = [follower.blocks[-1] for follower in followers]
            for cache in self.cache:
                cache[:, targets] = cache[:, [leader.blocks[-1]] * len(targets)]

    # -- what is done

    def _collect(self, done):
        """Finish the rows that are done, and those whose text holds a stop string."""
        stop, cut = self.rows.params.stop, {}  # row -> text before the stop string
        for row in range(self.rows.n if stop else 0):
            text = self.tokenizer.decode(self.rows.read(row).ids)
            if places := [text.find(string) for string in stop if string in text]:
                cut[row] = text[: min(places)]
        return self._finish(dict.fromkeys(done) | dict.fromkeys(cut, "stop"), cut)

    def _finish(self, reasons, cut=None):
        """Rows {row: finish reason, None if the last id tells}, {row: text, where it was cut} ->
        [(request, sample, Completion), ...]."""
        out, rows = [], self.rows
        for row, reason in reasons.items():
            s, think = rows.sequences[row], int(rows.state.think_tokens[row])
            out.append(self._completion(s, rows.read(row), think, reason, (cut or {}).get(row)))
            self.scheduler.pool.release(s.blocks)
        rows.remove(list(reasons))
        return out

    def _completion(self, s, generated, think, reason=None, text=None):
        """(request, sample, Completion) of a Sequence; reason, text: None where the ids tell."""
        ids, logp, raw, forced = generated
        self.stats["new_tokens"] += len(ids)
        ended = bool(ids) and ids[-1] in self.rows.stop
        reason = reason or ("stop" if ended else "length")
        text = self.tokenizer.decode(ids[:-1] if ended else ids) if text is None else text
        if not s.params.logprobs:
            logp, raw = [], []
        return s.request, s.sample, Completion(ids, text, logp, raw, forced, reason, think)
