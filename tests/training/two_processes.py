"""What each of two processes does in test_distributed.py: trains from the start, and on from a save
of one process.

two_processes.py CONFIG FOLDER    with torchrun's variables in the environment
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: this file is run as a script

from config import load_config
from data.prepare import prepare
from training.distributed import join
from training.record import Record
from training.trainer import Trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone()
        for name, tensor in trainer.world.whole(trainer.tensors()["model"]).items()
    }


def main() -> None:
    torch.set_num_threads(1)
    config, folder = load_config(sys.argv[1]), Path(sys.argv[2])
    with join(config) as world:
        corpus = prepare(config, lambda line: None)
        results = {}
        for name in ("of two", "of one"):
            trainer = Trainer(config, Record(folder / name, quiet=True), corpus, world)
            if name == "of one":
                trainer.restore()
            losses = []
            while trainer.step < config.max_steps:
                losses.append(world.mean(trainer.take_step()[0]).item())
                if name == "of two" and trainer.step == config.max_steps // 2:
                    trainer.save()
            nats = trainer.validation_nats(torch.arange(200) % 90)
            results[name] = {"losses": losses, "weights": weights(trainer), "validation": nats}
            with trainer.average.in_place():
                results[name]["average"] = weights(trainer)
        if world.rank == 0:
            torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main()
