"Notebook 04, larger than memory: blocks give what the whole gives, in every form, on a cluster, and when a worker dies."
import os
import signal

import anndata as ad
import dask.array as da
import h5py
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
import zarr
from anndata.experimental import read_elem_lazy
from conftest import SHARED, cells, needs_shared, run_here

from perturb_research.core import Problem
from perturb_research.data import preprocess
from perturb_research.data.labels import describe
from perturb_research.data.preprocess import measure
from perturb_research.data.read import read_screen


def screen(n=900, seed=0):
    "Cells of two lines and three plates, with a line without controls on one plate, empty cells, cells without label and a rare condition."
    rng = np.random.default_rng(seed)
    made = cells(n=n, genes=40, targets=("control", "KLF1", "AHR", "KLF1+AHR"), cell_line=rng.choice(["x", "y"], n), plate=rng.choice(list("abc"), n), seed=seed)
    made.obs.loc[(made.obs["cell_line"] == "y") & (made.obs["plate"] == "a") & (made.obs["perturbation"] == "control"), "perturbation"] = "AHR"
    made.obs.iloc[:5, 0], made.obs.iloc[5:8, 0] = "", "RARE"
    made.X = sp.csr_matrix(made.X.multiply(~np.isin(np.arange(n), range(20, 24))[:, None]), dtype=np.float32)
    return made


def close(a, b):
    "Equal to 1e-5 relative (of the layer's size), halves, moments, cells' numbers and report included."
    assert list(a.obs_names) == list(b.obs_names) and list(a.var_names) == list(b.var_names) and set(a.layers) == set(b.layers) >= {"mean", "half1", "half2"}
    for name in (None, *a.layers):
        x, y = a.layers[name] if name else a.X, b.layers[name] if name else b.X
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())
    np.testing.assert_allclose(a.var[["n_cells", "mean", "variance"]], b.var[["n_cells", "mean", "variance"]], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(a.uns["control_mean"], b.uns["control_mean"], rtol=1e-5)
    assert a.obs["n_cells"].tolist() == b.obs["n_cells"].tolist()


def stored(made, form, folder):
    "`made` on disk, as a screen whose X is read in blocks of 100 rows (CSC: 7 genes)."
    made = made.copy()
    made.X = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda X: X.toarray(), "zarr": sp.csr_matrix}[form](made.X)
    if form == "zarr": made.write_zarr(folder / "s.zarr")
    else: made.write_h5ad(folder / "s.h5ad")
    store = zarr.open_group(folder / "s.zarr", mode="r") if form == "zarr" else h5py.File(folder / "s.h5ad")
    lazy = made.copy()
    lazy.X = read_elem_lazy(store["X"], chunks=(made.n_obs, 7) if form == "csc" else (100, made.n_vars))
    return lazy


@pytest.mark.parametrize("form", ["csr", "csc", "dense", "zarr"])
def test_blocks_give_what_the_whole_gives(form, tmp_path):
    made = screen()
    table, _ = describe(made)
    whole, ready, report = measure(made, table, max_cells=200)
    blocks, sample, told = measure(stored(made, form, tmp_path), table, max_cells=200)
    close(blocks, whole)
    assert ready.n_obs == 891 and report["empty_cells"] == 4 and report["cells_without_label"] == 5
    assert {k: v for k, v in told.items() if k != "cells_sampled"} == {k: v for k, v in report.items() if k != "cells_sampled"}
    assert 150 < sample.n_obs == told["cells_sampled"] <= 200
    assert (sample.layers["counts"] != ready[sample.obs_names].layers["counts"]).nnz == 0 and sample.obs["n_counts"].equals(ready.obs.loc[sample.obs_names, "n_counts"])


def test_normalisation_is_scanpys():
    made = screen()
    _, ready, _ = measure(made, describe(made)[0])
    theirs = made[ready.obs_names].copy()
    sc.pp.normalize_total(theirs, target_sum=1e4)
    sc.pp.log1p(theirs)
    np.testing.assert_allclose(ready.X.toarray(), theirs.X.toarray(), rtol=1e-5)


def test_a_file_read_lazily_gives_what_the_file_in_memory_gives(tmp_path):
    made = screen(3000)
    made.obs["barcode"] = made.obs_names
    made.write_h5ad(tmp_path / "s.h5ad")
    results = [measure(s, describe(s)[0]) for s in (read_screen(tmp_path / "s.h5ad"), read_screen(tmp_path / "s.h5ad", in_memory_gb=0))]
    close(results[1][0], results[0][0])


def test_genes_of_one_name_add_up_in_blocks(tmp_path):
    made = screen()
    made.var_names = ["G0", "G0", *made.var_names[2:]]
    table, _ = describe(made)
    close(measure(stored(made, "csr", tmp_path), table)[0], measure(made, table)[0])
    with pytest.raises(Problem, match="stored by genes"): measure(stored(made, "csc", tmp_path), table)


@pytest.mark.parametrize("value, given, expected", [(np.nan, {}, "rows 500 to 599: 1 values are NaN"), (-3, {}, "rows 500 to 599: 1 values are negative"),
                                                    (2.5, {}, "fractional, such as 2.5, where counts are expected"), (700, dict(values="log"), "too large for a logarithm")])
def test_one_bad_value_far_into_the_file_is_found(value, given, expected, tmp_path):
    made = screen()
    X = made.X.tolil()
    X[555, 3] = value
    made.X = X.tocsr()
    with pytest.raises(Problem, match=expected) as e: measure(stored(made, "csr", tmp_path), describe(made)[0], **given)
    assert "\n" not in str(e.value)


def test_a_worker_that_dies_mid_way_changes_nothing(tmp_path, monkeypatch):
    from distributed import Client, LocalCluster
    made = screen(3000)
    table, _ = describe(made)
    lazy, killed = stored(made, "csr", tmp_path), []
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        monkeypatch.setenv("DASK_SCHEDULER", cluster.scheduler_address)
        results = preprocess.in_order

        def with_a_murder(tasks, submit, threads):
            for i, result in enumerate(results(tasks, submit, threads)):
                if i == 5:
                    with Client(cluster) as client: killed.extend(client.run(os.getpid).values())
                    os.kill(killed[0], signal.SIGKILL)
                yield result

        monkeypatch.setattr(preprocess, "in_order", with_a_murder)
        blocks, _, _ = measure(lazy, table)
    assert len(killed) == 2
    close(blocks, measure(made, table)[0])


def test_a_scheduler_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("DASK_SCHEDULER", "tcp://127.0.0.1:9")
    monkeypatch.setattr("perturb_research.data.preprocess.TIMEOUT", 1)
    made = screen()
    with pytest.raises(Problem, match="DASK_SCHEDULER=tcp://127.0.0.1:9: cannot be reached"): measure(stored(made, "csr", tmp_path), describe(made)[0])


def test_two_runs_in_blocks_are_the_same_to_the_last_bit(tmp_path):
    made = screen(2000)
    table, lazy = describe(made)[0], stored(made, "csr", tmp_path)
    a, b = (measure(lazy, table)[0] for _ in range(2))
    assert a.X.tobytes() == b.X.tobytes() and a.layers["half1"].tobytes() == b.layers["half1"].tobytes()


@needs_shared
@pytest.mark.parametrize("file", ["papalexi/papalexi_lowmoi", "norman/norman_mcfaline_cells"])
def test_real_screens_in_blocks(file, tmp_path):
    for how, gb in (("whole", 1.0), ("blocks", 0.0)): run_here("04_data.preprocess", tmp_path / how, dataset="screen", source=str(SHARED / f"{file}.h5ad"), in_memory_gb=gb)
    whole, blocks = (ad.read_h5ad(tmp_path / how / "data/processed/screen/effects.h5ad") for how in ("whole", "blocks"))
    close(blocks, whole)
    assert blocks.uns["dataset_id"] == whole.uns["dataset_id"]


def test_a_dask_array_is_never_made_whole(tmp_path):
    "The largest block that anybody asks for is the one that the file is cut into."
    made, seen = screen(2000), []

    def block(block_info=None):
        (a, b), _ = block_info[None]["array-location"]
        seen.append(b - a)
        return sp.csr_matrix(made.X[a:b])

    table, _ = describe(made)
    lazy = made.copy()
    lazy.X = da.map_blocks(block, chunks=((100,) * 20, (40,)), dtype=np.float32, meta=sp.csr_matrix((0, 0), dtype=np.float32))
    measure(lazy, table)
    assert set(seen) == {100} and len(seen) == 21  # and one to see what the numbers are
