"""A reward function for TRL's GRPOTrainer: responses to a prompt compete, and a judge decides.

    from nanorrm.integrations.trl import group_reward
    trainer = GRPOTrainer(model, reward_funcs=group_reward(judge), args=GRPOConfig(...), ...)

The contract is TRL's: called with prompts, completions (text or messages), completion_ids and the
data set's columns; one number for each completion; `log_metric` where the trainer offers it.
"""

import asyncio

from nanorrm import ranks
from nanorrm.config import UserError
from nanorrm.integrations.group_reward import GroupReward, answer_of
from nanorrm.judge.verdict import NO_ANSWER


def group_reward(
    judge, query_column="query", thinks=False, tokenizer=None, background=False, **how
):
    """A function for GRPOTrainer(reward_funcs=...); **how: as for GroupReward.

    query_column: a column of the data set that holds the query as the judge should see it; without
    one the prompt is shown. thinks: the prompt opens the thinking. tokenizer: the policy's, of
    transformers; with it a completion that ran into the limit counts as no answer, and `</think>`
    is seen where it is a special token, which TRL leaves out of the text. background: an async
    function, which TRL runs beside other async rewards; the judge works in a thread.

    Ratings lie close together, so keep scale_rewards="group". A response whose group is on other
    processes too is fine: groups are gathered.
    """
    reward = GroupReward(judge, **how)
    if background and ranks.world_size() > 1:
        raise UserError("background: groups are gathered from several processes, not in a thread")

    def rrm(prompts, completions, completion_ids=None, log_metric=None, **columns):
        queries = columns.get(query_column) or [query_of(prompt) for prompt in prompts]
        if tokenizer is not None and completion_ids is not None:
            answers = [answer_in(tokenizer, ids, thinks) for ids in completion_ids]
        else:
            answers = [answer_of(text_of(completion), thinks) for completion in completions]
        rewards, costs = reward.rewards(queries, answers)
        for name, value in costs.items():
            if log_metric is not None and value is not None:
                log_metric(name, float(value))
        return rewards

    async def rrm_in_background(*args, **named):
        return await asyncio.to_thread(rrm, *args, **named)

    return rrm_in_background if background else rrm


def query_of(prompt):
    """A prompt as the judge is shown it: a single user message is its text."""
    if isinstance(prompt, list) and len(prompt) == 1:
        return prompt[0]["content"]
    return prompt


def answer_in(tokenizer, ids, thinks):
    """The answer in the ids of a completion, which has to end with the end token."""
    *ids, last = ids
    return answer_of(tokenizer.decode(ids), thinks) if last == tokenizer.eos_token_id else NO_ANSWER


def text_of(completion):
    """A completion, text or messages, as text: of the last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
