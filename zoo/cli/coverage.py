"""Which of timm's vision transformers can be reduced: for `zoo list`, and docs/coverage.md.

Every model of the families in `zoo.adapters.reasons` is built on the meta device, wrapped with a
reducer, run, and its cost compared with torch's counter. `python -m zoo.cli.docs --backbones` does
it, a few minutes long. What was tried is kept in `docs/coverage`, a file for each version of
timm, so that a run that was interrupted goes on, and pages can be written anew at once. With an
older timm on the path, `python -m zoo.cli.coverage` writes that version's file alone.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from zoo import backbones
from zoo.adapters.reasons import SUPPORTED, why_not

FOLDER = Path("docs/coverage")
PAGE = Path("docs/coverage.md")


class Tried(NamedTuple):
    """One model.

    Attributes:
        name: timm's.
        file: timm's file, such as "beit".
        kind: Class of the model.
        problem: Why it cannot be reduced; empty if it can.
    """

    name: str
    file: str
    kind: str
    problem: str


def try_all(root: Path) -> list[Tried]:
    """Try what has not been tried with this version of timm, and keep what was found.

    Args:
        root: Folder of the checkout.
    """
    store = root / FOLDER / f"timm-{_version()}.jsonl"
    found = read(store)
    known = {t.name for t in found}
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.open("a", encoding="utf-8") as lines:
        for file, names in backbones.transformers().items():
            for name in names:
                if name in known:
                    continue
                row = Tried(name, file, *backbones.attempt(name))
                lines.write(json.dumps(row._asdict()) + "\n")
                lines.flush()
                found.append(row)
    return found


def read(store: Path) -> list[Tried]:
    """What was kept."""
    if not store.is_file():
        return []
    return [Tried(**json.loads(line)) for line in store.read_text(encoding="utf-8").splitlines()]


def page(root: Path) -> str:
    """The text of docs/coverage.md, from everything that was tried with any version of timm."""
    stores = sorted((root / FOLDER).glob("timm-*.jsonl"), key=_order)
    runs = {store.stem.removeprefix("timm-"): read(store) for store in stores}
    newest = list(runs)[-1]
    tried = runs[newest]
    plain = [t for t in tried if t.file in SUPPORTED]
    lines = [
        "# Which vision transformers of timm can be reduced",
        "",
        "Written by `python -m zoo.cli.docs --backbones`, which builds every model without",
        "weights on the meta device, wraps it with a reducer, runs it, checks that the tokens of",
        "every block are those that were planned, and that the cost is what torch counts.",
        "",
        "| timm | plain vision transformers that work | of | other vision transformers |",
        "|---|---|---|---|",
    ]
    for version, rows in runs.items():
        own = [t for t in rows if t.file in SUPPORTED]
        good = sum(not t.problem for t in own)
        lines.append(f"| {version} | {good} | {len(own)} | {len(rows) - len(own)} |")
    lines += [
        "",
        f"## Plain vision transformers (timm {newest})",
        "",
        "| file of timm | class | models | work |",
        "|---|---|---|---|",
    ]
    for (file, kind), count in sorted(Counter((t.file, t.kind) for t in plain).items()):
        good = sum(not t.problem for t in plain if (t.file, t.kind) == (file, kind))
        lines.append(f"| `{file}` | `{kind}` | {count} | {good} |")
    bad = [
        f"- `{t.name}`, timm {version}: {t.problem}"
        for version, rows in runs.items()
        for t in rows
        if t.problem and t.file in SUPPORTED
    ]
    if bad:
        lines += ["", "Those that do not, with any version:", "", *bad]
    lines += [
        "",
        "Where the architecture has something of its own, this is what happens to it:",
        "",
        "- **Relative position bias** (BEiT, `vit_relpos_*`): a token that is left keeps its rows",
        "  and columns of the bias; a merged token has those of the token that gives it its",
        "  position; a token without a position has none. Networks that make such a bias see no",
        "  image and are counted once, as for a batch of one.",
        "- **Attention beside the MLP** (`ParallelScalingBlock`): both read the same tokens, so",
        "  a reduction that would be between them happens behind the block; methods that remove",
        "  tokens inside the attention (ATS, MCTF) are refused.",
        "- **Several attentions side by side** (`ParallelThingsBlock`): they are one attention",
        "  with as many heads as all of them have.",
        "- **Differential attention**: sizes and removed tokens act in both softmax maps; methods",
        "  rank tokens by the two maps, as twice as many heads, not by their difference, which has",
        "  negative entries.",
        "- **Convolutional stems** (hybrids, ViTamin) run whole; what is behind is reduced.",
        "- **NaFlexVit** takes images of any size, and padded batches `{patches, patch_coord,",
        "  patch_valid}`: images of one size run together without their padding, so that every",
        "  image gets what it gets alone.",
        "",
        f"## Vision transformers with no place to reduce (timm {newest})",
        "",
        "| file of timm | models | why |",
        "|---|---|---|",
    ]
    others = Counter(t.file for t in tried if t.file not in SUPPORTED and t.problem)
    lines += [f"| `{file}` | {n} | {why_not(file)} |" for file, n in sorted(others.items())]
    lines += [
        "",
        "Everything else in timm is no vision transformer. Such a model is refused with one of",
        "these sentences when it is wrapped.",
        "",
    ]
    return "\n".join(lines)


def write(root: Path) -> None:
    """Try every model and write both files."""
    tried = try_all(root)
    backbones.FILE.write_text(
        backbones.stored([t.name for t in tried if not t.problem]), encoding="utf-8"
    )
    (root / PAGE).write_text(page(root), encoding="utf-8")


def _version() -> str:
    import timm

    return str(timm.__version__)


def _order(store: Path) -> list[int]:
    parts = store.stem.removeprefix("timm-").split(".")
    return [int("".join(c for c in part if c.isdigit()) or 0) for part in parts]


if __name__ == "__main__":
    for row in try_all(Path(__file__).resolve().parents[2]):
        if row.problem and row.file in SUPPORTED:
            print(f"{row.name}: {row.problem}")
    sys.exit()
