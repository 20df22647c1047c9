"""Finding a model's weights in what training scripts write.

Files hold students and teachers, averages, wrapped and compiled modules, projection heads and
decoders beside the tower that is asked for. The tower is the set of tensors whose names agree with
the model's, whatever stands in front of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

# Parts of names that wrappers add: DDP and AveragedModel, torch.compile (also of single blocks),
# FSDP old and new, activation checkpointing.
_WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
    }
)
# Names by which a tower is recognised wherever it stands.
_ANCHORS = ("patch_embed.proj.weight", "blocks.0.norm1.weight", "pos_embed")
_MOST_PREFIXES = 64  # a file of thousands would only be there to waste time
# Starts of names that timm's own conversions look for: OpenCLIP, CLIP, BEiT-3, RADIO, AIMv2.
_TIMMS = ("visual.", "beit3.", "radio_model.", "preprocessor.")
# Words in the names of averages, and of what stands beside them.
_AVERAGED = frozenset({"ema", "teacher", "target", "averaged", "average", "swa"})
_RAW = frozenset({"current"})  # Lightning's weight averaging: state_dict holds the average
_NEVER_FIRST = frozenset({"momentum"})  # MoCo's authors fine-tune the base encoder
# What pre-training needs and a classifier does not, by the start of the name in the tower.
_PRETRAINING = re.compile(
    r"(mask_token|masked_embed|decoder|predictor|projector|projection|prototypes|lm_head\.|"
    r"dino_head\.|ibot_head\.|local_cls_norm\.|n_averaged$|initted$|step$|queue)"
)
# A projection head in the place of the classifier: MoCo's, DINO's, iBOT's.
_PROJECTION = re.compile(r"(\d+|mlp|mlp2|last_layer\d?|parametrizations)\.")
_CHUNK = re.compile(r"blocks\.(\d+)\.(\d+)\.(.+)")
# Mappings of tensors that are never a model's weights.
_OTHERS = re.compile(r"optim|sched|callbacks|loops|scaler|loss")
_DEPTH = 4  # {"state_dict": {"model": {...}}} is the deepest seen in the wild


class Tower(NamedTuple):
    """One set of weights in a file.

    Attributes:
        name: Where it was found, e.g. `teacher.backbone`.
        body: Tensors by the names of the tower.
        extras: Tensors of a reducer and plugins beside a wrapped backbone, `reducer.*` and
            `plugins.*`.
    """

    name: str
    body: dict[str, Tensor]
    extras: dict[str, Tensor]


def find_tower(loaded: Any, want: Collection[str], *, ema: bool = True) -> Tower | None:
    """Find the tower of a model in what a file holds.

    Args:
        loaded: Content of the file.
        want: Names of the model's tensors.
        ema: Take averages (EMA, teachers) where there are both; False takes what was trained.

    Returns:
        The tower; where nothing in the file has the model's names, the first set of tensors, for
        timm's conversions to look at. None without any tensors.
    """
    sets = [(path, _without_wrappers(tensors)) for path, tensors in _tensor_sets(loaded)]
    if not sets:
        return None
    found: list[tuple[int, Tower]] = []
    anchors = _anchors(want)
    for path, tensors in sets:
        if anchors is _ANCHORS and any(name.startswith(_TIMMS) for name in tensors):
            continue
        for prefix in _prefixes(tensors, anchors)[:_MOST_PREFIXES]:
            tower = _tower(path, prefix, tensors, want)
            score = sum(name in want for name in tower.body)
            if score:
                found.append((score, tower))
    if not found:
        path, tensors = min(sets, key=lambda s: (_rank(".".join(s[0]), ema), -len(s[1])))
        return Tower(".".join(path), tensors, {})
    best = max(score for score, _ in found)
    near = [(score, tower) for score, tower in found if score >= 0.9 * best]
    return min(near, key=lambda item: (_rank(item[1].name, ema), -item[0]))[1]


def without_pretraining(
    body: Mapping[str, Tensor], want: Collection[str], heads: tuple[str, ...]
) -> dict[str, Tensor]:
    """Leave aside decoders, mask tokens and projection heads that the model does not have.

    Args:
        body: A tower.
        want: Names of the model's tensors.
        heads: Starts of the names of the model's classifiers.
    """

    def kept(name: str) -> bool:
        if name in want:
            return True
        head = next((h for h in heads if name.startswith(h)), None)
        if head is not None and _PROJECTION.match(name[len(head) :]):
            return False
        return not _PRETRAINING.match(name)

    return {name: value for name, value in body.items() if kept(name)}


def _tensor_sets(loaded: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every mapping that holds tensors itself, each once, with its place in the file."""
    seen: set[int] = set()

    def walk(
        node: Any, path: tuple[str, ...]
    ) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
        if not isinstance(node, Mapping) or len(path) > _DEPTH or id(node) in seen:
            return
        seen.add(id(node))
        tensors = {k: v for k, v in node.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if tensors:
            yield path, tensors
        for key, value in node.items():
            if isinstance(key, str) and isinstance(value, Mapping) and not _OTHERS.search(key):
                yield from walk(value, (*path, key))

    yield from walk(loaded, ())


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): value
        for name, value in tensors.items()
    }


def _anchors(want: Collection[str]) -> tuple[str, ...]:
    """Names by which a tower is recognised: of other libraries the most particular of its own."""
    if not want or any(name in want for name in _ANCHORS):
        return _ANCHORS
    return tuple(sorted(want, key=lambda name: (-name.count("."), name))[:3])


def _prefixes(tensors: Mapping[str, Tensor], anchors: tuple[str, ...]) -> list[str]:
    """What stands in front of a tower's names, each once, in the order of the file."""
    found: dict[str, None] = {}
    for name in tensors:
        name = _CHUNK.sub(r"blocks.\2.\3", name)
        for anchor in anchors:
            if name == anchor or name.endswith("." + anchor):
                found[name[: -len(anchor)]] = None
    return list(found)


def _tower(
    path: tuple[str, ...], prefix: str, tensors: Mapping[str, Tensor], want: Collection[str]
) -> Tower:
    body = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    extras = {}
    if prefix.endswith("backbone."):
        above = prefix[: -len("backbone.")]
        others = {k[len(above) :]: v for k, v in tensors.items() if k.startswith(above)}
        extras = {k: v for k, v in others.items() if k.startswith(("reducer.", "plugins."))}
    name = ".".join([*path, prefix]).strip(".")
    return Tower(name, _without_chunks(body, want), extras)


def _without_chunks(body: dict[str, Tensor], want: Collection[str]) -> dict[str, Tensor]:
    """Blocks that were stored in chunks, as DINOv2's training does: `blocks.2.11.` is block 11."""
    chunks: dict[tuple[int, int], None] = {}
    for name in body:
        if name not in want and (found := _CHUNK.fullmatch(name)):
            chunks[int(found[1]), int(found[2])] = None
    if not chunks:
        return body
    # Within a chunk DINOv2 counts blocks from the start of the model, others from the chunk's.
    places = sorted(chunks)
    through = len({block for _, block in places}) == len(places)
    index = {place: place[1] if through else i for i, place in enumerate(places)}

    def renamed(name: str) -> str:
        found = _CHUNK.fullmatch(name)
        if name in want or found is None:
            return name
        return f"blocks.{index[int(found[1]), int(found[2])]}.{found[3]}"

    return {renamed(name): value for name, value in body.items()}


def _rank(name: str, ema: bool) -> int:
    """Which of several towers is taken: the lowest."""
    words = set(re.split(r"[._]", name.lower()))
    if words & _NEVER_FIRST:
        return 3
    averaged = bool(words & _AVERAGED)
    if words & _RAW:
        return 2 if ema else 0
    return (0 if ema else 2) if averaged else 1
