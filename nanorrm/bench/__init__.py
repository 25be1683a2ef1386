"""Speed and memory: the engine, the judge and a training step beside their peers."""
