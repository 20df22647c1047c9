"""What a training was, as its row tells it: enough to see which runs differ in the seed alone."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Options that say nothing about the weights that come out, or are told by themselves.
_FREE = set(
    "ckpt experiment hydra logger output_dir paths progress results seed test_start threads "
    "weights".split()
)
_FREE_IN = {
    "callbacks": {"progress"},
    "data": {"download", "eval_batch_size", "num_workers", "pin_memory", "root"},
    "reducer": {"seed"},
    "trainer": {"accelerator", "default_root_dir", "deterministic", "log_every_n_steps"}
    | {"enable_checkpointing", "enable_model_summary", "enable_progress_bar"},
}
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "fast_dev_run")


def training_of(cfg: DictConfig) -> dict[str, Any]:
    """Returns the field `training` of a row.

    Args:
        cfg: configs/train.yaml, composed, with the choices that the run has made.
    """
    from omegaconf import OmegaConf

    # Unresolved: what follows from the seed or the folder of a run is no difference.
    found: Any = OmegaConf.to_container(cfg, resolve=False)
    kept = {
        key: {k: v for k, v in value.items() if k not in _FREE_IN.get(key, ())}
        if isinstance(value, dict)
        else value
        for key, value in found.items()
        if key not in _FREE
    }
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
    backbone = cfg.get("backbone")
    pretrained = bool(backbone is not None and backbone.get("pretrained"))
    weights = cfg.get("weights")
    return {
        "epochs": cfg.trainer.get("max_epochs"),
        "start": str(weights) if weights else "pretrained" if pretrained else "scratch",
        "start_sha": _sha(weights),
        "partial": any(bool(cfg.trainer.get(name)) for name in _LIMITS),
        "options": digest[:10],
    }


def _sha(weights: Any) -> str | None:
    from zoo.checkpoint import weights_sha256

    return None if weights is None else weights_sha256(str(weights))
