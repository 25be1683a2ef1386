"""TRL's GRPOTrainer as the peer of a whole step, at settings that suit it and equal ours."""

import logging
import warnings
from contextlib import contextmanager
from importlib.util import find_spec

from nanorrm.bench.tools import Clock


def installed():
    """Whether TRL is here."""
    return find_spec("trl") is not None


@contextmanager
def quiet():
    """Without their advice, and warnings of their own making."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


class TRLSteps:
    """A TRL trainer on a model folder, whose steps are timed one by one.

    run: JudgeConfig (model, prompts, group, max_tokens, learning_rate); texts: the prompts;
    reward(list of ids) -> floats; micro: completions per forward and backward pass. No vLLM, no
    evaluation, no reports, no activation checkpoints; fp32 on a CPU, bf16 on a GPU.
    """

    def __init__(self, run, texts, reward, micro, device, steps):
        from datasets import Dataset
        from transformers import PreTrainedTokenizerFast, PrinterCallback
        from trl import GRPOConfig, GRPOTrainer

        self.micro, self.steps, self.clock, self.lengths = micro, [], Clock(device), []

        def scored(completion_ids, **_):
            self.lengths = [len(ids) for ids in completion_ids]
            return reward(completion_ids)

        with quiet():
            config = GRPOConfig(
                output_dir=run.model,
                max_steps=steps,
                learning_rate=run.learning_rate,
                lr_scheduler_type="constant",
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=run.prompts * run.group // micro,
                num_generations=run.group,
                max_completion_length=run.max_tokens,
                temperature=run.temperature,
                beta=0.0,
                loss_type="dapo",  # the mean over all tokens of the step, as our default
                shuffle_dataset=False,
                use_cpu=device == "cpu",
                bf16=device == "cuda",
                gradient_checkpointing=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                model_init_kwargs={"dtype": "float32"},
            )
            self.trainer = GRPOTrainer(
                model=run.model,
                reward_funcs=scored,
                args=config,
                train_dataset=Dataset.from_dict({"prompt": texts * steps}),
                processing_class=PreTrainedTokenizerFast.from_pretrained(run.model),
            )
        self.trainer.remove_callback(PrinterCallback)
        for method, name in {
            "_generate_single_turn": "rollout",
            "_calculate_rewards": "reward",
            "_get_per_token_logps_and_entropies": "log-prob",
            "_prepare_inputs": "other",  # padding, decoding, shuffling, its own statistics
        }.items():
            self.clock.watch(self.trainer, method, name)

    def run(self, between=lambda: None):
        """All steps; `between` is called after each, off the clock."""
        from transformers import TrainerCallback

        steps, clock = self, self.clock

        class Timer(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if not clock.open:
                    clock.turn("update")

            def on_step_end(self, args, state, control, **_):
                clock.turn()
                steps.steps.append({"parts": clock.read(), "lengths": steps.lengths})
                between()

        self.trainer.add_callback(Timer())
        with quiet():
            self.trainer.train()
