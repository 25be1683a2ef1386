"""Training: rewards, GRPO, DPO, packing, the optimizer's step, training states."""
