"""One sample on its way through the engine, and what comes out of it."""

from dataclasses import dataclass, field

from nanorrm.engine.sampling import SamplingParams, stream_id


@dataclass
class Completion:
    """One sampled continuation. The lists run parallel, one entry per new token."""

    ids: list[int]  # the end token included, if it was sampled
    text: str  # without end token and stop string
    logprobs: list[float]  # nats, of the distribution sampled from
    raw_logprobs: list[float]  # nats, of the model at temperature 1 (fused head, forced token: 0)
    forced: list[bool]  # put there by the engine, never trained on
    finish_reason: str  # "stop" | "length" | "abort"
    think_tokens: int  # tokens of the thinking, tags not counted


@dataclass(eq=False)
class Sequence:
    """A sample on its way: what the engine knows of it outside the tensors."""

    prompt: list[int]
    params: SamplingParams
    request: int
    sample: int
    order: int  # by arrival; the newest is preempted first
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of its full blocks, for the prefix cache
    computed: int = 0  # tokens whose keys and values are in the cache
    written: dict = field(default_factory=dict)  # what was generated before a preemption

    @property
    def tokens(self):
        return self.prompt + self.written.get("ids", [])

    def __len__(self):
        return len(self.prompt) + len(self.written.get("ids", ()))

    def started(self, begin, end):
        """The row a sequence starts or goes on with (begin, end: ids of the thinking tags)."""
        state = {"thinking": False, "answered": -1, "think_tokens": 0}
        for i, token in enumerate(self.tokens):
            generated = i >= len(self.prompt)
            state["answered"] += state["answered"] >= 0
            if token == end:
                state |= {"thinking": False, "answered": 0}
            state["think_tokens"] += generated and state["thinking"]
            if token == begin:
                state |= {"thinking": True, "answered": -1 if not generated else state["answered"]}
        budget = self.params.max_think_tokens
        return {
            **state,
            "length": len(self),
            "count": len(self) - len(self.prompt),
            "limit": self.params.max_tokens,
            "last": 0,
            "stream": stream_id(self.params.seed, self.prompt, self.sample),
            "budget": 2**62 if budget is None else budget,
            "done": False,
        }
