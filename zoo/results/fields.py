"""The fields of a result row, and what each of them says."""

from __future__ import annotations

FIELDS: dict[str, str] = {
    # the run
    "run_id": "unique name of the run: UTC time and a random suffix",
    "status": "'ok', 'failed', or 'skipped': a job of a sweep that cannot be",
    "error": "one line: why a failed run failed, or why a job was skipped",
    "created": "when the row was made, ISO 8601 in UTC",
    "job": "of eval: a digest of all options that can change a number, which done=skip looks for",
    "command": "the command line that made the row, ready to be pasted",
    "task": "list of what was done: 'train', 'accuracy', 'flops', 'throughput', 'fidelity', 'knn', "
    "'linear_probe', 'retrieval', 'zeroshot', 'export', 'select', 'visualize'",
    # what was run
    "method": "registry name of the reducer; 'none' is the dense model",
    "reducer": "mapping: name and arguments of the reducer",
    "backbone": "timm name of the architecture, or name of a shipped model",
    "tag": "timm tag of the pretrained weights, e.g. 'fb_in1k'",
    "dataset": "name of the data",
    "split": "split that accuracy was measured on",
    "class_order": "what gave class folders their numbers: 'natural' (timm's order), 'plain' "
    "(torchvision's), 'class_map' (a file), 'weights' (names saved with them)",
    "n_images": "images that accuracy, or tasks on features, were measured on",
    "gallery": "whose features images were looked up in: 'own' or 'dense', the same weights with "
    "nothing reduced",
    "gallery_split": "split that the gallery was made of",
    "n_gallery": "images in the gallery",
    "img_size": "side of the square input, pixels (or [height, width])",
    "schedule": "mapping: name and arguments of the budget",
    # cost
    "tokens": "[[entering, leaving], ...] per block, prefix tokens included",
    "gmacs": "mapping of 1e9 multiply-accumulates per image: total, linear, attention, reducer",
    "gmacs_sample": "mapping, where the cost depends on the image and was measured (gmacs: mean) "
    "with mean, min, max, images, limit (the most that the schedule allows)",
    "gmacs_dense": "GMACs of the same backbone with nothing reduced",
    "gmacs_paper": "mapping, where the method's paper counts otherwise: convention, total, dense",
    "gmacs_fvcore": "GMACs as fvcore counts them (adds LayerNorm)",
    "params_m": "parameters, millions",
    # quality
    "top1": "top-1 accuracy, percent",
    "top5": "top-5 accuracy, percent",
    "top1_start": "top-1 accuracy of a trained model before its training, percent",
    "ci95": "[low, high]: 95 % Wilson interval of top1, percent",
    "answers": "mapping, on wish: which images were answered right, in the order of the data, "
    "one bit each (zoo.results.answers): accuracy, knn, knn_as_dense (as the dense features say)",
    "fidelity": "mapping, against dense: agreement (percent), kl (nats), cosine, n_images",
    "knn": "mapping, of the weighted nearest neighbours: k, temperature, top1 and its ci95; with "
    "gallery=dense agreement with what the dense model's features give, and agreement_ci95",
    "linear_probe": "mapping, of logistic regression on features: c, scores (of every C tried, on "
    "a part of the training images), held_out (images in it), top1, ci95, agreement",
    "retrieval": "mapping by relevance ('class', 'crop'): recall1, recall5, map (percent), each "
    "with its interval, n_queries, n_gallery",
    "export": "mapping, of an exported model: folder, format, precision, files, megabytes, "
    "max_error (of a logit, to torch in float32), n_undecided (images that differ by rounding "
    "alone), agreement (percent), n_random, n_real",
    "zeroshot": "mapping, of classification by text: text, classes, top1, top5, ci95; reservoir: "
    "of a second pass as a stream, its options, top1, ci95, remembered, anchors",
    "select": "mapping, of a selector behind the tower: selector (name and arguments), block, "
    "n_tokens, dense (all tokens), and by_keep: for each keep the selector, random tokens (mean "
    "and spread over seeds) and resolution (a smaller image): knn_top1, recall1, map, agreement "
    "with dense, centred_cosine, coverage_mean and coverage_worst (1 - cosine to the nearest kept)",
    "visual": "mapping, of pictures of tokens: page, sheets, tokens (a plot), images, counts "
    "(tokens at the input and behind each block, for each image)",
    "picture": "path of a small picture of what became of an image's patches",
    "centred_cosine": "mapping, with gallery=dense: mean and worst cosine of features with the "
    "dense model's, both minus the mean feature of the gallery; worst_image (its place)",
    # speed
    "imgs_per_s": "throughput, images per second (median)",
    "imgs_per_s_dense": "throughput of the dense model, measured in the same run",
    "imgs_per_s_timm": "throughput of the model as its library has it, in the same run and engine",
    "ms": "time of one batch on the wall, milliseconds (median)",
    "cpu_ms": "time that all threads of the process computed for one batch, milliseconds (median)",
    "engine": "what ran the model: 'torch', 'compile' (torch.compile), 'onnxruntime', 'openvino'",
    "machine": "mapping: name, family and model of the processor, cores, isa (instruction sets)",
    "batch": "batch size",
    "threads": "CPU threads used by torch",
    "device": "device that ran it: 'cpu' or the accelerator's name",
    "dtype": "computation type, e.g. 'float32', 'bfloat16'",
    "weights_dtype": "type that weights and images were cast to before anything ran, or null",
    "compile": "whether torch.compile was on for all tasks",
    "deterministic": "whether kernels were chosen without a clock, so that the run can be repeated",
    "kernels": "mapping: kind of call to the kernel that ran, where there was a choice; "
    "of an exported model the version of its runtime",
    "runtime": "mapping of run-time options other than the defaults, which the dense model shared",
    "bench": "mapping, of rows of benchmarks.speed: mode, rounds, spread, efficiency, ratios, ...",
    "peak_mem_mb": "peak device memory, MiB",
    "peak_mem_mb_dense": "peak device memory of the dense model, MiB",
    "by_batch": "where several batch sizes were measured: list of batch and what depends on it",
    # provenance
    "seed": "random seed: of the training, of draws, of untrained weights",
    "training": "mapping, of trained weights: method, epochs, start and start_sha (the weights it "
    "began with), partial (on part of the data), options (a digest of all options but the seed)",
    "recipe": "mapping that rebuilds the model: backbone, reducer, schedule, plugins",
    "weights": "weights that were evaluated: a path or a name",
    "weights_sha": "SHA-256 of the weights file (of a folder: of the backbone's)",
    "git": "commit of the source checkout the package ran from",
    "dirty": "whether that checkout had uncommitted changes",
    "versions": "mapping: python, torch, timm, lightning, tokenzoo",
    "trained": "true: weights were trained with this reducer; false: reduced off the shelf",
    "notes": "free text",
}
