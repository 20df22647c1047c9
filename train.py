"""Trains or fine-tunes a model. `python train.py --help` shows every option."""

import sys

import hydra

from zoo.run.entry import guarded, job
from zoo.version import hydra_base


@hydra.main(**hydra_base(), config_path="configs", config_name="train")
def main(cfg):
    """Runs one training; torch and Lightning are imported inside."""
    return job("train", cfg)


if __name__ == "__main__":
    sys.exit(guarded(main, "train"))
