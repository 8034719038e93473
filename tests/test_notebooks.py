"Notebooks that are no step of the main job run too; the steps are run by the main job itself (see `small`)."
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, launch, run_notebook


@pytest.mark.parametrize("name", ["00_core", "00a_style", "00b_launch", "02a_data.read", "02b_data.labels", "05a_data.split_formats", "05d_data.whitening", "06_evaluate.metrics", "06a_evaluate.de", "06b_evaluate.distributions", "06c_evaluate.panels", "06f_evaluate.ranking", "07a_evaluate.predictions", "07b_evaluate.trials", "07c_models.training"])
def test_definitions_run(name):
    done = subprocess.run([sys.executable, "-c", f"from nbdev.test import nbdev_test; nbdev_test(path='nbs/{name}.ipynb', n_workers=0)"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_one_step_with_other_parameters(small, tmp_path):
    "What the README shows: papermill on one notebook; it reads what the main job made and changes only its own figures."
    out = tmp_path / "out"
    shutil.copytree(small, out)
    done = run_notebook("14_evaluate.retrieval", out, dataset="sim", profile="small", top_k=5)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"top_k": 5' in (out / "figures/sim/retrieval_at_k.json").read_text()
    assert launch(out, "figures", "--profile", "small", "--dataset", "sim").returncode == 0  # the standard figures come back
    for file in (small / "figures/sim").iterdir(): assert (out / "figures/sim" / file.name).read_bytes() == file.read_bytes()
