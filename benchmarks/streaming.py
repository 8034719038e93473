"""Larger than memory: file -> effects with halves, in blocks; time and peak memory as the number of cells grows, beside scanpy's.

    python benchmarks/streaming.py            91,000 cells x 5,000 genes, 4 and 16 times as many. Limits: 3 s and 1.5 GB at once; time in proportion and memory flat within 20 %
    python benchmarks/streaming.py tahoe      1,000,000 cells x 62,710 genes, 1,500 nonzeros a cell. Limit: 4 GB
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from perturb_research.core import peak_memory_gb


def template(rng, cells, genes, per_cell):
    "CSR parts of cells with about `per_cell` nonzero counts each, drawn from genes of very different abundance."
    cumulative = np.cumsum(weights := rng.gamma(.5, size=genes)) / weights.sum()
    n = rng.poisson(per_cell, cells)
    columns = np.searchsorted(cumulative, rng.random(n.sum())).astype(np.int32).clip(max=genes - 1)
    rows = np.repeat(np.arange(cells), n)
    order = np.unique(rows * genes + columns)
    rows, columns = order // genes, (order % genes).astype(np.int32)
    return rng.geometric(.6, len(order)).astype(np.float32), columns, np.bincount(rows, minlength=cells)


def write(path, cells, genes, per_cell, perturbations, contexts, step):
    "An .h5ad of `cells` cells on disk, the same `step` cells over and over with labels of their own."
    rng = np.random.default_rng(0)
    data, columns, lengths = template(rng, step, genes, per_cell)
    times = cells // step
    obs = pd.DataFrame({"perturbation": pd.Categorical.from_codes(rng.integers(0, perturbations + 1, step * times), ["control", *(f"P{i}" for i in range(perturbations))]),
                        "cell_line": pd.Categorical.from_codes(rng.integers(0, contexts, step * times), [f"line{i}" for i in range(contexts)])})
    obs.index = "cell_" + obs.index.astype(str)
    with h5py.File(path, "w") as f:
        ad.io.write_elem(f, "obs", obs)
        ad.io.write_elem(f, "var", pd.DataFrame(index=[f"G{i}" for i in range(genes)]))
        X = f.create_group("X")
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array([step * times, genes])})
        for name, part in (("data", data), ("indices", columns)):
            stored = X.create_dataset(name, (len(part) * times,), part.dtype, chunks=(2**20,))
            for i in range(times): stored[i * len(part):(i + 1) * len(part)] = part
        X["indptr"] = np.r_[0, np.cumsum(np.tile(lengths, times))]
        f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


def ours(path):
    from perturb_research.data.labels import describe
    from perturb_research.data.preprocess import measure
    from perturb_research.data.read import read_screen
    import dask.array, distributed, scipy.sparse  # noqa: E401, F401  imports are not what is measured
    start = time.perf_counter()
    screen = read_screen(path, in_memory_gb=0)
    table, _ = describe(screen)
    effects, _, _ = measure(screen, table)
    return time.perf_counter() - start, effects.shape


def scanpys(path):
    import scanpy as sc
    start = time.perf_counter()
    screen = ad.read_h5ad(path)
    sc.pp.normalize_total(screen, target_sum=1e4)
    sc.pp.log1p(screen)
    screen.obs["half"] = (np.arange(screen.n_obs) % 2).astype(str)
    means = sc.get.aggregate(screen, ["perturbation", "half"], "mean")
    return time.perf_counter() - start, means.shape


def apart(how, *arguments):
    "What one of the functions above says, in a process of its own (a child starts with its parent's peak memory); None where it fails."
    done = subprocess.run([sys.executable, __file__, how, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode: print(f"  {how}: failed: {(done.stderr.strip().splitlines() or ['killed'])[-1][:200]}", flush=True)
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else None


def growth(folder):
    first = None
    for times in (1, 4, 16):
        path = Path(folder, f"{times}.h5ad")
        apart("write", path, 91_000 * times, 5_000, 850, 236, 1, 13_000)
        best = sorted(filter(None, (apart("ours", path) for _ in range(3 if times == 1 else 1))), key=lambda r: r["seconds"])
        mine, theirs = best[len(best) // 2], apart("scanpys", path) if times < 16 else None
        first = first or mine
        line = f"{91_000 * times:>9,} cells x 5,000 genes, {path.stat().st_size / 1e9:.1f} GB on disk: {mine['seconds']:.2f} s ({mine['seconds'] / first['seconds'] / times:.2f} of proportional), peak {mine['gb']:.2f} GB ({mine['gb'] / first['gb']:.2f} of the first)"
        print(line + (f"; scanpy {theirs['seconds']:.2f} s, {theirs['gb']:.2f} GB" if theirs else ""), flush=True)
        path.unlink()


def tahoe(folder):
    path = Path(folder, "tahoe.h5ad")
    apart("write", path, 1_000_000, 62_710, 1_560, 14, 50, 10_000)
    with h5py.File(path) as f: per_cell = len(f["X/data"]) / 1e6
    mine = apart("ours", path)
    rate = 1e6 / mine["seconds"]
    print(f"1,000,000 cells x 62,710 genes, {per_cell:,.0f} nonzeros a cell, {path.stat().st_size / 1e9:.0f} GB on disk -> {mine['shape'][0]} conditions x {mine['shape'][1]} genes: {mine['seconds']:.0f} s, peak {mine['gb']:.2f} GB; "
          f"{rate:,.0f} cells a second; 100 M cells: {1e8 / rate / 3600:.1f} h on this machine, {1e8 / rate / 60 / 32:.0f} min on 32 such", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]: print(json.dumps(write(sys.argv[2], *map(int, sys.argv[3:]))))
    elif sys.argv[1:2] in (["ours"], ["scanpys"]):
        seconds, shape = {"ours": ours, "scanpys": scanpys}[sys.argv[1]](Path(sys.argv[2]))
        print(json.dumps(dict(seconds=seconds, gb=peak_memory_gb(), shape=shape)))
    else:
        with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder: (tahoe if sys.argv[1:2] == ["tahoe"] else growth)(folder)
