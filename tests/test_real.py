"The main job on real screens of every form: it runs through, and what has no meaning for a screen leaves its note."
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SHARED, needs_shared

from perturb_research.launch import slug

ALWAYS = {"screen_at_a_glance", "effect_map", "split_composition", "forward_error_by_stratum", "leaderboard", "metric_dynamic_range"}
SPLITS = {  # screen: its splits, and some of the models, so that each meets a real screen that it can use and one that it cannot
    "carpool/carpool_effects": ({"combination", "doubles", "replicate"}, "gaussian graph"),
    "norman/norman_mcfaline_cells": ({"combination", "doubles", "context", "replicate"}, "gears scgpt cpa"),
    "kang/kang_pbmc_ifnb": ({"context", "replicate"}, "scgen transport"),
    "l1000/l1000_ht115_355drugs": ({"perturbation", "replicate"}, "latent_additive forests response"),
}


def made(file, models, out):
    "The executed main job, by `chain.py`; the command behind `make` goes through all of a screen from outside in `test_download`."
    command = [sys.executable, ROOT / "tests" / "chain.py", slug(file.split("/")[1]), SHARED / f"{file}.h5ad", models]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PERTURB_OUT": str(out)}, capture_output=True, text=True)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("file", SPLITS)
def test_the_main_job_runs_on_a_real_screen(file, tmp_path):
    kinds, models = SPLITS[file]
    done = made(file, models, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    name = slug(file.split("/")[1])
    drawn = {p.stem for p in (tmp_path / "figures" / name).glob("*.png")}
    noted = {p.name.removesuffix(".note.txt") for p in (tmp_path / "figures" / name).glob("*.note.txt")}
    assert ALWAYS <= drawn and "retrieval_at_k" in drawn | noted and "forward_against_reverse" in drawn | noted and not drawn & noted
    assert {s["kind"] for s in json.loads((tmp_path / "data/results" / name / "splits.json").read_text())} == kinds
    assert (tmp_path / "runs" / name / "report.html").stat().st_size > 100_000
