"Helpers that several test files use."
import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real screens; tests on them run where the folder is present

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real screens are not here")


def launch(out, *arguments, **environment):
    "Run the command behind `make` with everything written below `out`."
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PROFILE")} | {"PERTURB_OUT": str(out)} | environment
    return subprocess.run([sys.executable, "-m", "perturb_research.launch", *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True)


def run_notebook(name, out, **parameters):
    "Execute one notebook with papermill below `out`; its copy lies at `out/<name>.ipynb`."
    given = [word for k, v in parameters.items() for word in ("-p", k, str(v))]
    Path(out).mkdir(parents=True, exist_ok=True)
    env = os.environ | {"PERTURB_OUT": str(out)}
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / f"{name}.ipynb"), str(Path(out) / f"{name}.ipynb"), "-k", "python3", "--cwd", str(ROOT / "nbs"), "--no-progress-bar"]
    return subprocess.run(command + given, env=env, capture_output=True, text=True)


def cells(n=60, genes=20, column="perturbation", targets=("control", "KLF1", "AHR"), seed=0, **columns):
    "A small screen of counts; `columns` are further columns of `obs`."
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame({column: np.resize(targets, n), **columns}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(sp.csr_matrix(rng.poisson(3, (n, genes)).astype(np.float32)), obs, pd.DataFrame(index=[f"G{i}" for i in range(genes)]))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    "The whole main job on both embedded screens in the small profile, in a folder of its own."
    out = tmp_path_factory.mktemp("small")
    done = launch(out, "figures", "--profile", "small")
    assert done.returncode == 0, done.stdout + done.stderr
    return out
