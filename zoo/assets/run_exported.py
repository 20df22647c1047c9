"""Run an exported model on pictures.

    python run.py PICTURE... [--top 5] [--json]

Needs numpy, Pillow and the runtime of the format: onnxruntime, openvino, or torch.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def prepare(picture, config):
    """A picture as the model sees it, (C, H, W) in float32."""
    channels, height, width = config["input_size"]
    picture = ImageOps.exif_transpose(picture)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    how = Image.Resampling(FILTERS[config["interpolation"]])
    share = config["crop_pct"] or 1.0
    mode = config["crop_mode"] or "center"
    if mode == "squash":
        size = int(height / share), int(width / share)
    else:
        target = int(np.floor(height / share)), int(np.floor(width / share))
        ratios = picture.height / target[0], picture.width / target[1]
        if target[0] == target[1] and mode == "center":
            short, long = min(picture.size), max(picture.size)
            other = int(target[0] * long / short)
            upright = picture.width <= picture.height
            size = (other, target[0]) if upright else (target[0], other)
        else:
            ratio = max(ratios) if mode == "border" else min(ratios)
            size = round(picture.height / ratio), round(picture.width / ratio)
    picture = picture.resize((size[1], size[0]), how)
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    picture = picture.crop((left, top, left + width, top + height))
    values = np.asarray(picture, dtype=np.float32) / 255
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    mean, std = (np.float32(config[k])[:, None, None] for k in ("mean", "std"))
    return np.ascontiguousarray((values - mean) / std, dtype=np.float32)


def load(format, precision):
    """The model as a function from (B, C, H, W) to (B, classes)."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(HERE / "model.onnx")
        return lambda images: session.run(None, {session.get_inputs()[0].name: images})[0]
    if format == "openvino":
        import openvino

        hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32"}
        model = openvino.Core().compile_model(HERE / "model.xml", "CPU", hint)
        return lambda images: model([images])[0]
    import torch

    path, dtype = str(HERE / "model.pt2"), getattr(torch, precision)
    if format == "aoti":
        model = torch._inductor.aoti_load_package(path)
    else:
        model = torch.export.load(path).module()
    return lambda images: model(torch.from_numpy(images).to(dtype)).detach().float().numpy()


def main():
    """Print the best classes of every picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--top", type=int, default=5, help="classes to show for each picture")
    parser.add_argument("--json", action="store_true", help="print all outputs, a line per picture")
    options = parser.parse_args()
    about = json.loads((HERE / "recipe.json").read_text())
    config = json.loads((HERE / "preprocess.json").read_text())
    names = HERE / "labels.json"
    labels = json.loads(names.read_text()) if names.is_file() else None
    run = load(about["format"], about["precision"])
    for path in options.pictures:
        try:
            with Image.open(path) as picture:
                images = prepare(picture, config)[None]
        except OSError as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            return 2
        logits = run(images)[0]
        if options.json:
            print(json.dumps({"file": path, "outputs": [float(v) for v in logits]}))
            continue
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = logits.argsort()[::-1][: options.top]
        words = [f"{labels[i] if labels else i} {100 * shares[i]:.1f} %" for i in best]
        print(f"{path}: {', '.join(words)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
