"""Measure the engine, the training or the judge: `python -m nanorrm.bench engine | train | judge`;
`... memory` counts what fits which GPUs.

Everything runs in one process, peers included, so that the ratios mean something on a noisy
machine. The ceiling of the device is measured first.
"""

import sys

from nanorrm.bench.engine import EngineBench, bench_engine
from nanorrm.bench.estimate import MemoryTable, show_memory
from nanorrm.bench.judge import JudgeBench, bench_judge
from nanorrm.bench.train import TrainBench, bench_train
from nanorrm.cli import parse_command, run_script

COMMANDS = {
    "engine": (EngineBench, bench_engine),
    "train": (TrainBench, bench_train),
    "judge": (JudgeBench, bench_judge),
    "memory": (MemoryTable, show_memory),
}


def main():
    name, cfg = parse_command(COMMANDS, __doc__, sys.argv[1:])
    COMMANDS[name][1](cfg)


if __name__ == "__main__":
    run_script(main)
