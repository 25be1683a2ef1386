"""The engine: what it says of its tokens is true, and nothing but the request decides them."""

import pytest
import tiny
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import kernels
from nanorrm.config import UserError
from nanorrm.data import toy
from nanorrm.engine.sampling import SamplingParams
from nanorrm.engine.sequence import Sequence
from nanorrm.judge import prompts
from nanorrm.model.transformer import Transformer
from nanorrm.train import packing

THINK, END_THINK = 256, 257  # ids of the toy tokenizer
MIXED = SamplingParams(n=3, temperature=0.7, max_tokens=24, seed=5)


def random_model(seed=0):
    """Untied, so that it does not repeat itself: a tied random head likes the token it reads."""
    return tiny.model(seed, tie_word_embeddings=False)


def leaks(engine):
    return len(engine.scheduler.pool.owners) - engine.scheduler.pool.free


@pytest.fixture(scope="module")
def random_engine(tokenizer):
    return tiny.engine(tokenizer, random_model(), block_size=4)


@pytest.fixture(scope="module")
def asked():
    """40 prompts of 1 to 40 tokens, two of them alike, some a whole number of blocks."""
    drawn = [*tiny.prompts(38), list(range(1, 17)), list(range(1, 9))]
    drawn[7] = list(drawn[3])
    return drawn


@pytest.fixture(scope="module")
def wanted(random_engine, asked):
    return random_engine.generate(asked, MIXED)


def as_tuples(groups):
    return [[(tuple(c.ids), c.finish_reason, c.text) for c in group] for group in groups]


def test_shapes_and_reasons(wanted, asked, tokenizer):
    assert [len(group) for group in wanted] == [3] * len(asked)
    reasons = set()
    for completion in (c for group in wanted for c in group):
        n = len(completion.ids)
        assert 1 <= n <= 24
        assert len(completion.logprobs) == len(completion.raw_logprobs) == n
        assert completion.forced == [False] * n
        ended = completion.ids[-1] in tiny.END_IDS
        assert not set(completion.ids[:-1]) & set(tiny.END_IDS)
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or n == 24
        assert completion.text == tokenizer.decode(completion.ids[: n - ended])
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def test_samples_of_a_group_differ(wanted):
    assert sum(len({tuple(c.ids) for c in group}) == 3 for group in wanted) > 30


def recomputed(model, asked, groups, temperature):
    """Log-probs of all completion tokens by the training forward."""
    samples = [
        packing.Sample(prompt, c.ids, {"logp": c.logprobs, "raw": c.raw_logprobs})
        for prompt, group in zip(asked, groups)
        for c in group
    ]
    batch = packing.join(samples, "cpu")
    with torch.no_grad():
        hidden = model(batch.ids, batch.cu_seqlens)[batch.rows]
        return kernels.logprob(hidden, model.head, batch.targets, temperature)[0], batch.values


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probs_equal_the_training_forward(random_engine, asked, temperature):
    """Those of the sampled distribution and the raw ones, to 1e-4 in fp32."""
    params = SamplingParams(n=3, temperature=temperature, max_tokens=24, seed=6)
    groups = random_engine.generate(asked, params)
    logp, values = recomputed(random_engine.model, asked, groups, temperature)
    assert (logp - values["logp"]).abs().max() < 1e-4
    raw, _ = recomputed(random_engine.model, asked, groups, 1.0)
    assert (raw - values["raw"]).abs().max() < 1e-4
    assert (values["raw"] - values["logp"]).abs().max() > 0.1  # they are not the same thing


def test_log_probs_of_the_trained_toy_base(toy_base):
    rng = toy.stream_rng("logp")
    asked = [prompts.judge_prompt(toy_base.tokenizer, c.query, a, b, "toy")
             for c, a, b, _ in (toy.draw_pair(rng, 2 + i % 5) for i in range(16))]  # fmt: skip
    params = SamplingParams(n=2, temperature=0.7, max_tokens=64)
    logp, values = recomputed(toy_base.model, asked, toy_base.generate(asked, params), 0.7)
    assert (logp - values["logp"]).abs().max() < 1e-4


def test_alone_equals_among_others(random_engine, asked, wanted):
    for i in (0, 3, 7, 20, 39):
        alone = random_engine.generate([asked[i]], MIXED)
        assert as_tuples(alone) == as_tuples(wanted[i : i + 1])


def test_order_of_requests_does_not_matter(random_engine, asked, wanted):
    assert as_tuples(random_engine.generate(asked[::-1], MIXED)) == as_tuples(wanted[::-1])


@pytest.mark.parametrize("size", [1, 4, 16])
def test_block_size_does_not_matter(tokenizer, random_engine, asked, wanted, size):
    engine = tiny.engine(tokenizer, random_engine.model, block_size=size, num_blocks=8192 // size)
    assert as_tuples(engine.generate(asked, MIXED)) == as_tuples(wanted)
    assert leaks(engine) == 0


@pytest.mark.parametrize(
    "limits",
    [
        {"max_batch": 2},
        {"max_batch": 5},
        {"max_step_tokens": 1},
        {"max_step_tokens": 50},
        {"max_step_tokens": 50, "chunked_prefill": False},
        {"prefix_cache": False},
    ],
    ids=str,
)
def test_limits_do_not_matter(tokenizer, random_engine, asked, wanted, limits):
    engine = tiny.engine(tokenizer, random_engine.model, block_size=4, **limits)
    assert as_tuples(engine.generate(asked, MIXED)) == as_tuples(wanted)


@pytest.mark.parametrize(("size", "blocks"), [(4, 17), (4, 30), (1, 70), (16, 6)])
def test_preemption_does_not_matter(tokenizer, random_engine, asked, wanted, size, blocks):
    """A pool that one or two sequences fill: most are thrown out and computed again."""
    engine = tiny.engine(tokenizer, random_engine.model, block_size=size, num_blocks=blocks)
    groups = engine.generate(asked, MIXED)
    assert engine.stats["preemptions"] > 0
    assert as_tuples(groups) == as_tuples(wanted)
    for got, right in zip((c for g in groups for c in g), (c for g in wanted for c in g)):
        assert got.logprobs == pytest.approx(right.logprobs, abs=1e-4)
        assert got.raw_logprobs == pytest.approx(right.raw_logprobs, abs=1e-4)
        assert got.think_tokens == right.think_tokens and got.forced == right.forced
    assert leaks(engine) == 0


def test_preemption_keeps_the_think_budget(tokenizer, random_engine):
    asked = [[*prompt, THINK] for prompt in tiny.prompts(12, 5, 20, seed=9)]
    params = SamplingParams(n=2, max_tokens=20, max_think_tokens=9, seed=1, stop_token_ids=())
    right = random_engine.generate(asked, params)
    engine = tiny.engine(tokenizer, random_engine.model, block_size=2, num_blocks=25)
    groups = engine.generate(asked, params)
    assert engine.stats["preemptions"] > 0
    for got, want in zip((c for g in groups for c in g), (c for g in right for c in g)):
        assert (got.ids, got.forced, got.think_tokens) == (want.ids, want.forced, want.think_tokens)


def test_a_group_of_eight_begins_with_the_group_of_one(random_engine, asked):
    """By index: sample j does not know how many others there are."""
    eight = random_engine.generate(asked[:10], SamplingParams(n=8, max_tokens=16, seed=2))
    two = random_engine.generate(asked[:10], SamplingParams(n=2, max_tokens=16, seed=2))
    one = random_engine.generate(asked[:10], SamplingParams(n=1, max_tokens=16, seed=2))
    for g8, g2, g1 in zip(as_tuples(eight), as_tuples(two), as_tuples(one)):
        assert g8[:2] == g2 and g8[:1] == g1


def test_seed_matters_and_repeats(random_engine, asked, wanted):
    again = random_engine.generate(asked, MIXED)
    assert as_tuples(again) == as_tuples(wanted)
    other = random_engine.generate(
        asked, SamplingParams(n=3, temperature=0.7, max_tokens=24, seed=6)
    )
    assert as_tuples(other) != as_tuples(wanted)


def test_weights_changed_means_nothing_stale(tokenizer, asked):
    """The same engine after an update equals a new engine on the updated weights."""
    model = random_model()
    engine = tiny.engine(tokenizer, model)
    before = as_tuples(engine.generate(asked, MIXED))
    tiny.randomise(model, seed=1)
    after = as_tuples(engine.generate(asked, MIXED))
    assert after != before
    fresh = tiny.engine(tokenizer, random_model(seed=1))
    assert after == as_tuples(fresh.generate(asked, MIXED))


def test_no_block_leaks(random_engine, asked):
    random_engine.generate(asked, MIXED)
    assert leaks(random_engine) == 0
    assert random_engine.scheduler.pool.owners == [0] * len(random_engine.scheduler.pool.owners)


@pytest.mark.parametrize("call", [5, 12])
def test_no_block_leaks_when_decoding_raises(tokenizer, asked, wanted, monkeypatch, call):
    engine = tiny.engine(tokenizer, random_model(), block_size=4)
    usual, calls = engine.model.forward_cached, []

    def fails(*args, **kwargs):
        calls.append(0)
        if len(calls) == call:
            raise RuntimeError("out of memory")
        return usual(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward_cached", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(asked, MIXED)
    assert leaks(engine) == 0
    assert as_tuples(engine.generate(asked, MIXED)) == as_tuples(wanted)  # and it works on


def test_greedy_equals_transformers(tmp_path, tokenizer):
    """20 prompts of mixed lengths, one batch here, one by one there."""
    shape = Qwen2Config(
        vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 321.0}, tie_word_embeddings=False,
        eos_token_id=tiny.END_IDS, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    theirs = tiny.randomise(Qwen2ForCausalLM(shape), seed=3).eval()
    theirs.generation_config.eos_token_id = tiny.END_IDS
    theirs.save_pretrained(tmp_path / "hf")
    engine = tiny.engine(tokenizer, Transformer.from_pretrained(tmp_path / "hf"), block_size=4)
    asked = tiny.prompts(20, seed=4)
    ours = engine.generate(asked, SamplingParams(temperature=0, max_tokens=16))
    reasons = set()
    for prompt, (completion,) in zip(asked, ours):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16
        )
        assert completion.ids == out[0, len(prompt) :].tolist()
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def test_pad_equal_to_eos_does_not_hide_the_end(tmp_path, tokenizer):
    """The trap: a mask made from token values drops the end token, and the model never learns to
    stop. Prompts hold the token too, as chat templates do."""
    eos = 11
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            pad_token_id=eos, eos_token_id=eos, tie_word_embeddings=True,
        )
    )  # fmt: skip
    tiny.randomise(theirs, seed=8).save_pretrained(tmp_path / "hf")
    model = Transformer.from_pretrained(tmp_path / "hf")
    engine = tiny.engine(tokenizer, model)
    asked = [[eos, 5, 6, eos, 7 + i] for i in range(30)]
    groups = engine.generate(asked, SamplingParams(n=4, temperature=2.0, max_tokens=60))
    stopped = [c for g in groups for c in g if c.finish_reason == "stop"]
    assert len(stopped) > 5
    for completion in stopped:
        assert completion.ids.count(eos) == 1 and completion.ids[-1] == eos
        assert completion.forced[-1] is False
        assert completion.text == tokenizer.decode(completion.ids[:-1])


# -- thinking


def test_budget_closes_the_thinking(random_engine, asked):
    """</think> at exactly the budget, marked as forced, and the answer goes on after it."""
    thinking = [[*prompt, THINK] for prompt in asked]
    params = SamplingParams(n=2, max_tokens=20, max_think_tokens=6, stop_token_ids=(), seed=3)
    closed_early = reopened = 0
    for completion in (c for g in random_engine.generate(thinking, params) for c in g):
        if THINK in completion.ids:  # a random model may open it again
            reopened += 1
            continue
        at = completion.ids.index(END_THINK)
        assert len(completion.ids) == 20
        if at == 6:
            assert completion.forced == [i == 6 for i in range(20)]
            assert completion.logprobs[6] == 0.0 and completion.raw_logprobs[6] < 0
        else:
            closed_early += 1
            assert at < 6 and not any(completion.forced)
        assert completion.think_tokens == at
    assert closed_early < 20 and reopened < 20


def test_budget_is_not_spent_where_nothing_is_thought(random_engine, asked):
    params = SamplingParams(n=2, max_tokens=20, max_think_tokens=0, stop_token_ids=(), seed=3)
    closed = [[*prompt, THINK, END_THINK] for prompt in asked[:20]]
    for completion in (c for g in random_engine.generate(closed, params) for c in g):
        reopened = THINK in completion.ids
        assert reopened or (not any(completion.forced) and completion.think_tokens == 0)


def test_budget_of_zero_closes_at_once(random_engine, asked):
    params = SamplingParams(max_tokens=5, max_think_tokens=0, stop_token_ids=(), seed=3)
    groups = random_engine.generate([[*prompt, THINK] for prompt in asked], params)
    for (completion,) in groups:
        assert completion.ids[0] == END_THINK and completion.forced[0]
        assert completion.think_tokens == 0
        assert THINK in completion.ids or not any(completion.forced[1:])


def test_tokens_before_the_budget_are_those_without_one(random_engine, asked):
    thinking = [[*prompt, THINK] for prompt in asked]
    free = random_engine.generate(thinking, SamplingParams(max_tokens=20, stop_token_ids=()))
    params = SamplingParams(max_tokens=20, max_think_tokens=6, stop_token_ids=())
    for (a,), (b,) in zip(free, random_engine.generate(thinking, params)):
        assert a.ids[:6] == b.ids[:6]


def test_log_probs_after_a_forced_token_are_those_of_the_training_forward(random_engine, asked):
    thinking = [[*prompt, THINK] for prompt in asked]
    params = SamplingParams(max_tokens=20, max_think_tokens=6, stop_token_ids=())
    groups = random_engine.generate(thinking, params)
    logp, values = recomputed(random_engine.model, thinking, groups, 1.0)
    sampled = torch.tensor([not f for (c,) in groups for f in c.forced])
    assert (logp - values["logp"])[sampled].abs().max() < 1e-4


def test_thinking_opened_by_the_model_is_counted(tokenizer, monkeypatch):
    """Models whose prompt does not open the thinking write <think> themselves."""
    script = [65, THINK, 66, 67, 68, END_THINK, 69, 70]

    def scripted(logits, params, stream, position, forced=None, allowed=None):
        ids = torch.tensor([script[int(position[0]) - 3]])  # the prompt has 3 tokens
        if forced is not None:
            ids = torch.where(forced >= 0, forced, ids)
        return ids, torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr("nanorrm.engine.batch.draw", scripted)
    engine = tiny.engine(tokenizer, tiny.model())
    free = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=8))[0][0]
    assert free.ids == script and free.think_tokens == 3
    params = SamplingParams(max_tokens=8, max_think_tokens=2)
    short = engine.generate([[1, 2, 3]], params)[0][0]
    assert short.ids[:5] == [65, THINK, 66, 67, END_THINK]
    assert short.forced == [i == 4 for i in range(8)] and short.think_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ([1, 8, 2], True),
        ([8], True),
        ([8, 1, 9, 2], False),
        ([8, 9, 8], True),
        ([1, 2], False),
        ([], False),
        ([9], False),
    ],
)
def test_a_row_starts_inside_the_thinking_its_prompt_left_open(prompt, inside):
    s = Sequence(prompt, SamplingParams(), request=0, sample=0)
    assert s.started(8, 9).thinking is inside
    assert s.started(None, None).thinking is False


# -- how completions end


def test_stop_strings_end_and_are_cut(toy_base):
    """`=` ends at the first sum; the text is what stood before it."""
    chains = [toy.draw_chain(toy.stream_rng("stop", i), 4) for i in range(8)]
    asked = [toy_base.tokenizer.encode_template(prompts.toy_solve(c.query)) for c in chains]
    whole = toy_base.generate(asked, SamplingParams(temperature=0, max_tokens=48))
    cut = toy_base.generate(asked, SamplingParams(temperature=0, max_tokens=48, stop=("=", "zz")))
    for (a,), (b,) in zip(whole, cut):
        assert "=" in a.text and b.text == a.text.split("=")[0]
        assert b.finish_reason == "stop"
        assert b.ids == a.ids[: len(b.ids)] and toy_base.tokenizer.decode(b.ids).endswith("=")
    several = toy_base.generate(
        asked, SamplingParams(temperature=0, max_tokens=48, stop=("</think>", ","))
    )
    for (a,), (b,) in zip(whole, several):
        assert b.text == a.text.split(",")[0].split("</think>")[0]


def test_stop_token_ids_replace_the_model_s_own(random_engine, asked):
    params = SamplingParams(max_tokens=24, temperature=0.7, n=3, seed=5, stop_token_ids=(70, 80))
    seen = set()
    for completion in (c for g in random_engine.generate(asked, params) for c in g):
        ended = completion.ids[-1] in (70, 80)
        assert not {70, 80} & set(completion.ids[:-1])
        assert completion.finish_reason == ("stop" if ended else "length")
        seen |= set(completion.ids[:-1])
    assert seen & set(tiny.END_IDS)  # they no longer end anything


@pytest.mark.parametrize("n", [1, 7])
def test_max_tokens(random_engine, asked, n):
    params = SamplingParams(max_tokens=n, stop_token_ids=())
    for (completion,) in random_engine.generate(asked, params):
        assert len(completion.ids) == n and completion.finish_reason == "length"


def test_end_token_as_the_last_one_allowed_is_a_stop(random_engine, asked, wanted):
    """finish_reason looks at the token, not at the length."""
    at = next(i for i, g in enumerate(wanted) if g[0].finish_reason == "stop")
    n = len(wanted[at][0].ids)
    params = SamplingParams(n=1, temperature=0.7, max_tokens=n, seed=5)
    assert random_engine.generate([asked[at]], params)[0][0].finish_reason == "stop"


def test_no_prompts_no_completions(random_engine):
    assert random_engine.generate([], MIXED) == []


@pytest.mark.parametrize(
    ("bad", "max_tokens", "words"),
    [
        ([], 8, ["request 1", "empty"]),
        ([1] * 121, 8, ["request 1", "121", "8", "128"]),
        ([1] * 60, 8, ["request 1", "60", "8", "64 tokens"]),
    ],
    ids=["empty", "beyond-context", "beyond-pool"],
)
def test_what_never_fits_is_refused_before_anything_runs(tokenizer, bad, max_tokens, words):
    engine = tiny.engine(
        tokenizer, random_model(), block_size=4, num_blocks=16 if len(bad) == 60 else 99
    )
    before = dict(engine.stats)
    with pytest.raises(UserError) as caught:
        engine.generate([[1, 2], bad], SamplingParams(max_tokens=max_tokens))
    for word in words:
        assert word in str(caught.value)
    assert engine.stats == before and leaks(engine) == 0


def test_what_just_fits_is_served(tokenizer):
    engine = tiny.engine(tokenizer, random_model(), block_size=4, num_blocks=32)
    params = SamplingParams(n=2, max_tokens=8, stop_token_ids=())
    assert all(len(c.ids) == 8 for c in engine.generate([[1] * 120], params)[0])
    assert leaks(engine) == 0


def test_a_group_computes_its_prompt_once(tokenizer):
    engine = tiny.engine(tokenizer, random_model())
    engine.generate([[1, 2, 3, 4, 5]], SamplingParams(n=8, max_tokens=4, stop_token_ids=()))
    assert engine.stats["prompt_tokens"] == 5 and engine.stats["new_tokens"] == 32


def test_log_probs_can_be_left_out(random_engine, asked, wanted):
    params = SamplingParams(n=3, temperature=0.7, max_tokens=24, seed=5, logprobs=False)
    groups = random_engine.generate(asked, params)
    assert as_tuples(groups) == as_tuples(wanted)
    assert all(c.logprobs == c.raw_logprobs == [] for g in groups for c in g)
