"Every format reads to the same matrix, in memory and as a Dask array; whatever is wrong with a file is one line."
import gzip
import json
import shutil
import tracemalloc
import zipfile

import anndata as ad
import dask.array as da
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import scipy.sparse as sp
import zarr
from conftest import SHARED, cells, needs_shared

from perturb_research.core import Problem, sha256
from perturb_research.data import read
from perturb_research.data.labels import describe
from perturb_research.data.read import READERS, check_block, format_of, is_lazy, read_screen, reading, symbols

N, G = 60, 20


@pytest.fixture
def truth():
    "60 cells, 20 genes (one name twice), with counts in a layer."
    screen = cells(N, G, cell_type=np.resize(["x", "y"], N), note="text", plate="p1")
    screen.X.data[::7] = 0
    screen.X.eliminate_zeros()
    screen.var_names = [*screen.var_names[:-1], "G0"]
    return screen


# writers: each puts the screen into `folder` and gives the path to read

def h5ad(screen, folder, form=sp.csr_matrix):
    ad.AnnData(form(screen.X), screen.obs, screen.var).write_h5ad(folder / "a.h5ad")
    return folder / "a.h5ad"


def h5ad_csc(screen, folder): return h5ad(screen, folder, sp.csc_matrix)


def h5ad_dense(screen, folder): return h5ad(screen, folder, lambda X: X.toarray())


def zarr_folder(screen, folder, form=sp.csr_matrix):
    ad.AnnData(form(screen.X), screen.obs, screen.var).write_zarr(folder / "a.zarr")
    return folder / "a.zarr"


def zarr_dense(screen, folder): return zarr_folder(screen, folder, lambda X: X.toarray())


def labels_beside(screen, folder, name="obs.csv"):
    screen.obs.iloc[::-1].to_csv(folder / name, index_label="barcode")  # another order


def tenx_h5(screen, folder):
    "Version 3, genes x cells in CSC, as Cell Ranger writes it."
    with h5py.File(folder / "a.h5", "w") as f:
        group, X = f.create_group("matrix"), sp.csr_matrix(screen.X)
        group["data"], group["indices"], group["indptr"], group["shape"] = X.data.astype("i4"), X.indices.astype("i8"), X.indptr.astype("i8"), np.array([G, N], "i4")
        group["barcodes"] = screen.obs_names.to_numpy().astype("S")
        group["features/id"], group["features/name"] = np.array([f"ENSG{i:011d}" for i in range(G)], "S"), screen.var_names.to_numpy().astype("S")
        group["features/feature_type"], group["features/genome"] = np.array(["Gene Expression"] * G, "S"), np.array(["GRCh38"] * G, "S")
    labels_beside(screen, folder, "metadata.csv.gz")
    return folder / "a.h5"


def tenx_h5_v2(screen, folder):
    with h5py.File(folder / "a.h5", "w") as f:
        group, X = f.create_group("GRCh38"), sp.csr_matrix(screen.X)
        group["data"], group["indices"], group["indptr"], group["shape"] = X.data.astype("i4"), X.indices.astype("i8"), X.indptr.astype("i8"), np.array([G, N], "i4")
        group["barcodes"], group["gene_names"] = screen.obs_names.to_numpy().astype("S"), screen.var_names.to_numpy().astype("S")
        group["genes"] = np.array([f"ENSG{i:011d}" for i in range(G)], "S")
    labels_beside(screen, folder, "cells.csv")
    return folder / "a.h5"


def tenx_mtx(screen, folder, prefix=""):
    with gzip.open(folder / f"{prefix}matrix.mtx.gz", "wb") as f: scipy.io.mmwrite(f, sp.coo_matrix(screen.X.T).astype(int))
    with gzip.open(folder / f"{prefix}barcodes.tsv.gz", "wt") as f: f.write("\n".join(screen.obs_names) + "\n")
    with gzip.open(folder / f"{prefix}features.tsv.gz", "wt") as f: f.write("".join(f"ENSG{i:011d}\t{g}\tGene Expression\n" for i, g in enumerate(screen.var_names)))
    labels_beside(screen, folder)
    return folder


def tenx_mtx_prefixed(screen, folder):
    tenx_mtx(screen, folder, "GSM1_")
    return folder / "GSM1_matrix.mtx.gz"


def rows_of(screen, markers=True):
    "The screen as Tahoe's rows; every third cell is led by the marker."
    rows = []
    for i, x in enumerate(screen.X.toarray()):
        genes = np.flatnonzero(x)
        lead = ([1], [-2.0]) if markers and i % 3 == 0 else ([], [])
        target = screen.obs["perturbation"].iloc[i]
        rows.append({"genes": [*lead[0], *(genes + 3)], "expressions": [*lead[1], *x[genes].astype(float)], "drug": "DMSO_TF" if target == "control" else target, "sample": f"smp_{target}",
                     "BARCODE_SUB_LIB_ID": screen.obs_names[i], "cell_line_id": screen.obs["cell_type"].iloc[i], "moa-fine": "unclear", "canonical_smiles": f"C{target}", "pubchem_cid": "12", "plate": "plate1"})
    return pa.Table.from_pylist(rows, schema=pa.schema([("genes", pa.list_(pa.int64())), ("expressions", pa.list_(pa.float32())), *((c, pa.string()) for c in list(rows[0])[2:])]))


def tahoe_tables(screen, folder):
    folder.mkdir(exist_ok=True)
    names = list(screen.var_names)
    pd.DataFrame({"gene_symbol": names, "ensembl_id": [f"ENSG{i:011d}" for i in range(G)], "token_id": np.arange(G) + 3}).to_parquet(folder / "gene_metadata.parquet")
    doses = {"control": ("DMSO_TF", 0.0), "KLF1": ("KLF1", 0.5), "AHR": ("AHR", 5.0)}
    pd.DataFrame({"sample": [f"smp_{t}" for t in doses], "drugname_drugconc": [f"[({name!r}, {dose}, 'uM')]" for name, dose in doses.values()]}).to_parquet(folder / "sample_metadata.parquet")


def tahoe(screen, folder):
    "Two files of several row groups, the tables in `metadata` beside their folder, as on the hub."
    (folder / "data").mkdir()
    rows = rows_of(screen)
    pq.write_table(rows[:25], folder / "data/train-00000-of-00002.parquet", row_group_size=7)
    pq.write_table(rows[25:], folder / "data/train-00001-of-00002.parquet", row_group_size=50)
    tahoe_tables(screen, folder / "metadata")
    return folder / "data"


def tahoe_one_file(screen, folder):
    pq.write_table(rows_of(screen), folder / "rows.parquet", row_group_size=11)
    tahoe_tables(screen, folder)
    return folder / "rows.parquet"


def perturbfm(screen, folder):
    np.savez_compressed(folder / "data.npz", X_pert=screen.X.toarray(), X_control=np.zeros((N, G), "f4"), delta=screen.X.toarray() - 1, obs_idx=np.arange(N))
    obs = {"pert_id": list(screen.obs["perturbation"]), "context_id": list(screen.obs["cell_type"]), "batch_id": ["b"] * N, "is_control": [bool(p == "control") for p in screen.obs["perturbation"]], "covars": {"dose": [1.0] * N}}
    (folder / "meta.json").write_text(json.dumps({"schema_version": 1, "obs": obs, "var": list(screen.var_names), "metadata": {"source": "test"}}))
    return folder


def table(screen, folder, suffix, sep=","):
    frame = pd.concat([screen.obs, pd.DataFrame(screen.X.toarray(), screen.obs_names, screen.var_names)], axis=1)
    frame.to_csv(folder / f"a{suffix}", sep=sep)
    return folder / f"a{suffix}"


def csv(screen, folder): return table(screen, folder, ".csv")


def csv_gz(screen, folder): return table(screen, folder, ".csv.gz")


def tsv(screen, folder): return table(screen, folder, ".tsv", "\t")


def parquet(screen, folder):
    "The repeated gene under its name once more is no valid pandas parquet; Arrow writes it."
    frame = pd.concat([screen.obs, pd.DataFrame(screen.X.toarray(), screen.obs_names)], axis=1)
    columns = [pa.array(screen.obs_names), *(pa.array(frame.iloc[:, i]) for i in range(frame.shape[1]))]
    pq.write_table(pa.table(columns, names=["__index_level_0__", *screen.obs, *screen.var_names]), folder / "a.parquet")
    return folder / "a.parquet"


def gct(screen, folder, version="1.3"):
    X, obs = screen.X.toarray(), screen.obs
    lines = ["#1.3", f"{G}\t{N}\t1\t{obs.shape[1]}", "\t".join(["id", "pr_gene_title", *obs.index]), *("\t".join([c, "na", *obs[c].astype(str)]) for c in obs)]
    if version == "1.2": lines = ["#1.2", f"{G}\t{N}", "\t".join(["Name", "Description", *obs.index])]
    lines += ["\t".join([g, "a gene", *map(str, X[:, j])]) for j, g in enumerate(screen.var_names)]
    (folder / "a.gct").write_text("\n".join(lines) + "\n")
    return folder / "a.gct"


def gct_12(screen, folder):
    labels_beside(screen, folder)
    return gct(screen, folder, "1.2")


def gctx(screen, folder):
    with h5py.File(folder / "a.gctx", "w") as f:
        f["0/DATA/0/matrix"] = screen.X.toarray()
        f["0/META/ROW/id"] = screen.var_names.to_numpy().astype("S")
        f["0/META/COL/id"] = screen.obs_names.to_numpy().astype("S")
        for c in screen.obs: f[f"0/META/COL/{c}"] = screen.obs[c].to_numpy().astype("S")
    return folder / "a.gctx"


WRITERS = [h5ad, h5ad_csc, h5ad_dense, zarr_folder, zarr_dense, tenx_h5, tenx_h5_v2, tenx_mtx, tenx_mtx_prefixed, tahoe, tahoe_one_file, perturbfm, csv, csv_gz, tsv, parquet, gct, gct_12, gctx]
LAZY = [h5ad, h5ad_csc, h5ad_dense, zarr_folder, zarr_dense, tahoe, tahoe_one_file, gctx]


def dense(X):
    X = X.compute() if isinstance(X, da.Array) else X
    return np.asarray(X.toarray() if sp.issparse(X) else X)


def same(screen, truth):
    np.testing.assert_allclose(dense(screen.X), truth.X.toarray(), rtol=1e-6)
    assert list(screen.var_names) == list(truth.var_names)
    described, _ = describe(screen)
    assert list(described["perturbation"]) == list(truth.obs["perturbation"]) and list(described["context"]) == list(truth.obs["cell_type"])


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_every_format_reads_to_the_same_screen(write, truth, tmp_path):
    screen = read_screen(write(truth, tmp_path))
    assert not is_lazy(screen) and (isinstance(screen.X, np.ndarray) or screen.X.format == "csr")
    same(screen, truth)
    if write is not perturbfm: assert list(screen.obs_names) == list(truth.obs_names)


@pytest.mark.parametrize("write", LAZY, ids=lambda w: w.__name__)
def test_what_does_not_fit_is_a_dask_array_of_whole_rows_or_columns(write, truth, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_BLOCK", 2000)  # so small that this screen has several blocks
    screen = read_screen(write(truth, tmp_path), in_memory_gb=1e-6, wanted=["note"])
    assert is_lazy(screen) and list(screen.obs_names) == [str(i) for i in range(N)]
    assert screen.X.numblocks == ((1, screen.X.numblocks[1]) if write is h5ad_csc else (screen.X.numblocks[0], 1)) and max(screen.X.numblocks) > 1
    block = screen.X.blocks[0, 0].compute()
    assert isinstance(block, np.ndarray if write in (h5ad_dense, zarr_dense, gctx) else sp.csc_matrix if write is h5ad_csc else sp.csr_matrix)
    same(screen, truth)
    assert all(screen.obs[c].dtype == "category" for c in screen.obs if c in ("perturbation", "note", "drug", "cell_line", "dose"))
    assert "note" in screen.obs or write in (tahoe, tahoe_one_file)


@pytest.mark.parametrize("write", [tenx_h5, tenx_mtx, csv, gct, perturbfm, parquet], ids=lambda w: w.__name__)
def test_what_is_only_read_whole_must_fit(write, truth, tmp_path):
    with pytest.raises(Problem, match="in_memory_gb"): read_screen(write(truth, tmp_path), in_memory_gb=1e-6)


def test_every_reader_is_reached_by_a_file(truth, tmp_path):
    found = set()
    for write in WRITERS:
        (tmp_path / write.__name__).mkdir()
        found.add(format_of(write(truth, tmp_path / write.__name__)))
    assert found == set(READERS)


def test_layers_are_read_and_others_are_not(truth, tmp_path):
    screen = truth.copy()
    for name in ("counts", "half1", "velocity"): screen.layers[name] = screen.X.copy()
    screen.uns["effect_scale"] = "z"
    screen.write_h5ad(tmp_path / "a.h5ad")
    for limit in (2, 1e-6):
        got = read_screen(tmp_path / "a.h5ad", limit)
        assert sorted(got.layers) == ["counts", "half1"] and got.uns["effect_scale"] == "z"
        np.testing.assert_array_equal(dense(got.layers["counts"]), truth.X.toarray())
        assert isinstance(got.layers["counts"], da.Array) == is_lazy(got)


def test_tahoe_rows_have_doses_lines_and_structures(truth, tmp_path):
    screen = read_screen(tahoe(truth, tmp_path))
    assert screen.obs.loc[screen.obs["drug"] == "KLF1", "drugname_drugconc"].unique().tolist() == ["[('KLF1', 0.5, 'uM')]"]
    assert {"cell_line", "moa-fine", "canonical_smiles", "pubchem_cid", "plate", "sample"} <= set(screen.obs)
    described, report = describe(screen)
    assert report["columns"]["perturbation"] == "drug" and set(described["dose"].dropna()) == {0.5, 5.0} and described["is_control"].sum() == 20


def test_tables_may_lie_elsewhere(truth, tmp_path):
    path = tahoe(truth, tmp_path)
    shutil.move(tmp_path / "metadata", tmp_path / "elsewhere")  # and as downloads lie in their cache
    for what in ("gene", "sample"):
        (tmp_path / f"tahoe_{what}_metadata").mkdir()
        shutil.copy(tmp_path / f"elsewhere/{what}_metadata.parquet", tmp_path / f"tahoe_{what}_metadata/tahoe_{what}_metadata.parquet")
    same(read_screen(path), truth)
    for what in ("gene", "sample"): shutil.rmtree(tmp_path / f"tahoe_{what}_metadata")
    with pytest.raises(Problem, match="gene_metadata.parquet; it is not in .*data or .*metadata or "): read_screen(path)
    same(read_screen(path, tables=tmp_path / "elsewhere"), truth)
    other = tenx_h5(truth, tmp_path)
    shutil.move(tmp_path / "metadata.csv.gz", tmp_path / "mine.csv.gz")
    with pytest.raises(Problem, match="obs.csv"): read_screen(other)
    same(read_screen(other, tables=tmp_path / "mine.csv.gz"), truth)


def test_perturbfm_without_controls_holds_differences(truth, tmp_path):
    perturbfm(truth, tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["obs"]["is_control"] = [False] * N
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    np.testing.assert_array_equal(read_screen(tmp_path).X, truth.X.toarray() - 1)


# memory

def test_a_lazy_read_does_not_load_the_matrix(tmp_path):
    rng, n = np.random.default_rng(0), 4000
    X = sp.csr_matrix((rng.random(n * 500, dtype="f4"), rng.integers(0, 2000, n * 500, dtype="i4"), np.arange(0, n * 500 + 1, 500)), shape=(n, 2000))
    obs = pd.DataFrame({"perturbation": np.resize(["control", "A"], n), "barcode_text": [f"long text of row {i}" for i in range(n)]}, index=[f"c{i}" for i in range(n)])
    ad.AnnData(X, obs).write_h5ad(tmp_path / "a.h5ad")
    read_screen(tmp_path / "a.h5ad", 1e-3)  # what is imported on the way
    tracemalloc.start()
    screen = read_screen(tmp_path / "a.h5ad", 1e-3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert is_lazy(screen) and list(screen.obs) == ["perturbation"] and peak < 4e6 < X.data.nbytes


def test_lazy_columns(tmp_path):
    screen = cells(N, G, guide=[f"g{i}" for i in range(N)], n_umi=np.arange(N), phase=pd.Categorical(np.resize(["G1", "S"], N)), dose=np.nan)
    screen.obs["batch"] = pd.array([1, None] * 30, dtype="Int64")
    screen.write_h5ad(tmp_path / "a.h5ad")
    assert list(read_screen(tmp_path / "a.h5ad", 1e-6).obs) == ["perturbation", "guide", "phase", "dose", "batch"]
    got = read_screen(tmp_path / "a.h5ad", 1e-6, wanted=["n_umi"]).obs
    assert got["n_umi"].tolist() == list(range(N)) and got["guide"].tolist() == list(screen.obs["guide"]) and got["batch"].isna().sum() == 30


def test_the_layout_of_2020_keeps_its_categories_apart(truth, tmp_path):
    def old(f):
        obs = f["obs"]
        codes, categories, attributes = obs["perturbation/codes"][:], obs["perturbation/categories"][:], dict(obs.attrs)
        del obs["perturbation"], obs["cell_type"], obs["note"], obs["plate"]
        obs["__categories/perturbation"], obs["perturbation"] = categories, codes
        obs["perturbation"].attrs["categories"] = obs["__categories/perturbation"].ref
        obs["score"] = np.arange(N)
        for name in ("perturbation", "score"): obs[name].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        obs.attrs.update(attributes | {"encoding-version": "0.1.0", "column-order": np.array(["perturbation", "score"], dtype=object)})
    path = edit(h5ad(truth, tmp_path), old)
    whole, lazy = read_screen(path), read_screen(path, 1e-6)
    assert list(whole.obs) == ["perturbation", "score"] and list(lazy.obs) == ["perturbation"] and is_lazy(lazy)
    assert list(whole.obs["perturbation"]) == list(lazy.obs["perturbation"]) == list(truth.obs["perturbation"])


# genes

ENSEMBL = [f"ENSG{i:011d}.3" for i in range(G)]


def test_ids_become_symbols_by_the_files_own_column_or_a_given_table(truth, tmp_path):
    screen = truth.copy()
    screen.var = pd.DataFrame({"gene_name": [*truth.var_names[:-1], ""]}, index=ENSEMBL)
    screen.write_h5ad(tmp_path / "a.h5ad")
    assert list(read_screen(tmp_path / "a.h5ad").var_names) == [*truth.var_names[:-1], ENSEMBL[-1]]
    screen.var = pd.DataFrame(index=ENSEMBL)
    screen.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(Problem, match="SET='preprocess.genes="): read_screen(tmp_path / "a.h5ad")
    given = pd.DataFrame({"gene_symbol": truth.var_names[:-1], "ensembl_id": [e[:15] for e in ENSEMBL[:-1]], "token_id": range(3, G + 2)})
    given.to_parquet(tmp_path / "genes.parquet")
    given.to_csv(tmp_path / "genes.csv", index=False)
    for file in ("genes.parquet", "genes.csv"):
        assert list(read_screen(tmp_path / "a.h5ad", genes=tmp_path / file).var_names) == [*truth.var_names[:-1], ENSEMBL[-1]]
    for bad, expected in [(given.rename(columns={"gene_symbol": "colour"}), "no column gene_symbol"), (given.assign(ensembl_id="ENSG99999999999"), "none of its ids")]:
        bad.to_csv(tmp_path / "genes.csv", index=False)
        with pytest.raises(Problem, match=expected): read_screen(tmp_path / "a.h5ad", genes=tmp_path / "genes.csv")


def test_entrez_ids_take_the_symbols_beside_them():
    assert list(symbols(pd.DataFrame({"pr_gene_symbol": ["MYC", "AHR"]}, index=["4609", "196"]))) == ["MYC", "AHR"]
    assert list(symbols(pd.DataFrame(index=["0", "1"]))) == ["0", "1"]  # numbers alone say nothing


# identity

def test_identity_follows_bytes_and_names(truth, tmp_path):
    path = zarr_folder(truth, tmp_path)
    first = sha256(path)
    assert first == sha256(shutil.copytree(path, tmp_path / "copy.zarr"))
    file = next(f for f in sorted((tmp_path / "copy.zarr").rglob("*")) if f.is_file())
    file.rename(file.with_name("other"))
    assert sha256(tmp_path / "copy.zarr") != first
    assert sha256(csv(truth, tmp_path)) != sha256(tsv(truth, tmp_path))


# bad input

def problem(path, **options):
    "The one line for what is wrong with `path`, read in memory and, block by block, as a Dask array."
    with pytest.raises(Problem) as whole: read_screen(path, **options)
    assert "\n" not in str(whole.value)
    return str(whole.value)


CUT = [w for w in WRITERS if w not in (tenx_mtx, tahoe, zarr_folder, zarr_dense, perturbfm)]


@pytest.mark.parametrize("share", [0, .01, .3, .6, .95])
@pytest.mark.parametrize("write", CUT, ids=lambda w: w.__name__)
def test_truncated_files(write, share, truth, tmp_path):
    path = write(truth, tmp_path)
    whole = path.read_bytes()
    cut = whole[: int(share * len(whole))]
    if write in (csv, tsv): cut = cut[: cut.rfind(b",4" if write is csv else b"\t4") + 1] if share > .1 else cut  # inside a row, not at its end
    path.write_bytes(cut)
    assert problem(path).startswith(path.name)


@pytest.mark.parametrize("write", [tahoe, zarr_folder, perturbfm], ids=lambda w: w.__name__)
def test_truncated_parts_of_folders(write, truth, tmp_path):
    path, said = write(truth, tmp_path), []
    for part in sorted(f for f in path.rglob("*") if f.is_file()):
        whole = part.read_bytes()
        for share in (0, .5):
            part.write_bytes(whole[: int(share * len(whole))])
            try: same(read_screen(path), truth)  # a part that is not needed, such as what zarr's consolidated metadata repeat
            except Problem as e: said.append(str(e))
        part.write_bytes(whole)
    assert len(said) >= 4 and not any("\n" in line for line in said)
    same(read_screen(path), truth)


def test_missing_chunks_of_a_zarr_matrix_are_not_zeros(truth, tmp_path):
    path = zarr_folder(truth, tmp_path)
    for part in ("data", "indices"):
        chunk = next(f for f in sorted((path / "X" / part).rglob("*")) if f.is_file() and f.name[0] not in ".z")
        whole = chunk.read_bytes()
        chunk.unlink()
        for limit in (2, 1e-6):
            with pytest.raises(Problem, match="1 of 1 chunks"): read_screen(path, limit)
        chunk.write_bytes(whole)


def edit(path, change):
    with h5py.File(path, "r+") as f: change(f)
    return path


def replace(f, key, values):
    attributes = dict(f[key].attrs)
    del f[key]
    f[key] = values
    f[key].attrs.update(attributes)


def out_of_range(f): f["X/indices"][5] = G
def negative_index(f): f["X/indices"][5] = -1
def pointers_fall(f): f["X/indptr"][5] = 10**6
def pointers_short(f): replace(f, "X/indptr", f["X/indptr"][:-3])
def pointers_start(f): f["X/indptr"][0] = 1
def values_short(f): replace(f, "X/data", f["X/data"][:-3])
def wrong_shape(f): f["X"].attrs["shape"] = (N + 1, G)
def short_obs(f): replace(f, "obs/perturbation/codes", f["obs/perturbation/codes"][:-1])
def short_index(f): replace(f, "obs/_index", f["obs/_index"][:-1])
def short_var(f): replace(f, "var/_index", f["var/_index"][:-1])
def no_x(f): del f["X"]
def no_obs(f): del f["obs"]
def no_var(f): del f["var"]
def no_column(f): del f["obs/cell_type"]
def no_indptr(f): del f["X/indptr"]
def text_values(f): replace(f, "X/data", f["X/data"][:].astype("S4"))


BROKEN = {out_of_range: "lie outside 0 to 19", negative_index: "from -1", pointers_fall: "row pointers", pointers_short: "row pointers", pointers_start: "row pointers", values_short: "row pointers",
          wrong_shape: "row pointers", short_obs: "'perturbation' has 59 rows and the matrix 60", short_index: "'_index' has 59 rows", short_var: "'_index' has 19 rows and the matrix 20", no_x: "has no X",
          no_obs: "has no obs", no_var: "has no var", no_column: "'cell_type' is missing", no_indptr: "damaged", text_values: "instead of numbers"}


@pytest.mark.parametrize("change", BROKEN, ids=lambda c: c.__name__)
def test_broken_h5ad(change, truth, tmp_path):
    path = edit(h5ad(truth, tmp_path), change)
    assert BROKEN[change] in problem(path)
    with pytest.raises(Problem, match=BROKEN[change]): read_screen(path, 1e-6).X.compute(scheduler="sync")


def test_numbers_written_as_text(truth, tmp_path):
    path = edit(h5ad_dense(truth, tmp_path), lambda f: replace(f, "X", f["X"][:].astype("S4")))
    assert "instead of numbers" in problem(path)
    frame = pd.read_csv(csv(truth, tmp_path), index_col=0)
    frame["G4"] = frame["G4"].map("{}x".format)
    frame["G3"] = frame["G3"].astype(object)
    frame.iloc[7, frame.columns.get_loc("G3")] = "n.d."
    frame.drop(columns="G4").to_csv(tmp_path / "a.csv")
    assert "column 'G3' holds 'n.d.' among numbers" in problem(tmp_path / "a.csv")
    frame.drop(columns=["G3", "G4"]).assign(G5=frame["G5"].astype(str)).to_parquet(tmp_path / "b.parquet")
    assert "column 'G5' holds text among numbers" in problem(tmp_path / "b.parquet")
    lines = gct(truth, tmp_path).read_text().replace("\t0.0", "\tzero", 1)
    (tmp_path / "a.gct").write_text(lines)
    assert "holds 'zero' for gene" in problem(tmp_path / "a.gct")


def test_csv_with_ragged_rows(truth, tmp_path):
    lines = csv(truth, tmp_path).read_text().splitlines()
    for line, expected in [(lines[4] + ",1,2", "rows differ in length"), (lines[4].rpartition(",")[0], "row 4 has no number in column 'G0'")]:
        (tmp_path / "a.csv").write_text("\n".join([*lines[:4], line, *lines[5:]]))
        assert expected in problem(tmp_path / "a.csv")


def test_tables_without_genes_or_rows(tmp_path):
    for text in ("", "perturbation,context\nA,x\n", "perturbation,G1\n"):
        (tmp_path / "a.csv").write_text(text)
        assert any(word in problem(tmp_path / "a.csv") for word in ("is empty", "damaged"))


def test_gct_whose_second_line_is_wrong(truth, tmp_path):
    lines = gct(truth, tmp_path).read_text().splitlines()
    for second in (f"{G + 1}\t{N}\t1\t4", f"{G}\t{N - 1}\t1\t4", f"{G}\t{N}", "many"):
        (tmp_path / "a.gct").write_text("\n".join([lines[0], second, *lines[2:]]))
        assert problem(tmp_path / "a.gct").startswith("a.gct")
    (tmp_path / "a.gct").write_text("\n".join(["#1.1", *lines[1:]]))
    assert "expected #1.2" in problem(tmp_path / "a.gct")


def test_gctx_whose_tables_do_not_fit(truth, tmp_path):
    path = edit(gctx(truth, tmp_path), lambda f: replace(f, "0/META/ROW/id", f["0/META/ROW/id"][:-1]))
    assert "60 profiles and 19 genes" in problem(path)
    assert "has no 0/META/ROW/id" in problem(edit(path, lambda f: f.pop("0/META/ROW/id")))


def test_hdf5_of_something_else(tmp_path):
    for name, expected in [("a.h5ad", "has no X and no obs and no var"), ("a.h5", "has no 10x matrix"), ("a.gctx", "has no 0/DATA")]:
        with h5py.File(tmp_path / name, "w") as f: f["weights"] = np.ones(3)
        assert expected in problem(tmp_path / name)
        (tmp_path / name).write_text("words")
        assert "is not HDF5" in problem(tmp_path / name)


def test_10x_indices_never_leave_the_matrix(truth, tmp_path):
    path = edit(tenx_h5(truth, tmp_path), lambda f: f["matrix/indices"].__setitem__(3, 10**9))
    assert "lie outside" in problem(path)
    edit(path, lambda f: (f["matrix/indices"].__setitem__(3, 0), f["matrix/indptr"].__setitem__(2, 10**6)))
    assert "row pointers" in problem(path)
    folder = tmp_path / "mtx"
    folder.mkdir()
    tenx_mtx(truth, folder)
    with gzip.open(folder / "matrix.mtx.gz", "rt") as f: text = f.read().splitlines()
    last = text[-1].split()
    with gzip.open(folder / "matrix.mtx.gz", "wt") as f: f.write("\n".join([*text[:-1], f"{G + 5} {last[1]} 1"]) + "\n")
    assert "damaged" in problem(folder)


def test_labels_that_do_not_belong(truth, tmp_path):
    path = tenx_h5(truth, tmp_path)
    with gzip.open(tmp_path / "metadata.csv.gz", "wt") as f: f.write("barcode,perturbation\nq1,A\n")
    assert "has none of the cells" in problem(path)
    with gzip.open(tmp_path / "metadata.csv.gz", "wt") as f: f.write("barcode,perturbation\nc1,A\nc1,B\n")
    assert "'c1' stands twice" in problem(path)


def test_tahoe_rows_that_do_not_fit_their_tables(truth, tmp_path):
    path, rows = tahoe_one_file(truth, tmp_path), rows_of(truth)
    def swapped(column, values):
        i = rows.schema.get_field_index(column)
        pq.write_table(rows.set_column(i, rows.schema.field(i), pa.array(values, rows.schema.field(i).type)), path, row_group_size=11)
        return path
    lists = rows["genes"].to_pylist()
    for token in (G + 3, 2, -4, 10**12):
        assert f"token {token} is no gene" in problem(swapped("genes", [lists[0], [token, *lists[1][1:]], *lists[2:]]))
        with pytest.raises(Problem, match="is no gene"): read_screen(path, 1e-6).X.compute(scheduler="sync")
    assert "genes and" in problem(swapped("genes", [lists[0], lists[1][1:], *lists[2:]]))
    assert "'smp_9' is not in sample_metadata.parquet" in problem(swapped("sample", ["smp_9", *rows["sample"].to_pylist()[1:]]))
    pq.write_table(rows.drop(["sample", "expressions"]), path)
    assert "lacks the columns expressions, sample" in problem(path)
    pq.write_table(rows, path)
    samples = pd.read_parquet(tmp_path / "sample_metadata.parquet")
    samples.drop(columns="drugname_drugconc").to_parquet(tmp_path / "sample_metadata.parquet")
    assert "drugname_drugconc" in problem(path)


def test_a_row_group_larger_than_memory_is_refused(truth, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_BLOCK", 100)
    assert "row groups of about 10,000 rows" in problem(tahoe_one_file(truth, tmp_path), in_memory_gb=1e-6)


class Bomb:
    "Writes a file when it is unpickled."
    path = ""
    def __reduce__(self): return open, (type(self).path, "w")


def test_pickles_are_never_loaded(truth, tmp_path):
    Bomb.path = str(tmp_path / "loaded")
    perturbfm(truth, tmp_path)
    np.savez(tmp_path / "data.npz", X_pert=np.array([[Bomb()]], dtype=object))
    assert "holds Python objects" in problem(tmp_path)
    folder = zarr_folder(truth, tmp_path)
    shutil.rmtree(folder / "X")
    import numcodecs
    zarr.create_array(folder / "X", shape=(N, G), dtype="f4", chunks=(N, G), filters=None, zarr_format=2, attributes={"encoding-type": "array", "encoding-version": "0.2.0"})
    meta = json.loads((folder / "X/.zarray").read_text())
    meta |= {"filters": [{"id": "pickle", "protocol": 5}], "compressor": None}
    (folder / "X/.zarray").write_text(json.dumps(meta).replace("pickle", "\\u0070ickle"))
    (folder / "X/0.0").write_bytes(bytes(numcodecs.Pickle().encode(np.array([Bomb()], dtype=object))))
    with pytest.raises(Problem, match="pickled Python objects"): read_screen(folder)
    for name in ("a.pkl", "a.npy", "a.xyz", "a.h5ad.gz"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        assert "expected a file .h5ad" in problem(tmp_path / name)
    assert not (tmp_path / "loaded").exists()


def test_small_archives_do_not_fill_the_memory(truth, tmp_path):
    with gzip.open(tmp_path / "a.csv.gz", "wb") as f: f.write(b"perturbation,G1\n" + b"0" * 20_000_000)
    tracemalloc.start()
    assert "in_memory_gb" in problem(tmp_path / "a.csv.gz", in_memory_gb=.001)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    (tmp_path / "mtx").mkdir()
    tenx_mtx(truth, tmp_path / "mtx")
    with gzip.open(tmp_path / "mtx/barcodes.tsv.gz", "wb") as f: f.write(b"0" * 20_000_000)
    assert "barcodes.tsv.gz: holds more" in problem(tmp_path / "mtx", in_memory_gb=.001)
    perturbfm(truth, tmp_path)
    with zipfile.ZipFile(tmp_path / "data.npz", "w", zipfile.ZIP_DEFLATED) as f: f.writestr("X_pert.npy", b"0" * 20_000_000)
    assert "in_memory_gb" in problem(tmp_path, in_memory_gb=.001)


def test_perturbfm_that_does_not_fit(truth, tmp_path):
    perturbfm(truth, tmp_path)
    whole = json.loads((tmp_path / "meta.json").read_text())
    for change, expected in [({"var": whole["var"][:-1]}, "19 genes"), ({"obs": {}}, "0 rows")]:
        (tmp_path / "meta.json").write_text(json.dumps(whole | change))
        assert expected in problem(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"obs": whole["obs"]}))
    assert "has no 'var'" in problem(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(whole))
    np.savez(tmp_path / "data.npz", other=np.ones(3))
    assert "neither X_pert nor delta" in problem(tmp_path)
    (tmp_path / "data.npz").unlink()
    assert "has no data.npz" in problem(tmp_path)


def test_empty_missing_and_forbidden(truth, tmp_path, monkeypatch):
    truth[:0].copy().write_h5ad(tmp_path / "a.h5ad")
    assert "is empty (0, 20)" in problem(tmp_path / "a.h5ad")
    truth[:, :0].copy().write_h5ad(tmp_path / "a.h5ad")
    assert "is empty (60, 0)" in problem(tmp_path / "a.h5ad")
    ad.AnnData(None, truth.obs, truth.var).write_h5ad(tmp_path / "a.h5ad")
    assert "X" in problem(tmp_path / "a.h5ad")
    assert "no such file" in problem(tmp_path / "none.h5ad")
    (tmp_path / "folder").mkdir()
    assert "is no screen that can be read" in problem(tmp_path / "folder")
    with pytest.raises(Problem, match="mend its permissions"):
        with reading(tmp_path / "a.h5ad"): raise PermissionError


def test_blocks_are_checked_wherever_they_are_computed(truth, tmp_path):
    "Another process opens the file again; what it finds there is the same line."
    path = h5ad(truth, tmp_path)
    screen = read_screen(path, 1e-6)
    edit(path, out_of_range)
    with pytest.raises(Problem, match="a.h5ad: X: sparse indices"): screen.X.compute(scheduler="processes", num_workers=1)


def test_check_block_reads_columns_too():
    block = sp.csc_matrix(np.eye(3))
    assert check_block(block, "X") is block
    block.indices[1] = 3
    with pytest.raises(Problem, match="outside 0 to 2"): check_block(block, "X")


# real files

@needs_shared
def test_the_layout_of_before_2020():
    screen = read_screen(SHARED / "kang/kang_pbmc_ifnb.h5ad")
    assert screen.shape == (1975, 6998) and screen.X.format == "csr" and "cell_type" in screen.obs
    with pytest.raises(Problem, match="in_memory_gb"): read_screen(SHARED / "kang/kang_pbmc_ifnb.h5ad", 1e-3)


@needs_shared
@pytest.mark.parametrize("file", ["norman/norman_mcfaline_cells", "papalexi/papalexi_lowmoi", "carpool/carpool_effects", "l1000/l1000_ht115_355drugs"])
def test_real_screens_are_the_same_on_disk_and_in_memory(file):
    whole, lazy = read_screen(SHARED / f"{file}.h5ad"), read_screen(SHARED / f"{file}.h5ad", 1e-4)
    assert is_lazy(lazy) and sorted(whole.layers) == sorted(lazy.layers)
    np.testing.assert_array_equal(dense(whole.X), dense(lazy.X))
    a, b = describe(whole)[0], describe(lazy)[0]
    for column in a: assert a[column].astype(str).tolist() == b[column].astype(str).tolist(), column


@needs_shared
def test_ensembl_ids_become_symbols_by_tahoes_gene_table():
    var = pd.DataFrame(index=["ENSG00000000003.15", "ENSG00000000005"])
    assert list(symbols(var, pd.read_parquet(SHARED / "tahoe/gene_metadata.parquet"))) == ["TSPAN6", "TNMD"]


def test_an_index_without_a_name_can_be_written_again(truth, tmp_path):
    "What DataFrame.to_csv writes: the first cell of the header is empty."
    screen = read_screen(csv(truth, tmp_path))
    assert screen.obs.index.name is None
    screen.write_h5ad(tmp_path / "again.h5ad")


def drugs(**columns):
    "What is said of a screen of DMSO, a, b, c and again a, whose other `columns` have these five values, and its names."
    screen = cells(column="drug", targets=("DMSO", "a", "b", "c", "a"), dose=1.0)
    which = np.resize(np.arange(5), screen.n_obs)
    for name, values in columns.items(): screen.obs[name] = np.array(values, dtype=object)[which]
    table, report = describe(screen)
    return report["several_compounds"], set(table["perturbation"].astype(str)) - {"control"}


def test_a_name_for_several_compounds_is_said_in_one_line():
    ids = ["DMSO", "BRD-1", "BRD-2", "BRD-3", "BRD-4"]
    same, other = ["", "CC", "CO", "CN", "CC"], ["", "CC", "CO", "CN", "CCC"]
    line, names = drugs(sm_lincs_id=ids)  # nothing but the identifier tells
    assert line == "1 of 3 names in 'drug' stand for several 'sm_lincs_id' and are read as one drug each, such as 'a' (BRD-1, BRD-4); SET='preprocess.perturbation=sm_lincs_id' takes 'sm_lincs_id' instead"
    assert names == {"a", "b", "c"}
    assert drugs(pert_id=ids, smiles=same)[0].startswith("1 of 3 names in 'drug' stand for several 'pert_id' and are read as one drug each")
    line, names = drugs(pert_id=ids, smiles=other)
    assert line == "1 of 3 names in 'drug' stand for several 'smiles' and are told apart by a number, as 'a #1'; SET='preprocess.perturbation=pert_id' takes 'pert_id' instead"
    assert names == {"a #1", "a #2", "b", "c"}
    line, names = drugs(smiles=other)  # no column to take instead
    assert line.endswith("as 'a #1'") and len(names) == 4


@pytest.mark.parametrize("column, values", [
    ("drug_id", ["DMSO", "a_1nM", "b_1nM", "c_1nM", "a_10nM"]),           # adds a dose to the name
    ("pert_id", ["DMSO", "BRD-1", "BRD-2", "BRD-3", "BRD-2"]),            # one identifier with two names speaks against neither
    ("pert_id", ["DMSO", "BRD-1", "BRD-2", "BRD-3", "-666"]),             # missing, LINCS' way
    ("pert_id", ["DMSO", "BRD-1", "BRD-2", "BRD-3", None]),
    ("well", ["A1", "A2", "A3", "A4", "A5"]), ("sgrna", ["g0", "g1", "g2", "g3", "g4"]), ("plate", list("pqrst")), ("dose_value", [0., 1, 1, 1, 10])])
def test_a_finer_column_that_identifies_no_compound_raises_no_alarm(column, values):
    smiles = ["", "CC", "CO", "CN", "CC"]
    assert drugs(smiles=smiles, **{column: values}) == ("", {"a", "b", "c"})


@pytest.mark.parametrize("kind", ["trt_sh", "trt_xpr", "CRISPRi", "knockout"])
def test_several_guides_of_a_gene_raise_no_alarm(kind):
    screen = cells(column="pert_iname", targets=("NT", "KLF1", "AHR", "KLF1"), pert_type=kind)
    screen.obs["pert_id"] = np.resize(["NT", "TRCN1", "TRCN2", "TRCN3"], screen.n_obs)
    table, report = describe(screen)
    assert report["several_compounds"] == "" and set(table["perturbation"]) == {"control", "KLF1", "AHR"}


@needs_shared
def test_names_of_l1000_that_stand_for_several_compounds():
    screen = read_screen(SHARED / "l1000/l1000_ht115_355drugs.h5ad")
    treated = screen.obs[screen.obs["pert_type"] == "trt_cp"]
    ids = treated.groupby("pert_iname", observed=True)["pert_id"].nunique()
    said = f"{(ids > 1).sum()} of {len(ids)} names in 'condition' stand for several"
    line = describe(screen)[1]["several_compounds"]
    assert line.startswith(said + " 'SMILES' and are told apart by a number") and line.endswith("SET='preprocess.perturbation=pert_id' takes 'pert_id' instead")
    table, report = describe(screen, dict(perturbation="pert_id"))
    assert report["several_compounds"] == "" and table.loc[~table["is_control"], "perturbation"].nunique() == treated["pert_id"].nunique()
    names = screen.obs["pert_iname"].astype(str)
    screen.obs = screen.obs.drop(columns="canonical_smiles").assign(SMILES=[f"{name} has one structure" for name in names])
    assert describe(screen)[1]["several_compounds"].startswith(said + " 'pert_id' and are read as one drug each, such as 'curcumin' (BRD-")


@needs_shared
@pytest.mark.parametrize("file", ["norman/norman_effects", "carpool/carpool_effects", "norman/norman_mcfaline_cells", "papalexi/papalexi_lowmoi", "kang/kang_pbmc_ifnb"])
def test_other_screens_raise_no_alarm(file):
    screen = read_screen(SHARED / f"{file}.h5ad")
    assert describe(screen)[1]["several_compounds"] == ""
