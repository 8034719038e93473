"Helpers that several test files use."
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"): os.environ.setdefault(_threads, "1")  # read when NumPy and torch are loaded; the workers share the cores
os.environ.setdefault("MPLBACKEND", "agg")  # figures go into files alone: nobody looks at the pictures in the executed notebooks

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from filelock import FileLock

from perturb_research.launch import code_cells, export

ROOT = Path(__file__).resolve().parent.parent
KILLED = 2, 24  # steps that are done when the run of `small` is killed; of 58
SHARED = ROOT.parent / "shared" / "data"  # real screens; tests on them run where the folder is present

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real screens are not here")


def command(out, *arguments, **environment):
    "The command behind `make` with everything written below `out`, as `subprocess` takes it."
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PROFILE")} | {"PERTURB_OUT": str(out)} | environment
    return dict(args=[sys.executable, "-m", "perturb_research.launch", *map(str, arguments)], cwd=ROOT, env=env)


def launch(out, *arguments, **environment):
    "Run the command behind `make` to its end."
    return subprocess.run(**command(out, *arguments, **environment), capture_output=True, text=True)


def finished(out):
    "How many steps below `out` are done."
    return len(list(Path(out).glob("data/results/*/done/*.json")))


def kill_after(done, out, *arguments):
    "Run the command behind `make` until `done` steps are finished, and kill it with all its kernels a few seconds into the next ones."
    run = subprocess.Popen(**command(out, *arguments), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and finished(out) < done: time.sleep(.1)
    time.sleep(4)
    assert run.poll() is None, f"it ended before it could be killed; see {out}/runs/snakemake.log"
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def run_notebook(name, out, **parameters):
    "Execute one notebook with papermill below `out`; its copy lies at `out/<name>.ipynb`."
    given = [word for k, v in parameters.items() for word in ("-p", k, str(v))]
    Path(out).mkdir(parents=True, exist_ok=True)
    env = os.environ | {"PERTURB_OUT": str(out)}
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / f"{name}.ipynb"), str(Path(out) / f"{name}.ipynb"), "-k", "python3", "--cwd", str(ROOT / "nbs"), "--no-progress-bar"]
    return subprocess.run(command + given, env=env, capture_output=True, text=True)


def run_here(name, out, examples=True, **parameters):
    """Execute one notebook's cells in this process below `out`: a quarter of `run_notebook`'s time, for no kernel starts and no library loads; what stops it is raised.
    Without `examples`, those on made-up data before the run begins are left out: they are the same whatever the data set."""
    scope = {"__name__": "__main__", "display": print}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERTURB_OUT", str(out))
        patch.chdir(ROOT / "nbs")
        for source, tags in code_cells(ROOT / "nbs" / f"{name}.ipynb"):
            examples |= "\nrun = Run(" in f"\n{source}"
            if not (examples or tags or source.startswith(("#|", "import ", "from "))): continue
            exec(compile(source, name, "exec"), scope)
            if "parameters" in tags: scope |= parameters
    plt.close("all")


def cells(n=60, genes=20, column="perturbation", targets=("control", "KLF1", "AHR"), seed=0, **columns):
    "A small screen of counts; `columns` are further columns of `obs`."
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame({column: np.resize(targets, n), **columns}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(sp.csr_matrix(rng.poisson(3, (n, genes)).astype(np.float32)), obs, pd.DataFrame(index=[f"G{i}" for i in range(genes)]))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes half a minute or more; begun first, so that no core is idle at the end")


def pytest_collection_modifyitems(items):
    "Slow tests first, in both halves of the list, since two workers begin with a half each: those on `small` in the one, the others in the other."
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    first = [item for item in slow if "small" in item.fixturenames]
    half = max(0, len(items) // 2 - len(first))
    items[:] = first + quick[:half] + [item for item in slow if item not in first] + quick[half:]


def pytest_sessionstart(session):
    "Export once, before several workers read what is exported."
    if not hasattr(session.config, "workerinput"): export(ROOT)


@pytest.fixture(scope="session")
def small(tmp_path_factory, worker_id):
    """The whole main job on both embedded screens in the small profile: made once, a copy for each worker.
    It is killed twice on the way, among the first steps and among the models, and simply called again: what the tests find in it, a killed run has made."""
    base = tmp_path_factory.getbasetemp()
    made = (base if worker_id == "master" else base.parent) / "made_small"
    with FileLock(made.with_suffix(".lock")):
        if not made.exists():
            for done in KILLED: kill_after(done, made.with_suffix(".new"), "figures", "--profile", "small")
            done = launch(made.with_suffix(".new"), "figures", "--profile", "small")
            assert done.returncode == 0, done.stdout + done.stderr
            made.with_suffix(".new").rename(made)
    own = tmp_path_factory.mktemp("small") / "out"
    shutil.copytree(made, own)
    return own
