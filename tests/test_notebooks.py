"Notebooks that are no step of the main job run too; the steps are run by the main job itself (see `small`)."
import subprocess
import sys

from conftest import ROOT

from perturb_research.launch import STEPS

EACH_IN_A_FORK = """
import sys
from multiprocessing import get_context
from pathlib import Path

import anndata, matplotlib.pyplot, scipy.stats, torch
from nbdev.test import test_nb

files = [Path('nbs', f'{name}.ipynb').absolute() for name in sys.argv[1:]]
with get_context('fork').Pool(1, maxtasksperchild=1) as pool: passed = pool.map(test_nb, files, chunksize=1)
failed = [f.stem for f, (good, _) in zip(files, passed) if not good]
sys.exit(' '.join(failed) if failed else 0)
"""


def test_definitions_run():
    "As `nbdev_test` runs them, with the libraries loaded once."
    names = sorted({n.stem for n in (ROOT / "nbs").glob("[0-9]*.ipynb")} - set(STEPS))
    done = subprocess.run([sys.executable, "-c", EACH_IN_A_FORK, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(names) > 10, (done.stdout + done.stderr)[-5000:]
