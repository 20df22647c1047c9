"""Every option has a type, a range and a comment, and a wrong value is one line before the work."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf, open_dict

from reduction.arguments import argument_hints
from reduction.errors import ZooError
from tests.commands import Run
from zoo.published import config_folder
from zoo.run import help
from zoo.run.messages import explain
from zoo.run.schema import check_config
from zoo.run.schema.check import _constructor, check_values
from zoo.run.schema.kinds import Kind
from zoo.run.schema.options import CALLBACK, LOGGER, TABLES, Options

KINDS = ("eval", "train")
#: Mappings with names of their own.
FREE_INSIDE = {"data.class_map", "optim.lr_factors"}
#: Groups whose options are arguments of constructors, which have their own annotations.
BUILT = ("reducer", "schedule", "plugin", "selector", "callbacks", "logger")


#: Values for what has none yet.
GIVEN = {"root": "x", "name": "test_vit", "ms": 5, "opt": "adamw", "lr": 0.1}


@functools.cache
def composed(kind: str) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """The configuration and the choices of a command, for every option of every group."""
    found = []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        out = ["output_dir=x"] if kind == "train" else []
        cfg = compose(kind, ["reducer=tome", *out], return_hydra_config=True)
        base = dict(cfg.hydra.runtime.choices)
        with open_dict(cfg):
            del cfg["hydra"]
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
        found.append((plain, base))
        for group in help.command_groups(kind):
            files = sorted((config_folder() / group).glob("*.yaml"))
            first, _, inside = group.partition("/")
            for path in [] if group.startswith("experiment") else files[:1] if inside else files:
                # By itself, which is ten times faster; without Hydra, where nothing is for it.
                ours = "defaults:" not in (text := path.read_text()) and "@package" not in text
                loaded = OmegaConf.create(text) if ours else compose(f"{group}/{path.stem}")
                node: Any = OmegaConf.to_container(loaded)
                for part in group.split("/"):
                    node = node.get(part, node)
                choice = f"{inside}/{path.stem}" if inside else path.stem
                found.append(({**plain, first: filled(node)}, {**base, first: choice}))
    return found


def filled(node: Any, name: str = "") -> Any:
    """With values for what refers to other options or is missing."""
    if isinstance(node, dict):
        return {key: filled(value, str(key)) for key, value in node.items()}
    if isinstance(node, str) and node.startswith("${"):
        return 0 if name == "seed" else "x"
    return GIVEN[name] if node == "???" else node


def leaves(node: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if str(name).startswith("_"):
            continue
        if isinstance(value, dict) and value and above + name not in FREE_INSIDE:
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def known(table: Options, above: str = "") -> Iterator[tuple[str, Kind]]:
    for name, kind in table.items():
        if isinstance(kind, Kind):
            yield above + name, kind
        else:
            yield from known(kind, f"{above}{name}.")


@functools.cache
def options(kind: str) -> dict[str, tuple[dict[str, Any], Any]]:
    """Every option that the YAML files of a command have: a configuration with it, its value."""
    found: dict[str, tuple[dict[str, Any], Any]] = {}
    for plain, _ in composed(kind):
        for name, value in leaves(plain):
            if name not in found or found[name][1] is None:
                found[name] = plain, value
    return found


# ------------------------------------------------------------------------------------ complete


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_knows_every_option_that_the_files_have(kind: str) -> None:
    table = dict(known(TABLES[kind]))
    groups = {".".join(name.split(".")[:i]) for name in table for i in (1, 2)}
    for plain, _ in composed(kind):
        for name, _ in leaves(plain):
            parts = name.split(".")
            if parts[0] in BUILT:
                owner = plain[parts[0]]
                owner = owner and owner[parts[1]] if parts[0] in BUILT[4:] else owner
                if owner and "_target_" in owner:
                    build = _constructor(name, owner["_target_"])
                    own = CALLBACK if parts[0] == "callbacks" else LOGGER
                    assert parts[-1] in argument_hints(build) or parts[-1] in own, name
            else:
                assert name in table or name in groups, f"{name} of {kind} is not in the schema"


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_schema_knows_can_be_typed(kind: str) -> None:
    """What stands in no file is an argument of what the group builds."""
    import lightning.pytorch as pl
    import timm.models.vision_transformer as vit
    from timm.data import Mixup

    from zoo.data.module import ImageData
    from zoo.lit.optim import create_optimizer
    from zoo.model.runtime import Runtime

    has = {*options(kind), *(n.rpartition(".")[0] for n in options(kind))}
    builders: dict[str, Any] = {
        "backbone.args": vit.VisionTransformer,
        "data": ImageData,
        "trainer": pl.Trainer,
        "optim": create_optimizer,
        "augment.mixup": Mixup,
        "runtime": Runtime,
    }
    more = {"backbone.args.compressed_grid", "optim.eps", "optim.momentum", "optim.betas"}
    more |= {"loss.reduction"}  # of torch's losses
    for name, _ in known(TABLES[kind]):
        above, _, last = name.rpartition(".")
        if name not in has and name not in more:
            build = builders[above]
            fields = getattr(build, "__annotations__", {})
            assert last in {**_parameters(build), **fields}, f"{name}: nothing takes it"


def _parameters(build: Any) -> dict[str, Any]:
    import inspect

    found = dict(inspect.signature(build).parameters)
    for base in getattr(build, "__mro__", ())[1:]:
        found = {**dict(inspect.signature(base.__init__).parameters), **found}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_help_has_a_comment_for_every_option(kind: str) -> None:
    missing = set()
    for plain, choices in composed(kind):
        notes = help._notes(kind, choices)
        for name, _ in help._options(plain, choices):
            above = name.rpartition(".")[0]
            inside = "" if above in choices else notes.get(above, "")
            # An entry of a mapping that may hold anything shares the comment of the mapping.
            inside = inside or notes.get(".".join(name.split(".")[:2]), "")
            if name not in choices and not notes.get(name, inside):
                missing.add(name)
    assert not missing


@pytest.mark.parametrize("kind", KINDS)
def test_help_shows_the_groups_of_its_command_in_80_columns(kind: str, run: Run) -> None:
    code, out, err = run(f"{kind} --help")
    assert (code, err) == (0, "")
    heads = {line.partition(":")[0] for line in out.splitlines() if line[:1].isalpha()}
    groups = {path.name for path in config_folder().iterdir() if any(path.glob("*.yaml"))}
    own = {group.partition("/")[0] for group in help.command_groups(kind)}
    assert heads & groups == own
    # Both run in several processes; only one of them optimises.
    assert "trainer" in own and ("optim" in own) == (kind == "train")
    assert max(map(len, out.splitlines())) <= 80 or all(
        " " not in line.strip() for line in out.splitlines() if len(line) > 80
    )


# --------------------------------------------------------------------------------- wrong values

# No option means any of these: each is refused wherever it is typed.
NEVER: list[Any] = [
    *(math.nan, math.inf, -math.inf, 1e39, -1e39, 10**40, -(10**40)),
    *("\0", "a\0b", [[]], [[1, [2]]], [math.nan], [math.inf, 1], [{}], ["\0"]),
]


def wrong_for(value: Any) -> list[Any]:
    """Values of another type, or out of every range, than an option whose value is this one."""
    if isinstance(value, bool):
        return ["yes", "maybe", "", 7, -1, 0.5, [], [True], {}, {"a": 1}, None]
    if isinstance(value, int):
        return ["many", "", "1", -7, 10**30, 0.5, True, [], ["x"], {}, {"a": 1}]
    if isinstance(value, float):
        return ["much", "", "0.5", -7, -0.5, True, [], ["x"], {}, {"a": 1}]
    if isinstance(value, str):
        return ["", "  ", 0.5, -7.5, [], {}, {"a": 1}]
    if isinstance(value, list):
        return ["", "x", [["x"]], {}, {"a": 1}, [{}], [None], [True, "x", {}]]
    return []


#: Where such a value means something: what it means is said in the YAML file.
RIGHT: dict[str, list[Any]] = {
    "select.block": [-7],  # counted from the end
    "trainer.fast_dev_run": [7],  # so many batches
    "trainer.deterministic": [None],
    "callbacks.last.save_on_train_epoch_end": [None],
    "callbacks.best.save_on_train_epoch_end": [None],
    "features.max_gb": [0.5],
    "trainer.devices": ["1"],  # as Lightning has it
    "trainer.limit_train_batches": [0.5],  # a share
    "trainer.limit_val_batches": [0.5],
    "task": ["x", []],  # evaluation says which tasks there are
    "control": ["", []],
    "resolutions": [[]],
    "logger.csv.name": ["", "  "],  # no folder of its own
    "logger.tensorboard.name": ["", "  "],
    "progress": [None],
}


def one_line(error: Exception, name: str) -> None:
    text = explain(error)
    assert text is not None, repr(error)  # a bug, not a mistake
    assert text == " ".join(text.split()) and len(text) < 600, text
    assert name.rpartition(".")[2] in text or name.split(".")[0] in text, (name, text)


def put(plain: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(plain)
    *above, last = name.split(".")
    node = changed
    for part in above:
        node = node[part]
    node[last] = value
    return changed


CASES = st.deferred(
    lambda: st.sampled_from([(kind, name) for kind in KINDS for name in sorted(options(kind))])
)


@pytest.mark.parametrize("kind", KINDS)
def test_no_option_takes_what_is_no_value_of_its_kind(kind: str) -> None:
    accepted = []
    for name, (plain, value) in options(kind).items():
        if name.split(".")[0] in BUILT:
            continue
        inside = [v for v in NEVER if name not in FREE_INSIDE or not isinstance(v, list)]
        right = RIGHT.get(name, [])
        for wrong in [*inside, *(v for v in wrong_for(value) if v not in right)]:
            try:
                check_values(put(plain, name, wrong), TABLES[kind])
            except ZooError as error:
                one_line(error, name)
            else:
                accepted.append((name, wrong))
    assert not accepted


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*NEVER, "1e3", "nan", "auto", "none", "null", "-1", "all", "."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=CASES, value=JUNK)
def test_any_value_of_any_option_is_taken_or_refused_in_one_line(
    case: tuple[str, str], value: Any
) -> None:
    kind, name = case
    plain = options(kind)[name][0]
    cfg = OmegaConf.create(put(plain, name, _escaped(value)))
    try:
        check_config(cfg, kind, [])
    except Exception as error:
        one_line(error, name)


def _escaped(value: Any) -> Any:
    """Texts that are not taken for references to other options, or for missing ones."""
    if isinstance(value, str):
        return value.replace("$", "").replace("???", "")
    if isinstance(value, list):
        return [_escaped(one) for one in value]
    if isinstance(value, dict):
        return {_escaped(k): _escaped(v) for k, v in value.items()}
    return value


# Used to be accepted, or to fail deep inside a library; now refused before anything is built.
NONSENSE = [
    ("eval limit=0", "a whole number from 1"),
    ("eval limit=nan", "a whole number from 1"),
    ("eval seed=-1", "from 0"),
    ("eval seed=4294967296", "to 4294967295"),
    ("eval compile=yes", "true or false"),
    ("eval compile=1", "true or false"),
    ("eval progress=maybe", "auto, or true or false"),
    ("eval results=[a]", "a file"),
    ("eval 'weights=\"\"'", "a name, a path"),
    ("eval device=cuda:-1", "cuda:1"),
    ("eval control=foo", "dense, resolution"),
    ("eval resolutions=[0]", "above 0"),
    ("eval data.crop_pct=-1", "from 0.05 to 1"),
    ("eval data.img_size=[16]", "[height, width]"),
    ("eval data.img_size=-16", "from 1"),
    ("eval data.mean=1e30", "from -10000"),
    ("eval data.std=0", "above 0"),
    ("eval data=folder data.root=x data.extensions=[]", "a list of file name endings"),
    ("eval task=throughput throughput.batch=[1,-1]", "throughput.batch=[1,-1]"),
    ("eval task=throughput throughput.min_time=inf", "to 3600"),
    ("eval reducer=tome schedule.r=inf", "r must be"),
    ("eval reducer=tome schedule.r=true", "r must be"),
    ("eval reducer=tome schedule=keep_rate schedule.blocks=[-1]", "blocks"),
    ("eval reducer=tome schedule=keep_rate schedule.strict=foo", "true or false"),
    ("eval reducer=tome schedule=target_ms schedule.ms=5 schedule.tolerance=-1", "tolerance"),
    ("eval reducer=none schedule=keep_rate", "nothing is reduced"),
    ("eval runtime.last_block=half", "full, class_token"),
    ("train trainer.devices=99", "at most"),
    ("train trainer.devices=[]", "a list of device numbers"),
    ("train trainer.devices=0", "numbers and commas"),
    ("train trainer.max_epochs=-1", "never ends"),
    ("train trainer.max_epochs=null", "max_epochs=null says no end"),
    ("train trainer.limit_test_batches=0", "a whole number from 1"),
    ("train augment.mixup=0.8", "where NAME is mixup_alpha, cutmix_alpha, prob, switch_prob"),
    ("train +trainer.max_time=-1", "days:hours:minutes:seconds"),
    ("train +trainer.gradient_clip_algorithm=foo", "norm, value"),
    ("train optim.lr=nan", "above 0"),
    ("train optim.betas=[1,1]", "below 1"),
    ("train augment.scale=[2,1]", "[lowest, highest]"),
    ("train augment.scale=[0.5,2]", "above 0 to 1"),
    ("train augment.ratio=[2,1]", "[lowest, highest]"),
    ("train callbacks.best.mode=min", "the best is its maximum"),
    ("train callbacks.best.monitor=val/loss", "callbacks.best.mode=min"),
    ("train callbacks.best.save_top_k=0", "add test=last"),
    ("train callbacks.best=null test=best", "add test=last"),
    ("train callbacks.best.dirpath=5", "a folder"),
    ("train logger.csv.version=-1", "from 0"),
]


@pytest.mark.parametrize(("line", "expected"), NONSENSE, ids=[line for line, _ in NONSENSE])
def test_nonsense_is_refused_before_anything_is_built(
    run: Run, line: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zoo.run.evaluate
    import zoo.run.train

    for module in (zoo.run.evaluate, zoo.run.train):
        monkeypatch.setattr(module, "build_model", _not_to_be_called)
    line = line.replace("eval ", "eval weights=vit_digits ") if "weights=" not in line else line
    code, out, err = run(line)
    [text] = err.splitlines()
    assert (code, out) == (2, "") and text.startswith("error: ") and expected in text, err


def _not_to_be_called(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a model was built")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "train callbacks.best.monitor=foo",
            "monitor=foo of ModelCheckpoint: not logged; there are",
        ),
        ("train callbacks.best.monitor=val/top55", "did you mean val/top5?"),
        ("train data=synthetic data.num_classes=1", "has one class"),
        (
            "eval backbone=test_vit +backbone.args.patch_size=1000 task=flops",
            "patch size 1000x1000",
        ),
        ("eval backbone=test_vit +backbone.args.act_layer=foo task=flops", "act_layer"),
    ],
)
def test_what_only_a_model_can_tell_is_refused_before_an_epoch(
    run: Run, line: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.lit.classifier import Classifier

    monkeypatch.setattr(Classifier, "training_step", _not_to_be_called)
    code, out, err = run(line)
    [text] = err.splitlines()
    assert code == 2 and text.startswith("error: ") and expected in text, err


@pytest.mark.slow
def test_losses_of_a_reducer_and_of_a_search_can_be_watched(run: Run) -> None:
    batches = "trainer.max_epochs=1 trainer.limit_train_batches=1 trainer.limit_test_batches=1"
    for watched in ("train/loss_epoch", "val/loss"):
        options = f"callbacks.best.monitor={watched} callbacks.best.mode=min"
        assert run(f"train {batches} trainer.limit_val_batches=1 {options}")[0] == 0
