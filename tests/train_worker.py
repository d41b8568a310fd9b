"""One of the processes that tests/test_train.py starts with torchrun: an epoch, and what it left in each of them."""

import sys
from pathlib import Path

import torch
from rich.console import Console

from examples.train.config import load_config
from examples.train.data import read_sets
from examples.train.loop import Training
from examples.train.processes import join, leave


def main(folder: str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    config = load_config(Path(arguments[0]), arguments[1:])
    processes = join("cpu")
    training = Training("distilled", config, read_sets(config.data), processes, Console())
    training.begin(resume=False)
    run_batch, files = training._run_batch, []

    def run_and_note(batch, is_last):
        files.extend(batch.files)
        return run_batch(batch, is_last)

    training._run_batch = run_and_note
    training.run_epoch()
    weights = {name: value.detach() for name, value in training.module.named_parameters()}
    torch.save({"weights": weights, "files": files}, f"{folder}/{processes.rank}.pth")
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
