"""Measures a model: accuracy, FLOPs, throughput. `python eval.py --help` shows every option."""

import sys

import hydra

from zoo.run.entry import guarded, job
from zoo.version import hydra_base


@hydra.main(**hydra_base(), config_path="configs", config_name="eval")
def main(cfg):
    """Runs one evaluation; torch and timm are imported inside."""
    return job("eval", cfg)


if __name__ == "__main__":
    sys.exit(guarded(main, "eval"))
