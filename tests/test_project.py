"The compendium as a whole: export current, notebooks clean, pins in one place, imports only downwards."
import ast
import builtins
import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from perturb_research.launch import STEPS, code_cells, defaults

NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
FLOORS = {"core": 0, "style": 0, "launch": 0, "data": 1, "evaluate": 2, "models": 2, "drugs": 2, "page": 3, "report": 3}


@pytest.fixture(scope="module")
def config():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what the export and the cleaning work on."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "perturb_research"): shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy(ROOT / name, folder)
    subprocess.run(["git", "init", "-q", folder], check=True)
    return folder


def nbdev(command, folder):
    subprocess.run([sys.executable, "-c", command], cwd=folder, check=True, capture_output=True)


def test_export_is_current(copy):
    shutil.rmtree(copy / "perturb_research")
    nbdev("from nbdev.doclinks import nbdev_export; nbdev_export()", copy)
    ours, theirs = ({p.relative_to(base): p.read_text() for p in sorted((base / "perturb_research").rglob("*.py"))} for base in (ROOT, copy))
    assert sorted(ours) == sorted(theirs), "run nbdev_export"
    different = [str(p) for p in ours if ours[p] != theirs[p] and p.name != "_modidx.py"]
    assert not different, f"run nbdev_export: {different}"


def test_notebooks_are_clean(copy):
    nbdev("from nbdev.clean import nbdev_clean; nbdev_clean()", copy)
    dirty = [n.name for n in NOTEBOOKS if json.loads(n.read_text()) != json.loads((copy / "nbs" / n.name).read_text())]
    assert not dirty, f"run nbdev_clean: {dirty}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_one_parameters_cell_of_plain_literals_with_comments(notebook):
    cells = [source for source, tags in code_cells(notebook) if "parameters" in tags]
    assert len(cells) == 1
    names = defaults(notebook)  # raises if a value is no literal
    assert len(names) == len(cells[0].splitlines()) and all(re.search(r"  # \S", line) for line in cells[0].splitlines())
    exported = {node.name for source, _ in code_cells(notebook) if "#| export" in source for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert not exported & set(names), "a parameter would replace a function of the same name"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_imports_stand_alone(notebook):
    for source, _ in code_cells(notebook):
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body}
        assert len(kinds) <= 1, source


def test_every_step_is_a_notebook_and_the_other_way_round():
    definitions = {"00_core", "00a_style", "00b_launch", "02a_data.read", "02b_data.labels", "05a_data.split_formats", "05d_data.whitening", "06_evaluate.metrics", "06a_evaluate.de", "06b_evaluate.distributions", "06c_evaluate.panels", "06f_evaluate.ranking",
                   "07a_evaluate.predictions", "07b_evaluate.trials", "07c_models.training", "11d_models.inverse", "15a_page"}
    assert {n.stem for n in NOTEBOOKS} == set(STEPS) | definitions


def floor(module):
    return FLOORS[module.split(".")[1]]


@pytest.mark.parametrize("file", sorted((ROOT / "perturb_research").rglob("[a-z]*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_no_import_runs_upwards(file):
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level: continue
        target = ".".join([*module.split(".")[: -node.level], node.module or ""])
        assert floor(target) <= floor(module), f"{module} imports {target}"
        pair = {module.split(".")[1], target.split(".")[1]}
        assert pair not in ({"models", "evaluate"}, {"drugs", "evaluate"}), f"{module} imports {target}"


def test_pins_agree(config):
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split() if "==" in line)
    direct = dict(r.split("==") for key in ("requirements", "run_requirements", "dev_requirements") for r in config[key].split())
    assert direct.items() <= lock.items()
    assert lock["torch"] == "2.13.0"
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python={config['min_python']}" in environment
    assert environment[-1]["pip"] == [f"torch=={lock['torch']}", "-r requirements.lock", "-e ."]


def test_installed_packages_are_the_locked_ones():
    from importlib.metadata import version
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split() if "==" in line)
    wrong = {name: version(name) for name in ("anndata", "numpy", "scipy", "pandas", "scanpy", "matplotlib", "nbdev", "papermill", "snakemake") if version(name) != lock[name]}
    assert not wrong, wrong


def test_nothing_from_the_machine_is_in_the_tree():
    "No path of the machine that the tree was made on stands in a tracked text file."
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    home = re.compile(rf"{re.escape(str(Path.home()))}/|{re.escape(str(ROOT))}[/\"' ]|/tmp/w")
    found = [n for n in names if n and Path(n).suffix in {".py", ".ipynb", ".md", ".json", ".csv", ".ini", ".yml", ".lock", ""} and (ROOT / n).is_file() and home.search((ROOT / n).read_text(errors="ignore"))]
    assert not [n for n in found if n != "tests/test_project.py"], found


def test_the_readme_names_nothing_from_nowhere():
    "Read from top to bottom, its Python uses what was imported or made before, and imports what there is."
    known = set(dir(builtins))
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S):
        for line in ast.parse(block).body:
            if isinstance(line, ast.ImportFrom) and line.module.startswith("perturb_research."):
                module = (ROOT / line.module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
                assert all(re.search(rf"\b{a.name}\b", module) for a in line.names), line.module
            names = [node for node in ast.walk(line) if isinstance(node, ast.Name)]
            made = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {a.asname or a.name.split(".")[0] for a in getattr(line, "names", [])}
            within = {n.id for part in ast.walk(line) if isinstance(part, ast.comprehension) for n in ast.walk(part.target) if isinstance(n, ast.Name)}
            assert not (unknown := {n.id for n in names if isinstance(n.ctx, ast.Load)} - known - within), (unknown, block)
            known |= made
