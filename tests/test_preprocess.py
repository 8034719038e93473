"Notebook 04: detection on real screens, effects against a plain computation, bad input."
import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import SHARED, cells, launch, needs_shared, run_here, run_notebook

from perturb_research.core import Problem
from perturb_research.data.labels import describe
from perturb_research.data.preprocess import is_condition_level, measure, read_effects, value_kind
from perturb_research.data.read import read_screen

# what each file holds, from its own documentation: column, conditions, values, contexts, types, batches
TRUTH = {
    "norman/norman_effects": dict(column="condition", perturbations=204, combos=100, contexts={"K562"}, types={"CRISPRa"}, level="condition"),
    "carpool/carpool_effects": dict(column="condition", perturbations=146, combos=118, contexts={"THP-1"}, types={"knockdown"}, level="condition"),
    "norman/norman_mcfaline_cells": dict(column="perturbation", perturbations=33, combos=15, contexts={"k562", "A172", "T98G", "U87MG"}, types={"CRISPRa", "CRISPRi"}, level="log"),
    "papalexi/papalexi_lowmoi": dict(column="target", perturbations=25, combos=0, contexts={"unknown"}, types={"unknown"}, level="counts", batches=3),
    "kang/kang_pbmc_ifnb": dict(column="condition", perturbations=1, combos=0, types={"stimulus"}, level="log",
                                contexts={"CD4T", "CD14+Mono", "B", "CD8T", "NK", "FCGR3A+Mono", "Dendritic"}),
    "l1000/l1000_ht115_355drugs": dict(column="condition", perturbations=354, combos=0, contexts={"HT115"}, types={"drug"}, level="bulk", batches=2, time=6.0),
}


@needs_shared
@pytest.mark.parametrize("file", TRUTH)
def test_detection_on_real_screens(file):
    screen, truth = read_screen(SHARED / f"{file}.h5ad"), TRUTH[file]
    table, report = describe(screen)
    treated = table[~table["is_control"]]
    assert report["columns"]["perturbation"] == truth["column"]
    assert treated["perturbation"].nunique() == truth["perturbations"]
    combos = treated.loc[~treated["perturbation_type"].isin(["drug", "stimulus"]), "perturbation"]
    assert combos[combos.str.contains("+", regex=False)].nunique() == truth["combos"]
    assert set(table["context"]) == truth["contexts"]
    assert set(treated["perturbation_type"]) == truth["types"]
    assert is_condition_level(table) == (truth["level"] == "condition")
    assert table["batch"].nunique() == truth.get("batches", 1)
    if "time" in truth: assert set(table["time_h"]) == {truth["time"]}
    if truth["level"] != "condition":
        rows = treated.groupby(["perturbation", "dose"], dropna=False, observed=True).size().median()
        assert value_kind(screen.X, rows) == truth["level"]
        assert table["is_control"].any()


@needs_shared
def test_doses_are_read_for_drugs_only():
    genes, _ = describe(read_screen(SHARED / "norman/norman_mcfaline_cells.h5ad"))
    drugs, _ = describe(read_screen(SHARED / "l1000/l1000_ht115_355drugs.h5ad"))
    assert genes["dose"].isna().all()
    assert drugs.loc[~drugs["is_control"], "dose"].gt(0).all() and drugs.loc[drugs["is_control"], "dose"].isna().all()


def by_hand(screen):
    "Effects by definition, a loop over conditions and batches on dense numbers."
    X = np.log1p(screen.X.toarray() / np.asarray(screen.X.sum(1)) * 1e4)
    obs, found = screen.obs.reset_index(drop=True), {}
    for p in sorted(set(obs["perturbation"]) - {"control"}):
        total = 0
        for b in sorted(set(obs["plate"])):
            mine, control = (obs.index[(obs["perturbation"] == q) & (obs["plate"] == b)] for q in (p, "control"))
            total = total + (X[mine] - X[control].mean(0)).sum(0)
        found[p] = total / (obs["perturbation"] == p).sum()
    return found


def processed(screen, **given):
    "Effects, cells and report of a screen of cells."
    table, report = describe(screen)
    effects, ready, measured = measure(screen, table, **given)
    return effects, ready, report | measured


def test_the_controls_of_a_file_of_effects_are_its_means_less_its_effects():
    "Of every line, those of other lines apart; none where effects are no differences of such means."
    rng = np.random.default_rng(0)
    control, effect = rng.gamma(2, 1, (2, 5)), rng.normal(size=(4, 5))
    obs = pd.DataFrame(dict(perturbation=["a", "b", "a", "b"], perturbation_type="drug", dose=1.0, time_h=24.0, context=["x", "x", "y", "y"], is_control=False, n_cells=50), index=list("1234"))
    screen = ad.AnnData(effect, obs, pd.DataFrame(index=list("ABCDE")), uns=dict(effect_scale="mean_log1p"), layers=dict(mean=effect + control[[0, 0, 1, 1]]))
    found = read_effects(screen, obs, {}).uns
    assert list(found["control_contexts"]) == ["x", "y"]
    np.testing.assert_allclose(found["control_mean"], control, rtol=1e-5)
    screen.uns["effect_scale"] = "log_ratio"
    assert "control_mean" not in read_effects(screen, obs, {}).uns


def test_effects_match_the_definition():
    rng = np.random.default_rng(1)
    screen = cells(n=600, plate=rng.choice(["a", "b", "c"], 600))
    effects, expected = processed(screen)[0], by_hand(screen)
    for row, name in enumerate(effects.obs["perturbation"]): np.testing.assert_allclose(effects.X[row], expected[name], atol=2e-5)


def test_halves_are_disjoint_and_balanced_within_batch():
    _, ready, _ = processed(cells(n=600, plate=np.repeat(["a", "b"], 300)))
    counts = ready.obs.groupby(["perturbation", "batch", "half"], observed=True).size().unstack()
    assert (counts[1] - counts[2]).abs().max() <= 1


def test_dropped_conditions_need_min_cells():
    screen = cells(n=60)
    screen.obs.loc[screen.obs_names[:3], "perturbation"] = "RARE"
    effects, ready, report = processed(screen, min_cells=5)
    assert "RARE" not in set(effects.obs["perturbation"]) and "RARE" in set(ready.obs["perturbation"]) and list(report["dropped"].values()) == [3]
    with pytest.raises(Problem, match="min_cells=1000"): processed(screen, min_cells=1000)


def test_spellings_merge_and_duplicates_add_up():
    screen = cells(n=90, targets=("control", "KLF1", "klf1 ", "AHR", "KLF1"))
    screen.var_names = ["G0", "G0", *[f"G{i}" for i in range(2, 20)]]
    _, ready, report = processed(screen)
    assert set(ready.obs["perturbation"]) == {"control", "KLF1", "AHR"}
    assert report["merged"] == {"klf1": "KLF1"} and report["duplicated_genes"] == ["G0"]
    assert ready.layers["counts"].sum() == screen.X.sum() and ready.n_vars == 19


def test_cells_without_a_label_are_left_out_and_counted(tmp_path):
    screen = cells(n=90)
    screen.obs.loc[screen.obs_names[:7], "perturbation"] = None
    screen.obs.loc[screen.obs_names[7:9], "perturbation"] = "nan"
    screen.write_h5ad(tmp_path / "my_screen.h5ad")
    run_here("04_data.preprocess", tmp_path / "out", dataset="my_screen", source=str(tmp_path / "my_screen.h5ad"))
    assert ad.read_h5ad(tmp_path / "out/data/processed/my_screen/cells.h5ad").n_obs == 81
    assert '"cells_without_label": 9' in (tmp_path / "out/data/processed/my_screen/preprocess.json").read_text()


def test_labels_that_differ_from_a_gene_in_case_alone_are_that_gene():
    "Else the target would count as not measured, and not be hidden where targets are."
    screen = cells(n=120, targets=("control", "stat1", "Jak2", "STAT1", "stat1+JAK2", "stat1"))
    screen.var_names = ["STAT1", "JAK2", *screen.var_names[2:]]
    table, report = describe(screen)
    assert set(table["perturbation"]) == {"control", "STAT1", "JAK2", "JAK2+STAT1"} and report["merged"]["Jak2"] == "JAK2"
    drugs, _ = describe(cells(column="drug", targets=("DMSO", "g1", "G2"), dose=1.0))
    assert {"g1", "G2"} <= set(drugs["perturbation"])  # a drug's name is no gene


def test_drug_names_are_never_split():
    screen = cells(column="drug", targets=("DMSO", "sulfamethoxazole+trimethoprim", "A_B", "trimethoprim"), dose=1.0)
    table, _ = describe(screen)
    assert {"sulfamethoxazole+trimethoprim", "A_B"} <= set(table["perturbation"])


def test_controls_missing_in_one_context_of_a_batch_fall_back_to_the_context():
    screen = cells(n=300, plate=np.repeat(["a", "b"], 150))
    screen = screen[~((screen.obs["plate"] == "b") & (screen.obs["perturbation"] == "control"))].copy()
    assert np.isfinite(processed(screen)[0].X).all()


def damaged(folder, case):
    "The path of a file with this fault in it."
    path, screen = folder / "my_screen.h5ad", cells(cell_type="x")
    if case == "missing file": return folder / "none.h5ad"
    if case == "empty matrix": screen = screen[:0]
    if case == "NaN": screen.X.data[3] = np.nan
    if case == "infinite": screen.X.data[3] = np.inf
    if case == "negative counts": screen.X.data[3] = -1
    if case == "no control": screen = screen[screen.obs["perturbation"] != "control"]
    if case == "control missing in one context": screen.obs["cell_type"] = np.where(screen.obs["perturbation"] == "AHR", "y", "x")
    if case == "no perturbation column": screen.obs = screen.obs.rename(columns={"perturbation": "colour"})
    screen.copy().write_h5ad(path)
    if case == "truncated": path.write_bytes(path.read_bytes()[:9000])
    if case == "not HDF5": path.write_text("gene,cell\n")
    return path


EXPECTED = {"missing file": "no such file", "not HDF5": "is not HDF5", "truncated": "cut short or damaged", "empty matrix": "is empty", "NaN": "NaN or infinite",
            "infinite": "NaN or infinite", "negative counts": "are negative", "no control": "no column with perturbations and controls", "no perturbation column": "the file has: colour",
            "control missing in one context": "context 'y' (20 cells) has no control"}
LAUNCHED = "missing file", "truncated", "NaN"  # found by the command, by the first notebook that reads the file, by the second


@pytest.mark.parametrize("case", EXPECTED)
def test_bad_input_is_one_line(tmp_path, case):
    "Some by the command behind `make`, the others by the cells of the two notebooks that it would start."
    (tmp_path / "in").mkdir()
    out, file = tmp_path / "out", damaged(tmp_path / "in", case)
    if case in LAUNCHED:
        done = launch(out, "figures", "--dataset", file)
        said = done.stderr.strip()
        assert done.returncode != 0 and "Traceback" not in done.stderr + done.stdout
    else:
        with pytest.raises(Problem) as problem:
            for name in ("03_data.chembl", "04_data.preprocess"): run_here(name, out, dataset="my_screen", source=str(file))
        said = str(problem.value)
    assert EXPECTED[case] in said and len(said.splitlines()) == 1, said
    left = [p for p in (tmp_path / "out").rglob("[!.]*") if p.is_file() and ("figures" in p.parts or "processed" in p.parts) and not p.name.endswith(".note.txt")]
    assert not left, left


def test_read_only_input_is_fine(tmp_path):
    path = tmp_path / "my_screen.h5ad"
    cells(n=90).write_h5ad(path)
    before = path.read_bytes()
    path.chmod(0o444)
    run_here("04_data.preprocess", tmp_path / "out", dataset="my_screen", source=str(path))
    assert path.read_bytes() == before and (tmp_path / "out/data/processed/my_screen/effects.h5ad").is_file()


def test_bad_parameters_are_refused(tmp_path):
    path = tmp_path / "my_screen.h5ad"
    cells(n=90).write_h5ad(path)
    unknown = run_notebook("04_data.preprocess", tmp_path / "out", dataset="my_screen", source=path, min_cels=5)
    assert unknown.returncode != 0 and "did you mean 'min_cells'" in unknown.stderr
    with pytest.raises(Problem, match="expected an integer"): run_here("04_data.preprocess", tmp_path / "out", dataset="my_screen", source=str(path), min_cells="many")
    assert not (tmp_path / "out/data").exists()
    for word in ("min_cels=5", "min_cells=many"):
        asked = launch(tmp_path / "out", "figures", "--dataset", path, "--set", f"preprocess.{word}")
        assert asked.returncode != 0 and len(asked.stderr.strip().splitlines()) == 1


def test_unwritable_output_is_one_line(tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    done = launch(tmp_path / "out", "figures")
    assert done.returncode != 0 and len(done.stderr.strip().splitlines()) == 1 and "cannot be written" in done.stderr
