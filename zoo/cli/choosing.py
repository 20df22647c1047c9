"""Which method for what: questions, and what our own rows answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from reduction.base import Card, Reducer

_MOST = 6


class Known(NamedTuple):
    """What a question looks at.

    Attributes:
        card: Provenance.
        reducer: With default arguments.
        arguments: Names of its arguments.
    """

    card: Card
    reducer: Reducer
    arguments: frozenset[str]


class Question(NamedTuple):
    """A need, and which methods meet it.

    Attributes:
        words: For the table.
        fits: Whether a method does.
        trained: Go by the numbers after training.
    """

    words: str
    fits: Callable[[Known], bool]
    trained: bool = False


def _fixed(known: Known) -> bool:
    from reduction.mixins.adaptive import Adaptive

    return not isinstance(known.reducer, Adaptive)


def _fused(known: Known) -> bool:
    from reduction.mixins.attention import OwnAttention

    return "attn" not in known.reducer.needs and not isinstance(known.reducer, OwnAttention)


def _without_class_token(known: Known) -> bool:
    instead = {"score_from", "score", "start_from"} & known.arguments
    return not known.reducer.needs_class_token or bool(instead)


def _keeps_all(known: Known) -> bool:
    words = known.card.kind + known.card.note
    return not any(word in words for word in ("prune", "pattern", "low-pass", "gate", "idle"))


def _no_training(known: Known) -> bool:
    return known.card.training.startswith(("none", "fine-tuning recommended"))


def _adaptive(known: Known) -> bool:
    return not _fixed(known)


def _untrained(*needs: Callable[[Known], bool]) -> Callable[[Known], bool]:
    return lambda known: _no_training(known) and all(need(known) for need in needs)


def _at_input(known: Known) -> bool:
    from reduction.mixins.entry import AtEmbedding, AtInput

    return isinstance(known.reducer, AtInput | AtEmbedding)


QUESTIONS = (
    Question("off the shelf", _untrained()),
    Question("off the shelf, and fused attention everywhere", _untrained(_fused)),
    Question("off the shelf, a tower without a class token", _untrained(_without_class_token)),
    Question("off the shelf, exported with as few tokens as it has", _untrained(_fixed)),
    Question("off the shelf, as many tokens as an image needs", _untrained(_adaptive)),
    Question("off the shelf, and every patch stays in some token", _untrained(_keeps_all)),
    Question("fewer patches before block 0", _at_input),
    Question("trained with the method", lambda known: True, trained=True),
)


_BEFORE = """\
Answers of our own rows alone: top-1 in percent of `vit_digits` on 360 test images at half the
dense GMACs (42 to 50.5 %), the best setting of each method. One number has an interval of about
± 1.5 points, so neighbours in a line are no order, and digits are no photographs. Nothing reduced:
99.7. The two controls: random tokens {lots}; the whole image at a lower resolution {small}
of the GMACs. What is not better than these is not worth its trouble there. Off the shelf means
that nothing has to be trained, though some methods gain by it."""
_BEHIND = """\
- **Task**: class labels alone, any. Dense outputs: one whose tokens hold every patch, and
  [`restore=`](../features.md). A language model behind the tower: a
  [selector](../selectors/index.md). An index that the dense tower has filled:
  `prop_attn=true`, see [options of every reducer](../conventions.md).
- **Tower**: the last table says who needs a class token; methods with `score_from=column_mean`,
  `score=column` or `start_from=uniform` do without by that.
- **Exported**: every method exports. One with adaptive counts runs at its upper limit there, with
  padding, and saves only what its schedule promises.
- **Frames**: [`rlt`](rlt.md) and [`evs`](evs.md) are for stacks of frames. Digits are none, so
  they have no number.
- Whoever else has none off the shelf has to be trained first: [`adavit`](adavit.md)'s gates are
  open at first, and untrained thresholds of [`asvit`](asvit.md) and [`ltmp`](ltmp.md) lead
  nowhere near half the cost."""


def section() -> list[str]:
    """Lines of the page: the table of questions, and how to read it."""
    import reduction
    from zoo.cli.catalogue import describe
    from zoo.report import evidence

    measured = evidence.digits()
    methods = {
        name: Known(
            reduction.card(name),
            reduction.create(name),
            frozenset(describe(name)["arguments"]),
        )
        for name in reduction.list_methods()
    }
    lines = [
        "## Which one",
        "",
        *_BEFORE.format(lots=_text(measured.get("random")), small=_smaller()).splitlines(),
        "",
        "| you want | methods that do it, best first |",
        "|---|---|",
    ]
    for question in QUESTIONS:
        lines.append(
            f"| {question.words} | {', '.join(_best(question, methods, measured)) or '-'} |"
        )
    return [
        *lines,
        "",
        *_BEHIND.splitlines(),
        "",
    ]


def _best(question: Question, methods: dict[str, Known], measured: dict) -> Iterator[str]:  # type: ignore[type-arg]
    found = []
    for name, known in methods.items():
        digits = measured.get(name)
        value = None if digits is None else digits.trained if question.trained else digits.untrained
        if value is not None and name != "random" and question.fits(known):
            found.append((-value, name))
    for value, name in sorted(found)[:_MOST]:
        yield f"[`{name}`]({name}.md) {-value:.1f}"


def _text(digits: object) -> str:
    return "-" if digits is None else str(digits).partition(" / ")[0]


def _smaller() -> str:
    from zoo.report import evidence

    found = evidence.smaller_images()
    return ", ".join(f"{top1:.1f} at {100 * share:.0f} %" for share, top1 in found)
