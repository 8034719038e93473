"Notebooks that are no step of the main job run too; the steps are run by the main job itself (see `small`)."
import subprocess
import sys

import pytest
from conftest import ROOT

from perturb_research.launch import STEPS


@pytest.mark.parametrize("name", sorted(n.stem for n in (ROOT / "nbs").glob("[0-9]*.ipynb") if n.stem not in STEPS))
def test_definitions_run(name):
    done = subprocess.run([sys.executable, "-c", f"from nbdev.test import nbdev_test; nbdev_test(path='nbs/{name}.ipynb', n_workers=0)"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
