"""Our losses beside TRL's own code on the same tensors: values, gradients and metrics to 1e-6.

TRL's trainers run from their rewards to their loss on recorded completions: what generates, what
scores and the models are replaced by the numbers that both are given. TRL has no k1 and k2, no
other ddof and no soft penalty for length: tests/train/test_grpo.py has these written out.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorrm.config import LossConfig, UserError
from nanorrm.train.dpo import dpo_loss
from nanorrm.train.grpo import advantages, policy_loss, token_weights

pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.0")
from trl import DPOTrainer, GRPOTrainer

MAX_TOKENS = 9  # of a completion
PAD, END = 0, 1
LOSS_TYPES = {  # TRL's name -> ours
    "grpo": "sequence",
    "bnpo": "token",
    "dapo": "token",
    "dr_grpo": "constant",
}


class Accelerator:
    """One process."""

    device, num_processes, process_index, sync_gradients = torch.device("cpu"), 1, 0, True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def draw_rollouts(seed, groups=3, group=4):
    """Completions with the log-probs that sampler, trainer and reference gave their tokens."""
    g = torch.Generator().manual_seed(seed)
    n = groups * group
    lengths = torch.randint(1, MAX_TOKENS + 1, (n,), generator=g).tolist()
    ids = [torch.randint(2, 50, (length,), generator=g).tolist() for length in lengths]
    ended = (torch.rand(n, generator=g) < 0.6).tolist()
    for completion, end in zip(ids, ended):
        if end:
            completion[-1] = END
    trained = [(torch.rand(length, generator=g) < 0.8).long().tolist() for length in lengths]
    width = max(lengths)  # what lies beyond a completion's end is noise that must not count

    def noise(size):
        return size * torch.randn(n, width, generator=g)

    old = -torch.rand(n, width, generator=g) * 3 - 0.1
    return SimpleNamespace(
        groups=groups,
        group=group,
        lengths=lengths,
        ids=ids,
        truncated=[not end for end in ended],
        trained=trained,
        rewards=torch.randn(n, generator=g).round(decimals=1),
        old=old,
        logp=old + noise(0.3),
        sampler=old + noise(0.4),
        ref=old + noise(0.3),
        inside=torch.arange(width) < torch.tensor(lengths)[:, None],  # [B, T]
    )


class RecordedGRPO(GRPOTrainer):
    """TRL's trainer whose rollouts, rewards and log-probs have already happened."""

    def __init__(self, rollouts, loss_type, cfg, scale, forced):
        self.rollouts, self.forced = rollouts, forced
        self.logp = rollouts.logp.clone().requires_grad_()
        self.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
        self.ref_model = object()
        self.args = SimpleNamespace(
            per_device_train_batch_size=len(rollouts.ids),
            gradient_checkpointing_kwargs=None,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            delta=None,
            use_bias_correction_kl=False,
        )
        self.num_iterations = 2  # so that old and new log-probs differ
        self.accelerator, self.current_gradient_accumulation_steps = Accelerator(), 1
        self._tokenizer = SimpleNamespace(pad_token_id=PAD)
        self.eos_token_ids = [END]
        self.environment_factories = self.environments = self.tools = None
        self.pad_to_multiple_of = None
        self.num_generations = rollouts.group
        self.reward_func_names, self.reward_weights = ["recorded"], torch.ones(1)
        self.multi_objective_aggregation, self.scale_rewards = "sum_then_normalize", scale
        self.loss_type, self.max_completion_length = loss_type, MAX_TOKENS
        self.epsilon_low, self.epsilon_high = cfg.clip_low, cfg.clip_high
        self.beta = cfg.kl
        self.importance_sampling_level = "token"
        self.use_vllm = self.vllm_importance_sampling_correction = cfg.importance != "none"
        self.vllm_importance_sampling_mode = f"token_{cfg.importance}"
        self.vllm_importance_sampling_clip_min = cfg.importance_low
        self.vllm_importance_sampling_clip_max = cfg.importance_high
        self.mask_truncated_completions = cfg.skip_truncated
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.aux_loss_enabled = self._entropy_bonus_enabled = self.log_multimodal = False
        self._metrics = {"train": defaultdict(list)}
        self._logs = defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list))
        self._pending_extra_logs, self._pending_metrics = {}, {}

    def _generate(self, prompts):
        r = self.rollouts
        sampled = [row[:n] for row, n in zip(r.sampler.tolist(), r.lengths)]
        texts = ["" for _ in prompts]
        mask = r.trained if self.forced else None
        return [[5]] * len(prompts), r.ids, mask, texts, sampled, {}, None, []

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return self.rollouts.rewards[:, None]

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        if model is self.ref_model:
            return self.rollouts.ref, None, None
        if compute_entropy:  # the loss's own pass
            return self.logp, torch.ones_like(self.logp), None
        return self.rollouts.old, None, None

    def run(self):
        """(loss, its gradient by the log-probs [B, T], advantages [B], metrics)."""
        inputs = [{"prompt": "?"} for _ in self.rollouts.ids]
        batch = self._generate_and_score_completions(inputs)
        loss = self._compute_loss(self.model, batch)
        loss.backward()
        metrics = {name: values[0] for name, values in self._metrics["train"].items()}
        return loss.item(), self.logp.grad, batch["advantages"], metrics


def flat(rollouts, padded):
    """[B, T] -> [N], as the packed batches of nanorrm have it."""
    return padded[rollouts.inside]


def our_loss(r, loss_type, cfg, adv, forced):
    """(loss, its gradient [N], sums)."""
    mask = torch.ones(sum(r.lengths))
    if forced:
        mask = torch.tensor([float(t) for row in r.trained for t in row])
    cut = r.truncated if cfg.skip_truncated else None
    weight = token_weights(mask, r.lengths, LOSS_TYPES[loss_type], MAX_TOKENS, cut)
    logp = flat(r, r.logp).requires_grad_()
    adv = adv.repeat_interleave(torch.tensor(r.lengths))
    old, sampler, ref = (flat(r, x) for x in (r.old, r.sampler, r.ref))
    loss, sums = policy_loss(logp, old, sampler, adv, weight, cfg, ref)
    loss.backward()
    return loss.item(), logp.grad, sums


CONFIGS = st.builds(
    LossConfig,
    clip_low=st.sampled_from([0.2, 0.1]),
    clip_high=st.sampled_from([0.2, 0.28]),
    kl=st.sampled_from([0.0, 0.04, 1.0]),
    importance_low=st.sampled_from([0.0, 0.5, 0.9]),
    importance_high=st.sampled_from([1.1, 2.0]),
    skip_truncated=st.booleans(),
)


@pytest.mark.parametrize("importance", ["none", "truncate", "mask"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), cfg=CONFIGS, forced=st.booleans())
def test_policy_loss_is_trls(loss_type, importance, seed, cfg, forced):
    """Every switch that both have, one upon the other; the advantages are TRL's."""
    cfg = LossConfig(**{**vars(cfg), "importance": importance})
    r = draw_rollouts(seed)
    theirs, grad, adv, metrics = RecordedGRPO(r, loss_type, cfg, "group", forced).run()
    ours, our_grad, sums = our_loss(r, loss_type, cfg, adv, forced)
    assert ours == pytest.approx(theirs, abs=1e-6, rel=1e-6)
    torch.testing.assert_close(our_grad, flat(r, grad), atol=1e-6, rtol=1e-6)
    assert (grad[~r.inside] == 0).all()

    tokens = max(1, sums["tokens"].item())
    clipped = metrics["clip_ratio/region_mean"]
    assert sums["clip_ratio"].item() / tokens == pytest.approx(clipped, abs=1e-6)
    if cfg.kl:
        assert sums["kl"].item() / tokens == pytest.approx(metrics["kl"], abs=1e-6, rel=1e-5)
    if importance != "none":
        gap = metrics["sampling/sampling_logp_difference/max"]
        assert sums["sampler/logp_diff_max"].item() == pytest.approx(gap, abs=1e-6)


def test_the_numbers_above_put_every_switch_to_work():
    """Clipped, out of bounds, truncated, forced: all happen, and change TRL's loss."""
    r = draw_rollouts(0)
    plain = LossConfig()
    base = RecordedGRPO(r, "grpo", plain, "group", False).run()[0]
    changed = [
        RecordedGRPO(r, "grpo", LossConfig(**change), "group", False).run()[0]
        for change in (
            {"clip_low": 0.1},
            {"clip_high": 0.28},
            {"kl": 0.04},
            {"importance": "truncate"},
            {"importance": "mask", "importance_low": 0.9},
            {"skip_truncated": True},
        )
    ]
    changed += [RecordedGRPO(r, "grpo", plain, "group", True).run()[0]]
    changed += [RecordedGRPO(r, kind, plain, "group", False).run()[0] for kind in ("dapo", "bnpo")]
    changed += [RecordedGRPO(r, "dr_grpo", plain, "group", False).run()[0]]
    assert all(abs(other - base) > 1e-4 for other in changed)
    assert changed[-2] == pytest.approx(changed[-3], abs=1e-6)  # both the mean over tokens


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), groups=st.integers(1, 4), group=st.integers(2, 6))
def test_advantages_are_trls(scale, seed, groups, group):
    """TRL adds 1e-4 to the std where we add 1e-6: undone, they are equal."""
    r = draw_rollouts(seed, groups, group)
    if seed % 3 == 0:
        r.rewards[:group] = 1.0  # a group that teaches nothing
    adv = RecordedGRPO(r, "grpo", LossConfig(), scale, False).run()[2].view(groups, group)
    rewards = r.rewards.view(groups, group)
    ours = advantages(rewards, scale)
    if scale != "none":
        std = rewards.std(1, keepdim=True) if scale == "group" else rewards.std()
        ours, adv = ours * (std + 1e-6), adv * (std + 1e-4)
    torch.testing.assert_close(ours, adv, atol=1e-6, rtol=1e-6)


# -- DPO


class RecordedDPO(DPOTrainer):
    """TRL's trainer whose models have already answered."""

    def __init__(self, pairs, beta, loss_type="sigmoid"):
        self.logp = pairs.logp.clone().requires_grad_()  # [2B, T]
        self.model, self.accelerator = SimpleNamespace(training=True), Accelerator()
        self.beta, self.loss_types, self.loss_weights = beta, [loss_type], [1.0]
        self.label_smoothing, self.f_divergence_type = 0.0, "reverse_kl"
        self.ld_alpha, self.precompute_ref_logps = None, True
        self.use_weighting = self.aux_loss_enabled = False
        self._metrics, self._total_train_tokens, self._tp_size = {"train": defaultdict(list)}, 0, 1
        self.mask = torch.cat([torch.zeros(len(pairs.mask), 1), pairs.mask], 1).long()
        self.inputs = {
            "input_ids": torch.zeros_like(self.mask),
            "attention_mask": torch.ones_like(self.mask),
            "completion_mask": self.mask,
            "ref_chosen_logps": pairs.ref[0],
            "ref_rejected_logps": pairs.ref[1],
        }

    def answer(self, labels, **kwargs):
        logp = self.logp * (labels[:, 1:] != -100)
        return SimpleNamespace(
            log_probs=logp,
            entropy=torch.zeros_like(logp),
            mean_logits=torch.zeros_like(logp),
            is_top1=logp > 0,
        )

    def run(self):
        """(loss, its gradient by the tokens' log-probs, metrics)."""
        loss = self._compute_loss(self.answer, self.inputs, return_outputs=False)
        loss.backward()
        return loss.item(), self.logp.grad, self._metrics["train"]


def draw_pairs(seed, n=5, width=7):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (2 * n, 1), generator=g)
    mask = (torch.arange(width) < lengths).float()
    logp = -3 * torch.rand(2 * n, width, generator=g)
    ref = (logp * mask).sum(1) + torch.randn(2 * n, generator=g) * 2
    return SimpleNamespace(logp=logp, mask=mask, ref=ref.chunk(2))


def our_dpo(pairs, beta, scale=1.0, **settings):
    """(loss, gradient [2B, T], rewards of the chosen and the rejected [B])."""
    logp = pairs.logp.clone().requires_grad_()
    chosen, rejected = ((logp * pairs.mask).sum(1) / scale).chunk(2)
    ref = (torch.cat(pairs.ref) / scale).chunk(2)
    loss, *rewards = dpo_loss(chosen, rejected, *ref, beta, **settings)
    assert loss.shape == chosen.shape
    loss.mean().backward()
    return loss.mean().item(), logp.grad, *rewards


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), beta=st.sampled_from([0.01, 0.1, 0.5, 2.0]))
def test_dpo_loss_is_trls(seed, beta):
    pairs = draw_pairs(seed)
    theirs, grad, metrics = RecordedDPO(pairs, beta).run()
    ours, our_grad, chosen, rejected = our_dpo(pairs, beta)
    assert ours == pytest.approx(theirs, abs=1e-6, rel=1e-6)
    torch.testing.assert_close(our_grad, grad, atol=1e-6, rtol=1e-6)
    assert not chosen.requires_grad and not rejected.requires_grad
    for name, value in {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
    }.items():
        assert value.item() == pytest.approx(metrics[name][0], abs=1e-6, rel=1e-5), name


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), smoothing=st.sampled_from([0.1, 0.3]))
def test_smoothed_dpo_is_trls_on_pairs_of_which_that_share_is_flipped(seed, smoothing):
    pairs = draw_pairs(seed)
    straight, grad, _ = RecordedDPO(pairs, 0.3).run()
    turned = SimpleNamespace(
        logp=pairs.logp.roll(5, 0), mask=pairs.mask.roll(5, 0), ref=pairs.ref[::-1]
    )
    flipped, turned_grad, _ = RecordedDPO(turned, 0.3).run()
    ours, our_grad, *_ = our_dpo(pairs, 0.3, label_smoothing=smoothing)
    wanted = (1 - smoothing) * straight + smoothing * flipped
    assert ours == pytest.approx(wanted, abs=1e-6, rel=1e-6)
    wanted = (1 - smoothing) * grad + smoothing * turned_grad.roll(5, 0)
    torch.testing.assert_close(our_grad, wanted, atol=1e-6, rtol=1e-6)


def test_dpo_settings_that_make_no_sense_are_named():
    x = torch.zeros(2)
    for wrong, message in (
        ({"beta": 0.0}, "beta = 0.0"),
        ({"beta": float("nan")}, "beta = nan"),
        ({"beta": 1.0, "label_smoothing": 0.5}, "label_smoothing = 0.5"),
    ):
        with pytest.raises(UserError, match=message):
            dpo_loss(x, x, x, x, **wrong)
