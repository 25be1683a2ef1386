"""The judge: prompts, backends that generate, verdicts."""
