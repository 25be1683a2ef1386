"""What training and judging ask of the engine beyond plain generation."""

import copy
import os
import subprocess
import sys

import pytest
import tiny
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from nanorrm import ranks
from nanorrm.config import EngineConfig, UserError
from nanorrm.data import toy
from nanorrm.engine.engine import Engine
from nanorrm.engine.sampling import SamplingParams
from nanorrm.judge import prompts as templates
from nanorrm.judge import verdict
from nanorrm.model.transformer import Transformer

SHAPE = {
    "vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160,
    "rope_parameters": {"rope_type": "default", "rope_theta": 321.0},
    "eos_token_id": tiny.END_IDS, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip


def checkpoint(kind, folder):
    """A random transformers model written to a folder; Qwen3 with heads wider than C / Hq."""
    if kind == "qwen2":
        theirs = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False))
    else:
        theirs = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True))
    theirs = tiny.randomise(theirs, seed=3).eval()
    theirs.generation_config.eos_token_id = tiny.END_IDS
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_greedy_equals_transformers_for_100_prompts(tmp_path, tokenizer, kind):
    """Token for token, and the log-probs to 1e-4."""
    theirs = checkpoint(kind, tmp_path / "hf")
    engine = tiny.engine(tokenizer, Transformer.from_pretrained(tmp_path / "hf"), block_size=4)
    asked = tiny.prompts(100, high=60, seed=4)
    ours = engine.generate(asked, SamplingParams(temperature=0, max_tokens=12))
    for prompt, (completion,) in zip(asked, ours):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )[0].tolist()
        assert completion.ids == out[len(prompt) :]
    with torch.no_grad():
        for prompt, (completion,) in list(zip(asked, ours))[:20]:
            logits = theirs(torch.tensor([prompt + completion.ids])).logits[0]
            logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            wanted = logp.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            assert (wanted - torch.tensor(completion.logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_saved_models_open_in_transformers(tmp_path, kind):
    theirs = checkpoint(kind, tmp_path / "hf")
    Transformer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    ids = torch.tensor(tiny.prompts(1, low=30, seed=1))
    with torch.no_grad():
        assert (again(ids).logits - theirs(ids).logits).abs().max() < 1e-5


def ids_of(groups):
    """Ids alone: log-probs differ in their last digits with the batch they were computed in."""
    return [[(c.ids, c.forced, c.finish_reason) for c in group] for group in groups]


def test_a_prefix_is_computed_once(tokenizer):
    """The second request reads the first one's blocks, and its answer is the same as without."""
    model = tiny.model()
    engine = tiny.engine(tokenizer, model, block_size=4)
    prompt = tiny.prompts(1, low=30, high=31)[0]
    params = SamplingParams(n=2, max_tokens=8, seed=1)
    first = ids_of(engine.generate([prompt], params))
    engine.report()
    assert ids_of(engine.generate([prompt], params)) == first
    work = engine.report()
    assert work["engine/cache_hit_rate"] == 28 / 30  # all full blocks; the last tokens are computed
    # a prompt wholly in the cache still computes its last token
    plain = tiny.engine(tokenizer, model, prefix_cache=False)
    again = engine.generate([prompt[:8]], params)
    assert ids_of(again) == ids_of(plain.generate([prompt[:8]], params))


def test_sync_copies_weights_and_forgets_prefixes(tokenizer):
    engine, other = tiny.engine(tokenizer, tiny.model(0), block_size=4), tiny.model(1)
    asked = tiny.prompts(8, low=12)
    params = SamplingParams(max_tokens=20)
    engine.generate(asked, params)
    engine.sync(other)
    assert engine.scheduler.pool.find([n for n in engine.scheduler.pool.names if n]) == []
    fresh = tiny.engine(tokenizer, other)
    assert ids_of(engine.generate(asked, params)) == ids_of(fresh.generate(asked, params))


def test_sleep_gives_the_cache_back_and_wake_takes_it_again(tokenizer):
    engine = tiny.engine(tokenizer, tiny.model())
    asked = tiny.prompts(5)
    before = engine.generate(asked, SamplingParams(max_tokens=20))
    engine.sleep()
    assert engine.cache is None
    engine.wake()
    assert engine.generate(asked, SamplingParams(max_tokens=20)) == before


def test_requests_may_differ_in_number_lengths_and_seed(tokenizer):
    engine, asked = tiny.engine(tokenizer, tiny.model()), tiny.prompts(4)
    each = [SamplingParams(n=i + 1, max_tokens=3 + i, seed=i) for i in range(4)]
    together = engine.generate(asked, each)
    assert ids_of(together) == ids_of([engine.generate([p], q)[0] for p, q in zip(asked, each)])
    with pytest.raises(UserError, match="n, lengths and seed only"):
        engine.generate(
            asked[:2], [SamplingParams(max_tokens=9), SamplingParams(max_tokens=9, top_k=3)]
        )
    assert not engine.unfinished and engine.scheduler.pool.free == len(engine.scheduler.pool)


def test_abort_returns_what_there_is(tokenizer):
    engine = tiny.engine(tokenizer, tiny.model())
    wanted = engine.generate([[1, 2, 3]], SamplingParams(n=2, max_tokens=9, stop_token_ids=()))[0]
    number = engine.add([1, 2, 3], SamplingParams(n=2, max_tokens=9, stop_token_ids=()))
    for _ in range(4):
        assert engine.step() == []
    stopped = {sample: c for _, sample, c in engine.abort(number)}
    assert not engine.unfinished and engine.scheduler.pool.free == len(engine.scheduler.pool)
    for sample, completion in stopped.items():
        assert completion.finish_reason == "abort"
        assert completion.ids == wanted[sample].ids[:4]


def test_answer_slots_force_a_readable_verdict(toy_base):
    """After </think> only a verdict may stand, then the end; the choice is the model's own."""
    tok = toy_base.tokenizer
    verdicts = tuple(tok.token_id(verdict.verdict_text(i)) for i in (1, 2))
    end = tok.token_id(toy.END)
    hard = [toy.draw_pair(toy.stream_rng("slots", i), 6) for i in range(20)]
    asked = [templates.judge_prompt(tok, c.query, a, b, "toy") for c, a, b, _ in hard]
    params = SamplingParams(temperature=3.0, max_tokens=40, max_think_tokens=10, n=2, seed=1)
    loose = [c for group in toy_base.generate(asked, params) for c in group]
    assert any(verdict.parse_verdict(c.text) is None for c in loose)
    slots = SamplingParams(**{**vars(params), "answer_slots": (verdicts, (end,))})
    for group in toy_base.generate(asked, slots):
        for completion in group:
            assert verdict.parse_verdict(completion.text) in (1, 2)
            assert completion.forced[-1] and not completion.forced[-2]  # the end; the verdict
            assert completion.ids[-1] == end and -3 < completion.logprobs[-2] < 0


def test_fused_head_draws_from_the_same_distribution(toy_base):
    """Other noise, so other samples, but log-probs that the training forward agrees with."""
    fused = Engine(
        toy_base.model, toy_base.tokenizer, EngineConfig(num_blocks=512, fused_head=True)
    )
    asked = [toy_base.tokenizer.encode_template(templates.toy_solve("7+8-5+8"))]
    params = SamplingParams(n=64, max_tokens=40, max_think_tokens=12)
    ours, plain = fused.generate(asked, params)[0], toy_base.generate(asked, params)[0]
    assert {c.text for c in ours} & {c.text for c in plain}
    for completion in ours[:8]:
        ids = torch.tensor(asked[0] + completion.ids)
        with torch.no_grad():
            hidden = toy_base.model(ids, torch.tensor([0, len(ids)]))[len(asked[0]) - 1 : -1]
            logp = (hidden @ toy_base.model.head.T).log_softmax(-1)
        wanted = logp.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        drawn = ~torch.tensor(completion.forced)
        gap = (wanted - torch.tensor(completion.logprobs))[drawn]
        assert gap.abs().max() < 1e-4
        assert completion.logprobs[12] == 0 and completion.forced[12]


def test_a_rank_shared_engine_is_an_engine_that_can_be_copied(tokenizer):
    """It says what it passes on: a forwarded __getattr__ asks itself before it has an engine."""
    engine = tiny.engine(tokenizer, tiny.model())
    asked, params = tiny.prompts(3), SamplingParams(n=2, max_tokens=6)
    wanted = engine.generate(asked, params)
    shared = ranks.RankSharedEngine(engine)
    for one in (shared, copy.copy(shared), copy.deepcopy(shared)):
        assert one.generate(asked, params) == wanted
        assert one.refusal([], params) == engine.refusal([], params)
        assert one.report()["engine/steps"] > 0
        one.sync()
        one.sleep()
        assert one.engine.cache is None
        one.wake()
        assert (one.tokenizer.think_ids, one.config) == (tokenizer.think_ids, engine.config)
    assert copy.copy(shared).model is engine.model and one.model is one.engine.model
    assert not hasattr(shared, "nonsense")


def test_on_step_hears_what_each_step_finished(tokenizer):
    engine, heard = tiny.engine(tokenizer, tiny.model()), []
    engine.on_step = heard.append
    engine.generate(tiny.prompts(3), SamplingParams(max_tokens=6))
    assert len(heard) == engine.stats["steps"] and sum(map(len, heard)) == 3


RANKS = """
import json, sys, torch
torch.set_num_threads(1)
sys.path[:0] = [{root!r}, {tests!r}]
import tiny
from nanorrm import ranks
from nanorrm.data import toy
from nanorrm.engine.sampling import SamplingParams
ranks.init()
engine, heard = tiny.engine(toy.make_tokenizer(), tiny.model()), []
shared = ranks.RankSharedEngine(engine)
params = SamplingParams(n=3, max_tokens=10, seed=4)
out = shared.generate(tiny.prompts(21), params, None, lambda *done: heard.append(done))
assert heard == [(i, j, c) for i, group in enumerate(out) for j, c in enumerate(group)]
if ranks.rank() == 0:
    ids = [[c.ids for c in group] for group in out]
    print(json.dumps([ranks.world_size(), engine.requests, ids]))
ranks.finish()
"""


def test_two_ranks_give_what_one_gives(tmp_path, root, tokenizer):
    import json

    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(root), tests=str(root / "tests")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr[:3000]
    ranks, mine, ids = json.loads(done.stdout.splitlines()[-1])
    assert ranks == 2 and mine == 11  # rank 0 computed its share only
    engine = tiny.engine(tokenizer, tiny.model())
    alone = engine.generate(tiny.prompts(21), SamplingParams(n=3, max_tokens=10, seed=4))
    assert ids == [[c.ids for c in group] for group in alone]
