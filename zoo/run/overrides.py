"""What was typed, before Hydra sees it: values of groups, and backbones that are no option."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zoo.published import config_folder
from zoo.run.messages import groups, nearest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# Groups of parts that can be put together: callbacks=[default,multigrid].
_MIXED = ("callbacks", "logger")
# Flags of Hydra that show something in place of running it.
_SHOWS = {
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--help",
    "-h",
    "--hydra-help",
    "--shell-completion",
    "-sc",
}


def prepare(arguments: Sequence[str]) -> str | None:
    """Looks at the values of groups, and offers timm's models as options of `backbone`.

    Args:
        arguments: Of the command line, without the program.

    Returns:
        The message for the first value of a group that is none, else None.
    """
    known = groups()
    for override in _overrides(arguments):
        group = override.key_or_group
        if group not in known or override.is_delete() or override.package is not None:
            continue
        for value in _values(override):
            if group == "backbone" and isinstance(value, str):
                message = _offer(value)
            else:
                message = _check_group(group, value)
            if message is not None:
                return message
    return None


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra has to see them.

    An experiment that is a sweep is run as one, with `-m`; but for the dense model alone, which has
    no use for methods and budgets: that is one run. Of a sweep Hydra composes the options
    that are not swept first, and an option of a part that is swept has no part to go to then; as a
    choice of one it goes along with each job.

    Args:
        arguments: Of the command line, without the program.
    """
    if _SHOWS & {word.partition("=")[0] for word in arguments}:
        return list(arguments)
    params = _sweep_of_experiment(arguments)
    found = list(arguments)
    if params is not None and not {"-m", "--multirun"} & set(found):
        if "reducer=none" in found and not any(o.is_sweep_override() for o in _overrides(found)):
            return [*found, "hydra.mode=RUN"]
        found.insert(0, "-m")
    if not {"-m", "--multirun"} & set(found):
        return found
    parsed = list(_overrides(found))
    swept = {o.key_or_group for o in parsed if o.is_sweep_override()} | set(params or ())
    for i, word in enumerate(found):
        name, equal, value = word.partition("=")
        above = name.lstrip("+").partition(".")[0]
        if equal and value and above in swept and above != name.lstrip("+"):
            one = list(_overrides([word]))
            if one and not one[0].is_sweep_override() and not one[0].is_delete():
                found[i] = f"{name}=choice({value})"
    return found


def _sweep_of_experiment(arguments: Sequence[str]) -> list[str] | None:
    """What a chosen experiment sweeps by itself; None where it is one run."""
    import yaml

    chosen = [o.value() for o in _overrides(arguments) if o.key_or_group == "experiment"]
    path = config_folder() / "experiment" / f"{chosen[-1]}.yaml" if chosen else None
    if path is None or not path.is_file():
        return None
    hydra = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("hydra") or {}
    if hydra.get("mode") != "MULTIRUN":
        return None
    return list((hydra.get("sweeper") or {}).get("params") or ())


def _overrides(arguments: Sequence[str]) -> Iterator[Override]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for text in arguments:
        if "=" in text and not text.startswith("-"):
            try:
                yield parser.parse_override(text)
            except HydraException:
                return  # Hydra is about to say so itself


def _values(override: Override) -> Iterable[Any]:
    from hydra.core.override_parser.types import ChoiceSweep, QuotedString

    value: Any = override._value
    if isinstance(value, ChoiceSweep):
        found = list(value.list)
    elif override.is_sweep_override():
        return []  # of what there is: glob(*)
    else:
        found = [value]
    return [one.text if isinstance(one, QuotedString) else one for one in found]


def _check_group(group: str, value: Any) -> str | None:
    if isinstance(value, str) or (group in _MIXED and isinstance(value, list)):
        return None
    if value is None:
        return f"{group}=null: expected one of {_options(group)}; leave {group} out for the default"
    if isinstance(value, list):
        several = ",".join(map(str, value)) or "NAME,NAME"
        return f"{group}={_typed(value)}: expected one name; to run several: -m {group}={several}"
    if isinstance(value, dict):
        return (
            f"{group}={_typed(value)}: expected one of {_options(group)}, then {group}.NAME=VALUE"
        )
    return f"{group}={_typed(value)}: no such {group}; {group} is one of {_options(group)}"


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")


def _options(group: str) -> str:
    return ", ".join(sorted(path.stem for path in (config_folder() / group).glob("*.yaml")))


def _of_library(name: str) -> str | None:
    """What to type for a backbone that was named as in Python, behind its library."""
    from zoo.libraries.names import LIBRARIES

    prefix, colon, rest = name.partition(":")
    if colon and prefix in LIBRARIES:
        return f"backbone={name}: type backbone={prefix} backbone.name={rest or 'NAME'}"
    return None


def _offer(name: str) -> str | None:
    """Makes a model of timm an option of `backbone`; a message where there is none of that name."""
    from zoo import backbones

    if hint := _of_library(name):
        return hint
    stem = name.removesuffix(".yaml")
    if "/" in name or (config_folder() / "backbone" / f"{stem}.yaml").is_file():
        return None
    if not backbones.exists(name):
        known = [path.stem for path in (config_folder() / "backbone").glob("*.yaml")]
        near = nearest(name, [*known, *backbones.works()])
        hint = f"{near} or see" if near else "see"
        return f"backbone={name}: no such backbone; {hint} zoo list --models"
    from hydra.core.config_store import ConfigStore

    node = {"name": name, "pretrained": False, "args": {}}
    ConfigStore.instance().store(name=name, node=node, group="backbone", provider="timm")
    return None
