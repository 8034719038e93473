"Counts -> effects with halves, beyond import: 20,729 cells x 299 genes (Papalexi 2021 where present, else of its shape). Limit: 3 s."
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy  # noqa: F401  its import is not what is measured
import scipy.sparse as sp

from perturb_research.core import peak_memory_gb
from perturb_research.data.labels import describe
from perturb_research.data.preprocess import measure
from perturb_research.data.read import read_screen

REAL = Path(__file__).resolve().parents[2] / "shared/data/papalexi/papalexi_lowmoi.h5ad"


def of_its_shape(folder):
    "A file with as many cells, genes, targets and replicates, and as many zeros."
    rng, n = np.random.default_rng(0), 20729
    obs = pd.DataFrame({"target": np.resize(["non-targeting", *(f"T{i}" for i in range(25))], n), "bio_rep": rng.choice(["a", "b", "c"], n)}, index=[f"c{i}" for i in range(n)])
    X = sp.csr_matrix(rng.negative_binomial(.3, .3, (n, 299)).astype(np.float32))
    ad.AnnData(X, obs, pd.DataFrame(index=[f"G{i}" for i in range(299)])).write_h5ad(path := Path(folder, "screen.h5ad"))
    return path


def once(path):
    start = time.perf_counter()
    screen = read_screen(path)
    effects, _, _ = measure(screen, describe(screen)[0])
    return time.perf_counter() - start, effects


with tempfile.TemporaryDirectory() as folder:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else REAL if REAL.exists() else of_its_shape(folder)
    times = [once(path)[0] for _ in range(5)]
    effects = once(path)[1]
    print(f"{path.name}: {effects.n_obs} conditions x {effects.n_vars} genes with halves; median {np.median(times):.2f} s of 5 (worst {max(times):.2f} s), peak {peak_memory_gb():.2f} GB")
