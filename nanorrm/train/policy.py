"""A policy at work: queries in, responses out, and what of a response a judge gets to see.

The judge sees answers, not how they were found: the thinking is cut, an answer that was never
reached is "[NO ANSWER]", and of a long one only the end is kept (as in the released code of the
paper's authors).
"""

from nanorrm import ranks
from nanorrm.config import UserError
from nanorrm.engine.sampling import SamplingParams, seeds_apart
from nanorrm.judge import prompts, verdict
from nanorrm.model.tokenizer import after_thinking


class Policy:
    """A prompt, settings of decoding, and an engine that generates.

    backend: an Engine; keep_tokens: how many of an answer's tokens, its last, are kept (0: all);
    release: give the memory of the engine's cache back after each use; decoding: SamplingParams'
    temperature, max_tokens, max_think_tokens.
    """

    def __init__(self, backend, keep_tokens=0, release=False, **decoding):
        self.backend, self.keep_tokens, self.release = backend, keep_tokens, release
        self.decoding = {"max_tokens": 1024, **decoding}

    def prompt(self, query):
        """Prompt ids of a query (text or messages): the toy's, or the chat template's."""
        return prompts.query_prompt(self.backend.tokenizer, query)

    def refusal(self, query):
        """Why a query can't be answered, or None."""
        try:
            too_long = self.backend.refusal(self.prompt(query), SamplingParams(**self.decoding))
            return too_long and "too long"
        except UserError as error:
            return str(error)

    def respond(self, queries, n=1, seed=0, logprobs=True):
        """n responses to each of P queries -> (prompt ids [P], Completions [P][n])."""
        questions = [self.prompt(query.text) for query in queries]
        params = SamplingParams(n=n, seed=seed, logprobs=logprobs, **self.decoding)
        groups = self.backend.generate(questions, seeds_apart(params, questions))
        if self.release:
            self.backend.sleep()
        return questions, groups

    def answer(self, question, completion):
        """What a judge is shown of a response: see the top of this file. question: prompt ids."""
        opened = prompts.opens_thinking(self.backend.tokenizer, question)
        after = after_thinking(completion.text, opened)
        if completion.finish_reason != "stop" or after is None:
            return verdict.NO_ANSWER
        return last_tokens(self.backend.tokenizer, after.strip(), self.keep_tokens)

    def answers(self, questions, groups):
        """`answer` of all responses: [P] and [P][n] -> texts [P][n]."""
        return [[self.answer(q, c) for c in group] for q, group in zip(questions, groups)]


def last_tokens(tokenizer, text, n):
    """The end of a text, n tokens of it; all of it if n is 0 or it is not longer."""
    ids = tokenizer.encode(text) if n else []
    return tokenizer.decode(ids[-n:]) if len(ids) > n else text


def open_policy(cfg, engine, kind=Policy):
    """The Policy of a PolicyRunConfig, its work shared by all ranks. kind: Policy or a child."""
    names = ("temperature", "max_tokens", "max_think_tokens")
    decoding = {name: getattr(cfg, name) for name in names}
    return kind(ranks.RankSharedEngine(engine), cfg.keep_tokens, cfg.release_cache, **decoding)
