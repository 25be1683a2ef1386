"""One sample on its way through the engine, and what comes out of it."""

from dataclasses import dataclass, field
from typing import NamedTuple

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


class Generated(NamedTuple):
    """What was generated, as in a Completion: lists, or tensors [rows, columns] of a batch."""

    ids: list
    logp: list
    raw: list
    forced: list


class RowState(NamedTuple):
    """What a decode step knows of a sequence: numbers, or tensors [rows] of a batch."""

    length: int  # prompt and generated tokens
    count: int  # generated tokens
    limit: int  # tokens to generate at most
    last: int  # id of the newest token, whose key and value are not computed yet
    stream: int  # of the noise
    budget: int  # thinking tokens at most
    think_tokens: int
    answered: int  # tokens since </think>, -1 before it; kept up for answer slots only
    thinking: bool
    done: bool


NOTHING = Generated([], [], [], [])


@dataclass(eq=False)
class Sequence:
    """A sample on its way: what the engine knows of it outside the tensors."""

    prompt: list[int]
    params: SamplingParams
    request: int  # by arrival
    sample: int  # its index among the request's n
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of its full blocks, for the prefix cache
    computed: int = 0  # tokens whose keys and values are in the cache
    generated: Generated = NOTHING  # before a preemption

    @property
    def tokens(self):
        return self.prompt + self.generated.ids

    def __len__(self):
        return len(self.prompt) + len(self.generated.ids)

    def started(self, begin, end):
        """The RowState a sequence starts or goes on with (begin, end: ids of the thinking tags)."""
        thinking, answered, think_tokens = False, -1, 0
        for i, token in enumerate(self.tokens):
            generated = i >= len(self.prompt)
            answered += answered >= 0
            if token == end:
                thinking, answered = False, 0
            think_tokens += generated and thinking
            if token == begin:  # in a prompt it opens the turn that is to be answered
                thinking, answered = True, answered if generated else -1
        params = self.params
        return RowState(
            length=len(self),
            count=len(self.generated.ids),
            limit=params.max_tokens,
            last=0,  # the step that computes the prompt draws it
            stream=stream_id(params.seed, self.prompt, self.sample),
            budget=2**62 if params.max_think_tokens is None else params.max_think_tokens,
            think_tokens=think_tokens,
            answered=answered,
            thinking=thinking,
            done=False,
        )
