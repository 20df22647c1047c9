"""The documentation is true: its snippets run, its commands exist, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

import reduction
import zoo
from reduction.selection.registry import SELECTORS
from zoo.cli import docs
from zoo.libraries.names import LIBRARIES
from zoo.published import config_folder

ROOT = Path(zoo.__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
IDS = [str(p.relative_to(ROOT)) for p in PAGES]

pytestmark = pytest.mark.skipif(
    not (ROOT / "README.md").is_file(), reason="needs a checkout: the documentation"
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


SNIPPETS = [
    (f"{page.relative_to(ROOT)} block {i + 1}", code)
    for page in PAGES
    for i, code in enumerate(blocks(page, "python"))
]


def results_of(snippets, folder):
    """Snippets in one process of their own: one import, and no traces in the registry."""
    (folder / "code.json").write_text(json.dumps(snippets))
    runner = (
        "import json, traceback\n"
        "import torch\n"
        "results = {}\n"
        "for name, code in json.load(open('code.json')):\n"
        "    try:\n"
        "        exec(compile(code, name, 'exec'), {'__name__': 'snippet'})\n"
        "        results[name] = ''\n"
        "    except ModuleNotFoundError as error:\n"
        "        results[name] = 'missing ' + str(error.name)\n"
        "    except BaseException:\n"
        "        results[name] = traceback.format_exc()\n"
        "json.dump(results, open('results.json', 'w'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", runner],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


#: Packages of extras that pages are about.
EXTRAS = {library.name for library in LIBRARIES.values() if library.extra}


def test_readme_has_a_snippet():
    assert len(blocks(ROOT / "README.md", "python")) >= 1


@pytest.mark.parametrize("part", [0, 1])
def test_every_python_snippet_runs(part, tmp_path):
    """But for those that need an extra which is not installed. In two parts for two workers."""
    snippets = SNIPPETS[part::2]
    results = results_of(snippets, tmp_path)
    assert list(results) == [name for name, _ in snippets]
    absent = {f"missing {module}" for module in EXTRAS if importlib.util.find_spec(module) is None}
    wrong = [f"{name}: {said}" for name, said in results.items() if said and said not in absent]
    assert not wrong, "\n".join(wrong)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
        lines += re.findall(r"^    (python .*)$", text, re.M)  # indented blocks
        lines += re.findall(r"`((?:python (?:train|eval)\.py|python -m zoo|zoo) [^`]*)`", text)
        found += [(str(page.relative_to(ROOT)), line.strip()) for line in lines if line.strip()]
    return sorted(set(found))


COMMANDS = commands()


@pytest.fixture(scope="module")
def hydra_configs():
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{p}: {c}" for p, c in COMMANDS])
def test_command_exists(page, line, hydra_configs):
    words = shlex.split(line, comments=True)
    if words[0] == "zoo" and words[1] in ("train", "eval"):
        words = ["python", f"{words[1]}.py", *words[2:]]
    if words[0] == "python" and words[1] in ("train.py", "eval.py"):
        assert (ROOT / words[1]).is_file()
        check_overrides(words[1].removesuffix(".py"), words[2:])
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    elif words[0] == "zoo":
        from zoo.cli.main import _parser

        parser = _parser(words[1])
        if len(words) > 2:  # alone it is named and not typed
            parser.parse_args(words[2:])
    elif words[0] == "make":
        text = (ROOT / "Makefile").read_text()
        assert re.search(rf"^(?:[\w-]+ )*{words[1]}(?: [\w-]+)*:", text, re.M), f"no {line}"
    else:
        assert words[0] in ("pip", "pre-commit", "git"), f"what is {line!r}?"


def check_overrides(root: str, words: list[str]) -> None:
    """Compose the command; of a sweep, its first job and every option that it names."""
    flags = [w for w in words if w.startswith("-")]
    assert set(flags) <= {"-m", "--help", "--cfg"}, flags
    plain = [w for w in words if not w.startswith("-") and w not in ("job",)]
    first = []
    for override in OverridesParser.create().parse_overrides(plain):
        if not override.is_sweep_override():
            first.append(override.input_line)
            continue
        assert "-m" in flags, f"{override.input_line} needs -m"
        if "glob(" in override.input_line:
            options = sorted(p.stem for p in (config_folder() / override.key_or_group).glob("*"))
        else:
            options = list(override.sweep_string_iterator())
        name = override.input_line.partition("=")[0]  # with its leading +
        first.append(f"{name}={options[0]}")
    cfg = compose(root, first)
    assert set(cfg) >= {"backbone", "reducer", "schedule", "weights"}


def test_generated_parts_are_up_to_date():
    assert docs.main(["--check"]) == 0, "run `python -m zoo.cli.docs`"


@pytest.mark.slow
def test_check_notices_a_stale_table(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme.replace("| [`tome`]", "| [`tomo`]"))
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    monkeypatch.setattr(docs, "__file__", str(tmp_path / "zoo" / "cli" / "docs.py"))
    assert docs.main(["--check"]) == 1
    assert "README.md" in capsys.readouterr().err
    assert docs.main([]) == 0
    assert (tmp_path / "README.md").read_text() == readme
    (tmp_path / "README.md").write_text("no markers")
    assert docs.main([]) == 2
    assert "expected the lines" in capsys.readouterr().err


@pytest.mark.parametrize("name", reduction.list_methods())
def test_every_method_has_a_page_that_says_where_it_is_from(name):
    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.is_file(), f"write {page}"
    text = page.read_text(encoding="utf-8")
    for heading in ("## What it computes", "## Options", "## Where each detail is from", "## Cost"):
        assert heading in text, f"{page} lacks {heading!r}"
    card = reduction.card(name)
    if card.arxiv:
        assert f"https://arxiv.org/abs/{card.arxiv}" in text and "```bibtex" in text
    if card.code:
        assert card.code in text
    from zoo.cli.catalogue import describe

    for argument, default in describe(name)["arguments"].items():
        assert f"| `{argument}` | `{docs._yaml(default)}` |" in text, f"{page}: {argument}"


def test_no_page_without_a_method():
    pages = {p.stem for p in (ROOT / "docs" / "methods").glob("*.md")} - {"index"}
    assert pages == set(reduction.list_methods())


@pytest.mark.parametrize("name", reduction.list_selectors())
def test_every_selector_has_a_page_that_says_where_it_is_from(name):
    page = ROOT / "docs" / "selectors" / docs.selector_page(name)
    text = page.read_text(encoding="utf-8")
    assert f"[`{name}`]({page.name})" in (page.parent / "index.md").read_text(encoding="utf-8")
    if name == "random":
        return
    card = SELECTORS.get(name).card
    assert card.arxiv in text and card.code in text and "## Cite" in text
    assert "## Defects repaired" in text
    for option in inspect.signature(SELECTORS.get(name)).parameters:
        assert f"`{option}`" in text


def test_no_page_without_a_selector():
    pages = {p.name for p in (ROOT / "docs" / "selectors").glob("*.md")}
    assert pages == {docs.selector_page(n) for n in reduction.list_selectors()} | {
        "index.md",
        "evaluation.md",
    }


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", goal.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in slugs, f"{page.name}: no heading for {target}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_pages_end_with_one_newline_and_have_one_title(page):
    text = page.read_text(encoding="utf-8")
    assert text.endswith("\n") and not text.endswith("\n\n")
    outside = re.sub(r"```.*?```", "", text, flags=re.S)
    assert len(re.findall(r"^# ", outside, re.M)) == 1
