"""Every option of every group composes, and names something that exists."""

import importlib
import inspect
import re

import hydra.utils
import pytest
import timm
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import reduction
import zoo
from zoo import published
from zoo.adapters.hollow import hollow
from zoo.run.build import build_model

FOLDER = published.config_folder()
OPTIONS = {
    path.name: sorted(option.stem for option in path.glob("*.yaml"))
    for path in FOLDER.iterdir()
    if any(path.glob("*.yaml"))
}
TRAIN_ONLY = {"augment", "callbacks", "experiment", "logger", "loss", "lr_schedule", "module"}
TRAIN_ONLY |= {"optim", "trainer"}
EVAL_ONLY = {"selector"}
ALL = [
    (group, option)
    for group, options in sorted(OPTIONS.items())
    for option in options
    if group != "hydra"
]


@pytest.fixture(scope="module", autouse=True)
def config():
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def targets(node):
    """Every mapping with a `_target_`, as plain dicts with interpolations left as they are."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        node = list(node.values())
    for value in node if isinstance(node, list) else []:
        yield from targets(value)


@pytest.mark.parametrize(("group", "option"), ALL)
def test_option_composes_and_its_targets_take_its_arguments(group, option):
    if group == "experiment":
        cfg = compose("train", [f"experiment={option}"])
    else:  # by itself, which is ten times faster; the next test has each group in its place
        cfg = compose(f"{group}/{option}")
    for target in targets(OmegaConf.to_container(cfg, resolve=False)):
        if target["_target_"].startswith("lightning.pytorch.loggers"):
            continue  # their packages are optional
        cls = hydra.utils.get_object(target["_target_"])
        given = {key for key in target if not key.startswith("_")}
        parameters = inspect.signature(cls).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            assert given <= set(parameters)


@pytest.mark.parametrize("root", ["eval", "train"])
def test_every_group_has_its_place(root):
    groups = set(OPTIONS) - {"hydra"} - (TRAIN_ONLY if root == "eval" else EVAL_ONLY)
    last = {group: OPTIONS[group][-1] for group in groups - {"experiment"}}
    cfg = compose(root, [f"{group}={option}" for group, option in last.items()])
    for group, option in last.items():
        alone = OmegaConf.load(FOLDER / group / f"{option}.yaml")
        assert set(alone) - {"defaults"} <= set(cfg[group]), group


def test_every_method_builds_from_its_option():
    """Each method has an option of its own name; other options are variants of a method."""
    reached = {}
    for option in OPTIONS["reducer"]:
        cfg = compose("eval", ["backbone=test_vit", f"reducer={option}"])
        model = build_model(cfg)
        reached[option] = "none" if model.reducer is None else model.reducer.name
        # Parked tokens may be back at the end.
        kept = min(min(p.entering, p.mlp, p.leaving) for p in model.plan())
        sizes = zoo.wrap(model.backbone, None).token_counts()[0][0]
        decides = getattr(model.reducer, "limited", True)  # the schedule
        assert (kept < sizes) == (option != "none" and decides), option
    named = {option for option, name in reached.items() if option == name}
    assert named == {*reduction.list_methods(), "none"}
    assert set(reached.values()) == named


@pytest.mark.parametrize("option", [name for name in OPTIONS["backbone"] if name != "timm"])
def test_backbone_exists_and_can_be_wrapped(option):
    cfg = OmegaConf.load(FOLDER / "backbone" / f"{option}.yaml")
    assert cfg.pretrained is False
    if "library" in cfg:  # names are typed; tests of libraries build them
        assert set(cfg) == {"library", "name", "pretrained", "args"}
        assert OmegaConf.is_missing(cfg, "name") and cfg.library == option
        return
    assert set(cfg) == {"name", "pretrained", "args"}
    importlib.import_module("zoo.models")
    assert timm.is_model(cfg.name)
    tag = cfg.name.partition(".")[2]
    assert not tag or cfg.name in timm.list_pretrained()
    with hollow():
        model = zoo.create_model(cfg.name, **cfg.args)
    assert model.recipe["backbone"]["tag"] == (tag or None)


def test_backbones_named_by_the_papers_are_there():
    names = "deit_tiny deit_small deit_base mae_base dinov2_small dinov3_small eva02_tiny clip_base"
    assert set(names.split()) <= set(OPTIONS["backbone"])


def test_schedule_r_alone_is_constant_r():
    cfg = compose("eval", ["backbone=test_vit", "reducer=tome", "schedule.r=5"])
    assert build_model(cfg).recipe["schedule"]["name"] == "constant_r"
    assert build_model(cfg).token_counts()[0] == (101, 96)


def test_schedule_default_is_the_method_s():
    cfg = compose("eval", ["backbone=test_vit", "reducer=tome"])
    assert build_model(cfg).recipe["schedule"]["name"] == "keep_rate"


def test_lists_reach_constructors_as_lists():
    cfg = compose("eval", ["schedule=keep_rate", "schedule.blocks=[1,3]"])
    assert type(hydra.utils.instantiate(cfg.schedule).blocks) is list


def test_experiments_only_select_options_that_exist():
    for option in OPTIONS.get("experiment", []):
        text = (FOLDER / "experiment" / f"{option}.yaml").read_text(encoding="utf-8")
        for group, name in re.findall(r"override /(\w+): (\w+)", text):
            assert name == "null" or name in OPTIONS[group]


def test_no_option_names_a_path_of_one_machine():
    for path in FOLDER.rglob("*.yaml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"(?<![\w.$}])/(home|root|work|data|mnt|tmp)/", line), (path, line)


def test_bare_checkout_finds_its_configs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (published.config_folder() / "eval.yaml").is_file()
