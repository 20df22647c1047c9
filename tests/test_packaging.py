"""What is installed: the code, the configurations, the shipped weights; and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import zoo
from zoo.libraries.names import LIBRARIES

ROOT = Path(zoo.__file__).resolve().parents[1]
FILES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "train.py", "eval.py")
FOLDERS = ("zoo", "reduction", "configs")

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout: the sources of the package"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    junk = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=junk)
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").write_text("")
    build = "from setuptools import build_meta as b; print(b.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [path] = (source / "dist").glob("*.whl")
    return path


def test_wheel_holds_code_configs_and_assets_only(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected = {re.sub("^configs/", "zoo/configs/", name) for name in expected}
    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == expected
    assert "zoo/configs/eval.yaml" in installed and "zoo/configs/reducer/tome.yaml" in installed


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    text = archive.read(name).decode()
    assert re.search(rf"^Name: tokenzoo\nVersion: {re.escape(zoo.__version__)}$", text, re.M)
    assert "License-Expression: Apache-2.0" in text
    required = set(re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", text, re.M))
    assert required == {
        "torch",
        "torchvision",
        "timm",
        "lightning",
        "hydra-core",
        "fvcore",
        "tqdm",
        "scikit-learn",
    }


def test_installed_command_works_away_from_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import sys, zoo; from zoo.cli.main import main; print(zoo.__file__); "
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "eval", "reducer=tome", "--cfg", "job"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout and "metric: key" in done.stdout


def test_every_package_is_listed():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"zoo.configs"}
    for top in ("zoo", "reduction"):
        for init in (ROOT / top).rglob("__init__.py"):
            found.add(".".join(init.parent.relative_to(ROOT).parts))
    assert set(listed) == found
    assert listed == sorted(listed)


def test_extras_are_typed_as_every_pip_finds_them():
    """Metadata spells them with hyphens, which pip before 23.3 takes to the letter."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    text = (ROOT / "pyproject.toml").read_text()
    extras = set(tomllib.loads(text)["project"]["optional-dependencies"])
    files = [p for p in (ROOT / "zoo").rglob("*.py")] + [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
    ]
    texts = [text, *(path.read_text() for path in files)]
    typed = {
        x
        for t in texts
        for found in re.findall(r"tokenzoo\[([\w,-]+)\]", t)
        for x in found.split(",")
    }
    typed |= {library.extra for library in LIBRARIES.values() if library.extra}
    assert "open-clip" in typed and typed <= extras
    assert not [extra for extra in extras if "_" in extra]


def test_version_of_the_citation():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {zoo.__version__}\n" in text
