"""The options of train.yaml, eval.yaml and their groups: what each may be.

A mapping stands for a group of options, a `Kind` for one. Arguments of reducers, schedules and
plugins are not here: their constructors know them, and their annotations (see `check`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Union

from zoo.run.schema.backbone import BACKBONE_ARGS, SIZE
from zoo.run.schema.kinds import (
    Kind,
    anything,
    built,
    choice,
    either,
    flag,
    interval,
    list_of,
    mapping,
    maybe,
    path,
    real,
    text,
    whole,
)

Options = Mapping[str, Union[Kind, "Options"]]

CONTROLS = ("dense", "resolution")
RELEVANCE = ("class", "crop")
ENGINES = ("torch", "compile", "onnxruntime", "openvino")

_SHARE = real(0, 1)
_POSITIVE = real(above=0)
_PIXEL, _SPREAD = real(-1e4, 1e4), real(above=0, high=1e4)  # of pixels from 0 to 1, or to 255
_PAIR = "[lowest, highest]"
_SEED = whole(0, 2**32 - 1)
_THREADS = maybe(whole(1, 1024))
_BATCH = whole(1, 2**20)
_DEVICE = text("auto, cpu, cuda, cuda:1 or mps", r"auto|cpu|mps|cuda(:\d+)?")
_WORDS = text()


_RUNTIME: Options = {
    "last_block": choice("full", "class_token"),
    "linear": choice("plain", "auto", "packed", "onednn"),
    "buckets": either(whole(1, 4), choice("auto")),
    "own_kernels": flag(),
}

_DATA: Options = {
    "name": _WORDS,
    "root": maybe(path()),
    "train_split": _WORDS,
    "val_split": _WORDS,
    "test_split": maybe(_WORDS),
    "num_classes": maybe(whole(1)),
    "class_map": maybe(either(path("a file"), mapping())),
    "class_order": maybe(choice("natural", "plain")),
    "match_names": flag(),
    "extensions": maybe(list_of(_WORDS, "a list of file name endings such as [jpg,png]")),
    "strict": flag(),
    "damaged": choice("skip", "fail"),
    "upright": flag(),
    "img_size": maybe(SIZE),
    "mean": maybe(either(_PIXEL, list_of(_PIXEL, "one number per channel", 1, 4))),
    "std": maybe(
        either(_SPREAD, list_of(_SPREAD, "one number above 0 per channel", 1, 4)),
    ),
    "interpolation": maybe(
        choice("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos", "random")
    ),
    "crop_pct": maybe(real(0.05, 1)),
    "crop_mode": maybe(choice("center", "squash", "border")),
    "batch_size": _BATCH,
    "eval_batch_size": maybe(_BATCH),
    "num_workers": maybe(whole(0, 1024)),
    "pin_memory": maybe(flag()),
    "drop_last": flag(),
    "download": flag(),
    "mirror": flag(),
    "options": {
        "size": either(whole(2, 4096), list_of(whole(2, 4096), "[height, width]", 2, 2)),
        "train_length": whole(1),
        "eval_length": whole(1),
        "least": whole(1),
        "smallest": whole(1),
        "input_key": _WORDS,
        "target_key": _WORDS,
    },
}

_AUGMENT: Options = {
    "scale": interval(real(above=0, high=1), f"{_PAIR} of numbers above 0 to 1"),
    "ratio": interval(_POSITIVE, f"{_PAIR} of numbers above 0"),
    "hflip": _SHARE,
    "vflip": _SHARE,
    "color_jitter": maybe(
        either(real(0), list_of(real(0), "three or four numbers from 0", 3, 4)),
    ),
    "auto_augment": maybe(
        text(
            "a policy of timm such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original",
            r"(rand|augmix)(-[a-z]+[\d.]+|-t)*|(original|originalr|v0|v0r|3a)(-mstd[\d.]+)?",
        )
    ),
    "re_prob": _SHARE,
    "re_mode": choice("const", "rand", "pixel"),
    "re_count": whole(1, 100),
    "affine": {
        "degrees": real(0, 180),
        "translate": _SHARE,
        "scale": real(0, below=1),
        "shear": real(0, below=90),
    },
    "mixup": {
        "mixup_alpha": real(0),
        "cutmix_alpha": real(0),
        "prob": _SHARE,
        "switch_prob": _SHARE,
    },
}

_OPTIM: Options = {
    "opt": _WORDS,
    "lr": _POSITIVE,
    "weight_decay": real(0),
    "layer_decay": maybe(real(above=0, high=1)),
    "fused": maybe(flag()),
    "lr_factors": maybe(mapping("a mapping {PATTERN: FACTOR} of numbers from 0", real(0))),
    "betas": list_of(real(0, below=1), "a list of two numbers from 0 below 1", 2, 3),
    "momentum": real(0, below=1),
    "eps": maybe(real(0)),
}

_LR_SCHEDULE: Options = {
    "warmup_epochs": real(0),
    "warmup_start": _SHARE,
    "decay": _SHARE,
    "final": _SHARE,
}

_LOSS: Options = {
    "label_smoothing": real(0, below=1),
    "smoothing": real(0, below=1),
    "target_threshold": maybe(_SHARE),
    "reduction": choice("mean", "sum"),
    "teacher": maybe(_WORDS),
    "tokens": whole(2, 2**20),
    "neighbours": whole(1, 2**20),
    "sigma": _POSITIVE,
    "order": choice("student", "teacher"),
    "temperature": list_of(_POSITIVE, "[at the start, at the end]", 2, 2),
    "inner_weight": real(0),
    "local_weight": real(0),
    "global_weight": real(0),
    "logit_weight": real(0),
    "logit_temperature": _POSITIVE,
}

_MODULE: Options = {
    "train_only": maybe(
        list_of(_WORDS, "a list of patterns of parameter names"),
    ),
    "weight": real(0),
    "unit": maybe(_POSITIVE),
    "granularity": whole(1),
    "uncompressed": maybe(list_of(whole(0), "a list of blocks, from 0", 0)),
    "warmup_epochs": whole(0),
    "share": real(above=0, below=1),
    "rate": _POSITIVE,
    "penalty": real(0),
    "images": whole(1),
    "objective": choice("kl", "features"),
    "evaluations": whole(1),
    "seconds": maybe(_POSITIVE),
    "seed": _SEED,
    "cache": maybe(path()),
}


def _never(value: object) -> bool:
    return False


_PART = maybe(either(whole(0), real(0, 1)))

_TRAINER: Options = {
    "max_epochs": maybe(either(whole(1), Kind("-1", lambda v: v == -1 and type(v) is int))),
    "max_steps": either(whole(1), Kind("-1", lambda v: v == -1 and type(v) is int)),
    "accelerator": choice("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "devices": either(
        whole(1),
        Kind("-1 or auto", lambda v: v in (-1, "-1", "auto") and not isinstance(v, float)),
        list_of(whole(0), "a list of device numbers"),
        text("numbers and commas", r"[1-9]\d*|\d+,|\d+(,\d+)+,?"),
    ),
    "strategy": either(_WORDS, built("a mapping with the _target_ of a strategy")),
    "precision": either(
        choice(
            *("64", "64-true", "32", "32-true", "16", "16-mixed", "16-true", "bf16"),
            *("bf16-mixed", "bf16-true", "transformer-engine", "transformer-engine-float16"),
        ),
        Kind("16, 32 or 64", lambda v: v in (16, 32, 64) and type(v) is int),
    ),
    "accumulate_grad_batches": whole(1),
    "gradient_clip_val": maybe(real(0)),
    "check_val_every_n_epoch": maybe(whole(1)),
    "limit_train_batches": _PART,
    "limit_val_batches": _PART,
    "limit_test_batches": maybe(either(whole(1), real(above=0, high=1))),
    "fast_dev_run": either(flag(), whole(0)),
    "deterministic": maybe(either(flag(), choice("warn"))),
    "log_every_n_steps": whole(1),
    "num_sanity_val_steps": whole(-1),
    "enable_progress_bar": flag(),
    "enable_model_summary": flag(),
    "default_root_dir": maybe(path()),
    "num_nodes": whole(1, 2**16),
    "min_epochs": maybe(whole(0)),
    "min_steps": maybe(whole(0)),
    "val_check_interval": maybe(either(whole(1), real(above=0, high=1))),
    "max_time": maybe(
        either(
            text("days:hours:minutes:seconds such as 00:12:00:00", r"\d{2,}:\d\d:\d\d:\d\d"),
            mapping("a mapping such as {hours: 12}", real(0)),
        )
    ),
    "gradient_clip_algorithm": maybe(choice("norm", "value")),
    "profiler": maybe(choice("simple", "advanced", "pytorch", "xla")),
    "overfit_batches": either(whole(0), _SHARE),
    "callbacks": Kind("nothing here: callbacks=NAME and callbacks.NAME choose them", _never),
    "logger": Kind("nothing here: logger=NAME chooses one", _never),
    "sync_batchnorm": flag(),
}

_MODEL: Options = {
    "weights": maybe(path("a name, a path or hf-hub:ORG/NAME")),
    "backbone": {
        "library": maybe(choice("hf", "open_clip", "torchvision")),
        "name": _WORDS,
        "pretrained": flag(),
        "args": BACKBONE_ARGS,
    },
    "reducer": anything(),
    "schedule": anything(),
    "plugin": anything(),
    "seed": _SEED,
    "data": _DATA,
    "paths": {"outputs": path(), "results": path()},
    "runtime": _RUNTIME,
    "results": path("a file"),
    "progress": either(choice("auto"), flag()),
}

EVAL: Options = {
    **_MODEL,
    # `evaluate` knows the names of the tasks.
    "task": either(_WORDS, list_of(_WORDS, "a list of tasks such as [accuracy,flops]", 0)),
    "device": _DEVICE,
    "dtype": choice("float32", "bfloat16", "float16"),
    "weights_dtype": maybe(choice("float32", "bfloat16", "float16")),
    "compile": flag(),
    "deterministic": flag(),
    "limit": maybe(whole(1)),
    "gallery": choice("own", "dense"),
    "gallery_split": choice("train", "val", "test"),
    "gallery_limit": maybe(whole(1)),
    "knn": {"k": whole(1), "temperature": _POSITIVE},
    "linear_probe": {
        "c": list_of(_POSITIVE, "a list of numbers above 0", 1, 100),
        "held_out": real(above=0, below=1),
        "iterations": whole(1, 10**6),
    },
    "retrieval": {
        "relevance": either(
            choice(*RELEVANCE), list_of(choice(*RELEVANCE), f"a list of {', '.join(RELEVANCE)}")
        ),
        "crop": real(above=0, high=1),
    },
    "selector": anything(),
    "select": {
        "keep": either(whole(1), _SHARE, list_of(either(whole(1), _SHARE), "tokens or shares")),
        "block": whole(-1000, 1000),
        "norm": flag(),
        "seeds": whole(1, 1000),
    },
    "images": maybe(
        either(path("a file, a folder or a pattern"), list_of(path(), "a list of files"))
    ),
    "visualize": {
        "against": maybe(
            either(_WORDS, list_of(_WORDS, "a list of methods such as [topk,none]", 0))
        ),
        "attention": flag(),
        "panels": whole(2, 100),
        "format": choice("png", "jpg", "webp"),
        "folder": maybe(path("a folder")),
    },
    "zeroshot": {
        "embeddings": maybe(path("a file")),
        "templates": either(_WORDS, list_of(_WORDS, "a list of sentences with {}")),
        "reservoir": {
            "size": whole(0, 10**4),
            "weight": real(0),
            "sharpness": real(0),
            "scale": _POSITIVE,
        },
    },
    "trainer": _TRAINER,
    "export": {
        "format": choice("onnx", "openvino", "torch", "aoti"),
        "precision": choice("float32", "bfloat16", "int8"),
        "folder": maybe(path("a folder")),
        "images": whole(0, 10**6),
        "calibration": whole(1, 10**6),
    },
    "features": {
        "cache": flag(),
        "folder": path("a folder"),
        "max_gb": real(above=0, high=1e6),
        "seed": _SEED,
    },
    "done": choice("again", "skip"),
    "answers": flag(),
    "untrained": choice("run", "skip"),
    "control": maybe(
        either(
            choice(*CONTROLS),
            list_of(choice(*CONTROLS), f"a list of {', '.join(CONTROLS)}", 0),
        )
    ),
    "resolutions": maybe(
        list_of(_POSITIVE, "a list of shares of the patches or of pixels, above 0", 0)
    ),
    "throughput": {
        "batch": either(_BATCH, list_of(_BATCH, "a list of whole numbers, at least one")),
        "rounds": whole(1, 10**6),
        "min_time": real(above=0, high=3600),
        "threads": _THREADS,
        "engine": maybe(
            either(
                choice(*ENGINES),
                list_of(choice(*ENGINES), f"a list of {', '.join(ENGINES)}"),
            )
        ),
    },
}

TRAIN: Options = {
    **_MODEL,
    "ckpt": maybe(path()),
    "test": choice("best", "last"),
    "test_start": flag(),
    "weights_dtype": maybe(choice("float32", "bfloat16", "float16")),
    "aux_weight": real(0),
    "threads": _THREADS,
    "output_dir": path("a folder"),
    "augment": _AUGMENT,
    "module": _MODULE,
    "loss": _LOSS,
    "optim": _OPTIM,
    "lr_schedule": _LR_SCHEDULE,
    "trainer": _TRAINER,
    "callbacks": anything(),
    "logger": anything(),
}

#: Arguments of callbacks that have a range, whichever has them.
CALLBACK: Options = {
    "decay": real(0, below=1),
    "start": real(0, below=1),
    "end": real(0, below=1),
    "refresh_rate": whole(0),
    "seed": _SEED,
    "monitor": maybe(_WORDS),
    "mode": choice("min", "max"),
    "dirpath": maybe(path("a folder")),
    "filename": maybe(_WORDS),
    "save_top_k": whole(-1),
    "save_last": maybe(either(flag(), choice("link"))),
    "every_n_epochs": maybe(whole(0)),
    "every_n_train_steps": maybe(whole(0)),
    "patience": whole(0),
    "min_delta": real(0),
    "logging_interval": maybe(choice("step", "epoch")),
    "grids": maybe(list_of(SIZE, "a list of sizes or [rows, columns]")),
}

#: The same of loggers.
LOGGER: Options = {
    "save_dir": path("a folder"),
    "name": maybe(text(pattern=r"(?s).*")),
    "version": maybe(either(whole(0), text(pattern=r"(?s).*"))),
    "project": maybe(_WORDS),
    "offline": flag(),
}

TABLES: Mapping[str, Options] = {"eval": EVAL, "train": TRAIN}

#: What a command cannot do without.
REQUIRED = (
    *("weights", "seed", "data", "paths", "results"),
    *("task", "device", "dtype", "weights_dtype", "compile", "limit", "throughput"),
    *("gallery", "gallery_split", "gallery_limit"),
    *(f"knn{end}" for end in ("", ".k", ".temperature")),
    *(f"linear_probe{end}" for end in ("", ".c", ".held_out", ".iterations")),
    *(f"retrieval{end}" for end in ("", ".relevance", ".crop")),
    *(f"select{end}" for end in ("", ".keep", ".block", ".norm", ".seeds")),
    "images",
    *(f"visualize{end}" for end in ("", ".against", ".attention", ".panels", ".format", ".folder")),
    *(f"zeroshot{end}" for end in ("", ".embeddings", ".templates", ".reservoir")),
    *(f"zeroshot.reservoir.{end}" for end in ("size", "weight", "sharpness", "scale")),
    *(f"export{end}" for end in ("", ".format", ".precision", ".images", ".calibration")),
    *(f"features{end}" for end in ("", ".cache", ".folder", ".max_gb", ".seed")),
    *("ckpt", "test", "test_start", "aux_weight", "threads", "output_dir"),
    *("module", "loss", "optim", "lr_schedule", "trainer"),
)
#: Groups that may be null.
OPTIONAL = (
    *("backbone", "reducer", "schedule", "plugin", "selector", "runtime"),
    *("augment", "callbacks", "logger", "data.options", "trainer"),
)
#: Groups that take more names than the table has.
OPEN = ("data", "loss", "module", "optim", "trainer", "callbacks", "logger")
