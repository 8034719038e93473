"Cells over drugs, lines and plates: the same table from both of Tahoe's files, coefficients against their definitions, the facts of the real screen."
import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import SHARED, needs_shared, run_here

from perturb_research.core import Problem
from perturb_research.data.imbalance import (GRID, cell_grid, cells_of, count_rows, driver_lines, driver_response, driver_test, drug_doses, edistances, find_name,
                                             gini, imbalance, levels, samples_of, thresholds)

TAHOE = SHARED / "tahoe"


def grid(cells):
    "A grid from {(perturbation, context): cells}."
    return pd.DataFrame([(p, c, "plate1", 1., p == "control", n) for (p, c), n in cells.items()], columns=GRID)


@pytest.mark.parametrize("seed", range(3))
def test_gini_is_half_the_relative_mean_difference(seed):
    x = np.random.default_rng(seed).integers(0, 50, 30)
    pairs = [abs(a - b) for a, b in itertools.product(x, x)]
    assert gini(x) == pytest.approx(np.mean(pairs) / (2 * x.mean()))
    assert gini(x * 7) == pytest.approx(gini(x))


def test_gini_at_its_ends():
    assert gini([4, 4, 4]) == 0 and gini([0] * 9 + [1]) == pytest.approx(.9)
    assert np.isnan(gini([])) and np.isnan(gini([0, 0]))


def test_absent_pairs_count_and_controls_do_not():
    table = grid({("A", "x"): 10, ("B", "y"): 30, ("C", "z"): 5, ("control", "w"): 1000})
    pair = imbalance(table, 10).set_index("level").loc["pair"]
    assert (pair["n"], pair["absent"], pair["smallest"], pair["largest"]) == (9, 6, 0, 30)
    assert pair["under"] == pytest.approx(7 / 9)
    assert levels(table)["context"].index.tolist() == ["y", "x", "z"]


def test_thresholds_against_a_direct_count():
    rng = np.random.default_rng(0)
    cells = {(f"P{i}", f"L{j}"): int(rng.lognormal(3, 1.5)) for i in range(12) for j in range(5) if rng.random() > .1}
    kept = thresholds(grid(cells), 25)
    assert kept["threshold"].is_monotonic_increasing and kept["threshold"].iloc[-1] == max(cells.values())
    for row in kept.itertuples():
        left = {k: n for k, n in cells.items() if n >= row.threshold}
        assert row.cells == pytest.approx(sum(left.values()) / sum(cells.values()))
        assert row.pairs == pytest.approx(len(left) / 60)
        assert row.perturbations == pytest.approx(len({p for p, _ in left}) / 12)
        assert row.contexts == pytest.approx(len({c for _, c in left}) / 5)
        assert row.complete == pytest.approx(sum(all((f"P{i}", f"L{j}") in left for j in range(5)) for i in range(12)) / 12)


@pytest.mark.parametrize("text, expected", [
    ("[('Adagrasib', 0.05, 'uM')]", [("Adagrasib", .05)]), ("[('Erdafitinib ', 50, 'nM')]", [("Erdafitinib", .05)]), ("[('A (x, y)', 1.0, 'uM'), ('B', 5.0, 'µM')]", [("A (x, y)", 1.), ("B", 5.)])])
def test_dose_texts(text, expected):
    found = drug_doses(text)
    assert [n for n, _ in found] == [n for n, _ in expected] and np.allclose([d for _, d in found], [d for _, d in expected])


@pytest.mark.parametrize("text", ["", "Adagrasib", "[('A', 'high', 'uM')]", "[('A', 1.0, 'mg')]", "[('A', 1.0)]", "__import__('os')", "[('A', 1.0, 'uM'", "5"])
def test_broken_dose_texts_are_one_line(text):
    with pytest.raises(Problem, match="is not a list of") as e: drug_doses(text)
    assert "\n" not in str(e.value)


def metadata(counts, path, row_group=1000, seed=0):
    "Rows of cells, shuffled, as Tahoe's obs_metadata.parquet has them, for a table drug, cell_name, plate, conc, n_cells."
    rows = counts.loc[counts.index.repeat(counts["n_cells"])].sample(frac=1, random_state=seed)
    text = [f"[({drug!r}, {conc}, 'uM')]" for drug, conc in zip(rows["drug"], rows["conc"])]
    out = rows[["drug", "cell_name", "plate"]].assign(drugname_drugconc=text, BARCODE_SUB_LIB_ID=range(len(rows)), cell_line="CVCL")
    out.to_parquet(path, row_group_size=row_group, index=False)


def test_rows_of_cells_give_the_grid(tmp_path):
    rng = np.random.default_rng(0)
    names = ["Talc", "Selinexor ", "Dapagliflozin ((2S)-1,2-propanediol, hydrate)", "DMSO_TF"]
    counts = pd.DataFrame([(d, c, p, 0. if d == "DMSO_TF" else dose, int(rng.integers(1, 60))) for d in names for c in ("A549", "SW480") for p in ("plate1", "plate2") for dose in ((.05, 5.) if d != "DMSO_TF" else (0,))],
                          columns=["drug", "cell_name", "plate", "conc", "n_cells"])
    counts.sample(frac=1, random_state=0).to_parquet(tmp_path / "obs_cell_grid.parquet")
    metadata(counts, tmp_path / "obs_metadata.parquet", row_group=77)
    a, b = cell_grid(tmp_path / "obs_cell_grid.parquet"), cell_grid(tmp_path / "obs_metadata.parquet")
    pd.testing.assert_frame_equal(a, b)
    assert a["n_cells"].sum() == counts["n_cells"].sum() and "Selinexor" in set(a["perturbation"])
    assert a.loc[a["is_control"], "perturbation"].unique().tolist() == ["DMSO_TF"]
    rows = pd.read_parquet(tmp_path / "obs_metadata.parquet")
    assert count_rows(tmp_path / "obs_metadata.parquet", ["plate"])["n_cells"].tolist() == rows["plate"].value_counts().sort_index().tolist()


def test_files_that_are_no_grid_are_one_line(tmp_path):
    pd.DataFrame({"drug": ["A"], "plate": ["1"], "cell_line": ["x"]}).to_parquet(tmp_path / "half.parquet")
    (tmp_path / "words.parquet").write_text("no parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "half.parquet").read_bytes()[:200])
    with pytest.raises(Problem, match="no column 'drugname_drugconc'"): cell_grid(tmp_path / "half.parquet")
    for name in ("words", "cut"):
        with pytest.raises(Problem, match="not a readable parquet file"): cell_grid(tmp_path / f"{name}.parquet")


def test_names_are_found_in_any_case_and_unknown_ones_refused_with_close_ones():
    names = ["Adagrasib", "Selinexor", "Talc"]
    assert find_name("ADAGRASIB ", names) == "Adagrasib"
    with pytest.raises(Problem, match="did you mean 'Selinexor'"): find_name("selinexol", names)
    with pytest.raises(Problem, match="they are such as 'Adagrasib'"): find_name("zzzz", names)


def drivers(rng, n=40, carriers=8, shift=1.):
    "E-distances of two drugs in n lines; drug A moves the carriers more."
    lines = [f"L{i}" for i in range(n)]
    wide = pd.DataFrame(rng.uniform(.1, .5, (n, 6)), index=pd.Index(lines, name="cell_line"), columns=[f"[('{d}', {x}, 'uM')]" for d in "AB" for x in (.05, .5, 5.)])
    wide.iloc[:carriers, 2] += shift
    return wide, lines


def test_a_planted_driver_is_found_at_its_dose_alone(tmp_path):
    wide, lines = drivers(np.random.default_rng(0))
    wide.iloc[0, 2] = np.nan  # a line without a value is left out, and the number says so
    wide.to_csv(tmp_path / "e.tsv", sep="\t")
    distances = edistances(tmp_path / "e.tsv")
    response = driver_response(distances, "A", lines[:8], pd.DataFrame({"perturbation": "A", "context": lines, "dose": 5., "n_cells": 7}))
    tested = driver_test(response).set_index("dose")
    assert tested["n_driver"].tolist() == [8, 8, 7] and tested["n_other"].tolist() == [32] * 3
    assert tested.loc[5., "p_distance"] < 1e-4 and tested.loc[5., "p_place"] < 1e-3 and (tested.loc[[.05, .5], "p_distance"] > .01).all()
    assert set(response["n_cells"]) == {0, 7} and response["place"].between(0, 1).all()
    assert np.isnan(driver_test(response[response["driver"]])["p_distance"]).all()
    assert driver_test(response.iloc[:0]).empty


def test_driver_lines_need_gene_and_change():
    table = pd.DataFrame({"cell_name": ["a", "b", "c", "c"], "Driver_Gene_Symbol": ["KRAS", "KRAS", "TP53", "KRAS"], "Driver_ProtEffect_or_CdnaEffect": ["p.G12C", "p.G12D", "p.G12C", None]})
    assert driver_lines(table, "KRAS", "G12C") == ["a"] and driver_lines(table, "KRAS") == ["a", "b", "c"] and driver_lines(table, "BRAF") == []


@needs_shared
def test_adagrasib_in_tahoe():
    table = cell_grid(TAHOE / "obs_cell_grid.parquet")
    assert table["n_cells"].sum() == 100_648_790
    name = find_name("ADAGRASIB", table["perturbation"].unique())
    samples = samples_of(pd.read_parquet(TAHOE / "sample_metadata.parquet"), name)
    assert len(samples) == 18 and (samples["sample"].iloc[0], samples["sample"].iloc[-1]) == ("smp_1588", "smp_2836")
    assert sorted(samples["dose"].unique()) == [.05, .5, 5.]
    ids = pd.read_parquet(TAHOE / "cell_line_metadata.parquet").drop_duplicates("cell_name").set_index("cell_name")["Cell_ID_Cellosaur"]
    top = cells_of(table, name).head(3)
    assert list(zip(top["batch"], top["context"].map(ids), top["n_cells"])) == [("plate8", "CVCL_0546", 12447), ("plate13", "CVCL_0546", 11110), ("plate2", "CVCL_0459", 9590)]
    summary = imbalance(table, 100).set_index("level")
    assert summary["n"].tolist() == [379, 50, 18950]


@needs_shared
def test_drivers_in_tahoe():
    lines, table = pd.read_parquet(TAHOE / "cell_line_metadata.parquet"), cell_grid(TAHOE / "obs_cell_grid.parquet")
    carriers = driver_lines(lines, "KRAS", "G12C")
    assert lines["cell_name"].nunique() == 102 and table["context"].nunique() == 50
    assert len(carriers) == 16 and len(set(carriers) & set(table["context"])) == 6
    distances = edistances(TAHOE / "edistance_by_line_and_treatment.tsv")
    assert distances.shape == (50, 1138) and distances.columns.is_unique
    response = driver_response(distances, "Adagrasib", carriers, table)
    lowest = driver_test(response).iloc[0]
    assert (lowest["n_driver"], lowest["n_other"]) == (6, 44) and lowest["p_distance"] < 1e-3 and lowest["distance_driver"] > 2 * lowest["distance_other"]
    assert response.loc[response["line"] == "NCI-H2122", "n_cells"].min() < 100  # whose distances are noise


@needs_shared
def test_streamed_rows_of_one_plate_are_the_real_grid(tmp_path):
    real = pd.read_parquet(TAHOE / "obs_cell_grid.parquet")
    part = real[real["plate"] == "plate3"].assign(n_cells=lambda t: t["n_cells"] // 50 + 1)
    part.to_parquet(tmp_path / "obs_cell_grid.parquet")
    metadata(part, tmp_path / "obs_metadata.parquet", row_group=20_000)
    assert pq.ParquetFile(tmp_path / "obs_metadata.parquet").num_row_groups > 3
    pd.testing.assert_frame_equal(cell_grid(tmp_path / "obs_cell_grid.parquet"), cell_grid(tmp_path / "obs_metadata.parquet"))


@needs_shared
def test_notebook_on_tahoe(tmp_path):
    run_here("04b_data.imbalance", tmp_path, dataset="tahoe", profile="small", tahoe=str(TAHOE), drug="ADAGRASIB")
    record = (tmp_path / "runs" / "tahoe" / "04b_data.imbalance.record.json").read_text()
    assert "18 samples, smp_1588 to smp_2836" in record and "plate8 CVCL_0546 12447" in record and "16 of the 102 lines in the metadata carry it, 6 of the 50 in the screen" in record
    for slug in ("cell_imbalance", "imbalance_threshold", "drug_cells", "driver_response"): assert (tmp_path / "figures" / "tahoe" / f"{slug}.png").is_file()


def test_notebook_without_cells_leaves_notes_and_bad_parameters_one_line(tmp_path):
    obs = pd.DataFrame({"perturbation": ["A", "B"], "perturbation_type": "drug", "dose": 1., "time_h": np.nan, "context": "x", "n_cells": np.nan}, index=["A|drug|1||x", "B|drug|1||x"])
    folder = tmp_path / "data" / "processed" / "toy"
    folder.mkdir(parents=True)
    ad.AnnData(np.ones((2, 3), np.float32), obs, uns={"simulated": False}).write_h5ad(folder / "effects.h5ad")
    (folder / "preprocess.json").write_text('{"values": "effects"}')
    run_here("04b_data.imbalance", tmp_path, dataset="toy", profile="small")
    assert len(list((tmp_path / "figures" / "toy").glob("*.note.txt"))) == 4
    with pytest.raises(Problem, match="no such folder"): run_here("04b_data.imbalance", tmp_path, dataset="toy", profile="small", tahoe="/nowhere/at/all")
