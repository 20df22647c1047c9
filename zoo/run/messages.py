"""One line for every mistake that can be made on the command line.

Hydra and OmegaConf explain their errors over many lines (with search paths, object types and a
hint about an environment variable); here each becomes what was given and what to type instead.
"""

from __future__ import annotations

import difflib
import errno
import re
import sys
import traceback
from collections.abc import Iterable, Iterator

from zoo.published import config_folder
from zoo.report.words import printable

# Every flag that Hydra's own parser knows. Its message for any other is ten lines of usage.
FLAGS = (
    "--help -h --hydra-help --version --cfg -c --resolve --package -p --run -r --multirun -m "
    "--shell-completion -sc --config-path -cp --config-name -cn --config-dir -cd "
    "--experimental-rerun --info -i"
).split()
_SHOWN = ["--help", "--cfg job", "--multirun (-m)", "--config-dir", "--info", "--hydra-help"]


def unknown_flag(arguments: Iterable[str]) -> str | None:
    """Returns the message for the first argument that looks like a flag and is none, else None."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        if not re.match(r"--?[A-Za-z]", flag):
            continue
        # argparse takes abbreviations of long flags and values glued to short ones.
        if flag in FLAGS or any(known.startswith(flag) for known in FLAGS if flag[:2] == "--"):
            continue
        name = flag.lstrip("-")
        if "=" in argument:
            return f"unknown flag {flag!r}; options are set without dashes: {argument.lstrip('-')}"
        near = nearest("--" + name, FLAGS)
        return f"unknown flag {flag!r}; " + (near or f"the flags are {', '.join(_SHOWN)}")
    return None


def explain(error: BaseException) -> str | None:
    """Returns one line for an error that the user can mend, None for what may be a bug."""
    text = _explain_hydra(error) or _explain_memory(error) or _explain_lost(error)
    text = text or _explain_files(error)
    if text is None:
        # reduction.errors imports torch; an error of that kind cannot exist before it is loaded.
        errors = sys.modules.get("reduction.errors")
        known = (OSError, NotImplementedError) + ((errors.ZooError,) if errors else ())
        text = str(error) if isinstance(error, known) else None
    return None if text is None else " ".join(printable(text).split())


def nearest(word: str, known: Iterable[str], most: int = 3) -> str | None:
    """Returns "did you mean ...?" for the nearest known words, or None when none is near."""
    near = difflib.get_close_matches(word, list(known), n=most, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else None


def _explain_hydra(error: BaseException) -> str | None:
    from hydra.errors import (
        HydraException,
        InstantiationException,
        MissingConfigException,
        OverrideParseException,
    )
    from omegaconf.errors import (
        ConfigAttributeError,
        ConfigKeyError,
        MissingMandatoryValue,
        OmegaConfBaseException,
    )

    cause = error.__cause__
    if isinstance(error, MissingConfigException):
        return _missing_option(error.missing_cfg_file, error.options, str(error))
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override or "", str(error))
    if isinstance(error, InstantiationException):
        return _explain_instantiation(error)
    if isinstance(error, HydraException) and isinstance(
        cause, (ConfigAttributeError, ConfigKeyError)
    ):
        return _unknown_key(cause, str(error))
    if isinstance(error, MissingMandatoryValue):
        key = getattr(error, "full_key", None) or str(error).splitlines()[0]
        return f"{key} has no value yet; type {key}=VALUE"
    if isinstance(error, HydraException):
        return _explain_composition(str(error) or str(cause or type(error).__name__))
    if isinstance(error, OmegaConfBaseException):
        return str(error).splitlines()[0]
    if type(error).__name__ == "MisconfigurationException":
        return f"the trainer cannot run this: {error}"
    if isinstance(error, ValueError) and _raised_by(error, "lightning"):
        return f"the trainer cannot run this: {error}"
    # Hydra's own checks of the command line ("Only one of --run, --multirun ...").
    if isinstance(error, ValueError) and _raised_by(error, "hydra"):
        return str(error).splitlines()[0]
    return None


def _explain_memory(error: BaseException) -> str | None:
    """Too large a batch, image or model; torch raises a plain RuntimeError for it on a CPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    small = "type a smaller batch (throughput.batch, data.batch_size), image or model"
    if isinstance(error, MemoryError):
        return f"out of memory; {small}"
    if isinstance(error, RuntimeError) and any(text in str(error) for text in words):
        reason = str(error).splitlines()[0].partition("] . ")[2] or str(error).splitlines()[0]
        return f"out of memory ({reason}); {small}"
    return None


def _explain_lost(error: BaseException) -> str | None:
    """Another process has gone while this one waited for it; gloo raises a plain RuntimeError."""
    if is_lost(error):
        return "another process of this run has ended; look at what it said before"
    return None


def is_lost(error: BaseException) -> bool:
    """Whether a process that this one waited for has gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in words)


def _explain_files(error: BaseException) -> str | None:
    """A file or folder that cannot be written or read, without the number of the error."""
    if not isinstance(error, OSError) or error.errno is None or error.strerror is None:
        return None
    name = f"{error.filename}: " if error.filename else ""
    where = ""
    if _asked_by(error) == "hydra":
        where = "; the files of a run go there: type paths.outputs=FOLDER"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = "; make room, or type paths.outputs=FOLDER and results=FILE of another disk"
    return f"{name}{error.strerror}{where}"


def _missing_option(file: str | None, options: Iterable[str] | None, message: str) -> str:
    group, _, option = (file or "").rpartition("/")
    if not group or options is None:
        return message.splitlines()[0]
    if " " in option:
        return f"{group}={option}: more than one argument in one pair of quotes"
    options = [name for name in options if name != "__init__"]
    for other in sorted({"backbone", "plugin", "reducer"} - {group}):
        names = sorted(path.stem for path in (config_folder() / other).glob(f"{option}*.yaml"))
        if found := [name for name in names if name == option or name.startswith(f"{option}_")]:
            return f"{group}={option}: it is a {other}, so type {other}={'|'.join(found)}"
    known = f"{group} is one of {', '.join(options)}"
    near = nearest(option, options)
    return f"{group}={option}: no such {group}; {near or known}"


def _unreadable(given: str, message: str) -> str:
    name, _, value = given.partition("=")
    if "=" in value:
        return f"cannot read {given!r}; quote a value that holds =, so: '{name}=\"{value}\"'"
    if not value:
        return f"cannot read {given!r}; options are written name=value"
    reasons = [
        line
        for line in message.splitlines()
        if line and not line.startswith(("See ", "Error parsing override"))
    ]
    hint = f"quote a value that holds , [ ] {{ }} or spaces: '{name}=\"{value}\"'"
    return f"cannot read {given!r} ({'; '.join(reasons)}); {hint}"


def _unknown_key(cause: BaseException, message: str) -> str:
    """An option that does not exist: names the nearest ones, or where it would exist."""
    from omegaconf import OmegaConf

    key = str(getattr(cause, "full_key", "") or "")
    typed = re.search(r"Could not override '([^']*)'", message)
    typed_key = typed.group(1) if typed else key
    if key.startswith(f"{typed_key}."):  # inside a mapping that was typed as a whole
        typed_key = key
    parent = getattr(cause, "parent_node", None)
    root = parent._get_root() if parent is not None else None
    above, _, last = typed_key.rpartition(".")
    start = f"no option {typed_key!r}"
    if root is None:
        return start
    keys = [name for name in _dotted(root) if not name.startswith("hydra")]
    same = [name for name in keys if name.rpartition(".")[2] == last and name != typed_key]
    if above:
        owner = OmegaConf.select(root, above, default=None)
        # OmegaConf has turned a null into an empty mapping by now.
        if OmegaConf.is_dict(owner) and not (len(owner) == 0 and above in groups()):
            if near := nearest(last, [str(name) for name in owner if str(name)[0] != "_"]):
                return f"{start}; {near}"
            if options := list(_options_with(above, last)):
                return f"{start} here; it belongs to {above}={'|'.join(options)}"
            inside = [str(name) for name in owner if str(name)[0] != "_"]
            has = f"{above} has {', '.join(inside)}" if inside else f"{above} is empty"
            return f"{start}; {has}; a leading + adds an option: +{typed_key}=VALUE"
        if above in groups():
            other = f", or did you mean {' or '.join(same[:3])}?" if same else ""
            return f"{start}: no {above} is chosen; {_choose(above, last)}{other}"
    if near := nearest(typed_key, {*keys, *groups()}):
        return f"{start}; {near}"
    for group in groups():
        same += [f"{group}={option} {group}.{last}" for option in _options_with(group, last)]
    if same:
        return f"{start}; did you mean {' or '.join(same[:3])}?"
    return f"{start}; --cfg job prints all options with their values"


def _explain_composition(message: str) -> str:
    """Hydra's other messages, shortened to what to type."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'", lines[0]):
        given = ambiguous.group(1)
        name, _, values = given.partition("=")
        return f"{given}: several values; add -m to run each, or give a list: {name}=[{values}]"
    if sweep := re.match(r"Sweep parameters '(.*)' requires --multirun", lines[0]):
        return f"{sweep.group(1)}: several values; add -m to run each"
    if lines[0].startswith("Could not append"):
        return f"{lines[0]} {lines[1]}"
    if merging := re.match(r"Error merging override (.*)", lines[0]):
        reason = lines[1] if len(lines) > 1 else "the value is of another type than the option"
        return f"{merging.group(1)}: {reason}"
    return lines[0]


def _explain_instantiation(error: BaseException) -> str | None:
    """A `_target_` that could not be built: what its constructor said, without Hydra's frame."""
    cause = error.__cause__
    while cause is not None and type(cause).__name__ == "InstantiationException":
        cause = cause.__cause__
    where = re.search(r"full_key: (\S+)", str(error))
    place = f"{where.group(1)}: " if where else ""
    if isinstance(cause, TypeError):
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
        if unexpected:
            return f"{place}no argument {unexpected.group(1)!r} ({cause})"
        return f"{place}{cause}"
    if isinstance(cause, (ValueError, OSError)):
        return str(cause)
    if isinstance(cause, ImportError):
        return place + " ".join(str(cause).split())
    if cause is None:
        return place + str(error).splitlines()[0].partition(", set env var")[0]
    return None


def _dotted(node: object, prefix: str = "") -> Iterator[str]:
    from omegaconf import DictConfig

    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    for name, value in node.items_ex(resolve=False):
        yield prefix + str(name)
        yield from _dotted(value, f"{prefix}{name!s}.")


def groups() -> list[str]:
    """Returns the names of the configuration groups."""
    folder = config_folder()
    return sorted(path.name for path in folder.iterdir() if any(path.glob("*.yaml")))


def _options_with(group: str, key: str) -> Iterator[str]:
    """The options of a group whose file sets `key` at its top level."""
    for path in sorted((config_folder() / group).glob("*.yaml")):
        if re.search(rf"^{re.escape(key)}:", path.read_text(encoding="utf-8"), re.MULTILINE):
            yield path.stem


def _choose(group: str, key: str) -> str:
    options = list(_options_with(group, key))
    if not options:
        options = sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
    return f"add {group}={'|'.join(options)}"


def _raised_by(error: BaseException, package: str) -> bool:
    return next(_packages(error), "") == package


def _asked_by(error: BaseException) -> str:
    """The package that called what raised an error of Python itself."""
    return next((p for p in _packages(error) if p not in sys.stdlib_module_names), "")


def _packages(error: BaseException) -> Iterator[str]:
    """The packages of the calls that an error has come through, where it was raised first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        yield str(frame.f_globals.get("__name__", "")).split(".")[0]
