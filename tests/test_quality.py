"Depth, confounding and target engagement: planted faults are found, clean screens are left in peace."
import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import SHARED, needs_shared, run_here
from scipy.stats.contingency import association

from perturb_research.data.labels import CONDITION, condition_ids, describe
from perturb_research.data.quality import chance_distance, confounding, cramers_v, depth, screen_v, target_engagement


def groups(tables, controls=(100, 100, 100), context="x", dose=np.nan):
    "Groups of one context from {perturbation: cells in each batch}; `controls` likewise."
    rows = [(p, f"b{i}", n, p == "control") for p, ns in {"control": controls, **tables}.items() for i, n in enumerate(ns) if n]
    table = pd.DataFrame(rows, columns=["perturbation", "batch", "n_cells", "is_control"])
    return table.assign(context=context, dose=dose, time_h=np.nan, perturbation_type="CRISPRi")


def randomised(seed, perturbations=60, shares=(.5, .3, .2)):
    "A screen whose cells are dealt out to the batches at random."
    rng = np.random.default_rng(seed)
    return {f"P{i}": rng.multinomial(rng.integers(5, 200), shares) for i in range(perturbations)}


@pytest.mark.parametrize("seed", range(5))
def test_a_randomised_screen_is_not_flagged(seed):
    clean = groups(randomised(seed), controls=(200, 120, 80))
    found = confounding(clean)
    assert set(found["verdict"]) == {"balanced"}
    assert abs(found["excess"].mean()) < .05  # the distance is what chance gives
    assert screen_v(clean) < .1


def test_planted_confounding_is_found():
    tables = randomised(0) | {"HERE": (0, 90, 0), "THERE": (0, 0, 0, 70), "TILTED": (3, 2, 100), "MOSTLY": (0, 20, 0, 80)}
    found = confounding(groups(tables, controls=(200, 120, 80, 0))).set_index("perturbation")
    assert found.loc[["HERE", "THERE", "TILTED", "MOSTLY"], "verdict"].tolist() == ["one batch", "without controls", "uneven", "without controls"]
    assert found.loc["MOSTLY", ["batches", "batches_with_controls"]].tolist() == [2, 1]
    assert found.loc["MOSTLY", "uncontrolled"] == pytest.approx(.8)
    assert (found.drop(["HERE", "THERE", "TILTED", "MOSTLY"])["verdict"] == "balanced").all()


def test_one_batch_needs_more_than_a_few_cells_and_a_second_batch():
    assert confounding(groups({"A": (0, 2, 0)}))["verdict"].tolist() == ["balanced"]  # two cells fall together often
    assert confounding(groups({"A": (50,)}, controls=(100,)))["verdict"].tolist() == ["balanced"]


def test_contexts_and_doses_are_kept_apart():
    apart = pd.concat([groups({"A": (50, 50, 50)}, context="x", dose=1.), groups({"A": (0, 90, 0)}, context="y", dose=5.)])
    assert confounding(apart).set_index("context")["verdict"].to_dict() == {"x": "balanced", "y": "one batch"}
    doses = pd.concat([groups({"A": (90, 0)}, controls=(50, 50), dose=.5), groups({"A": (0, 90)}, controls=(50, 50), dose=5.)])
    assert confounding(doses)["verdict"].tolist() == ["balanced"]
    assert confounding(doses, CONDITION)["verdict"].tolist() == ["one batch"] * 2
    empty = pd.concat([apart, groups({"GONE": (1,)}).assign(n_cells=0)])
    assert "GONE" not in set(confounding(empty)["perturbation"])
    categories = apart.astype({c: "category" for c in ("perturbation", "context", "batch")})
    pd.testing.assert_frame_equal(confounding(categories).astype({"perturbation": object, "context": object}), confounding(apart))


def test_v_is_unbiased_where_the_plain_one_is_not():
    tables = [np.random.default_rng(seed).multinomial(400, np.full(200, 1 / 200)).reshape(50, 4) for seed in range(20)]
    assert min(association(t[t.sum(1) > 0], "cramer") for t in tables) > .25
    assert np.mean([cramers_v(t) for t in tables]) < .08
    assert cramers_v(np.diag([100, 200, 300])) == pytest.approx(1, abs=.01)
    assert np.isnan(cramers_v([[1, 2]])) and np.isnan(cramers_v([[3, 0], [4, 0]]))


@pytest.mark.parametrize("n", [1, 7, 100])
def test_chance_distance_is_the_mean_over_random_deals(n):
    shares = np.array([.6, .25, .1, .05])
    dealt = np.random.default_rng(n).multinomial(n, shares, size=40_000) / n
    assert chance_distance(n, shares)[0] == pytest.approx((np.abs(dealt - shares).sum(1) / 2).mean(), rel=.02)


def test_depth_names_outlying_batches():
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"batch": np.repeat(list("abcdef"), [100] * 5 + [3]), "n_counts": rng.lognormal(7, .3, 503), "n_genes": rng.lognormal(6, .2, 503)})
    obs.loc[obs["batch"] == "b", ["n_counts", "n_genes"]] /= 4
    obs.loc[obs["batch"] == "c", "n_counts"] *= 3
    assert depth(obs, "batch").set_index("batch")["outlying"].to_dict() == {"a": "", "b": "few counts, few genes", "c": "many counts", "d": "", "e": "", "f": "few cells"}
    blank = depth(obs.assign(n_counts=np.nan), "batch").set_index("batch")
    assert blank.loc["b", "outlying"] == "few genes" and blank["n_counts_med"].isna().all()


def screen(kind, own, n=30, genes=80, seed=0):
    "Effects of n perturbations on noise, each with `own` added to its own gene; a third has no effect on it."
    rng = np.random.default_rng(seed)
    X = rng.normal(0, .05, (n, genes))
    for i in range(n): X[i, i] = own if i % 3 else abs(X[i, i]) * -np.sign(own) / 10
    obs = pd.DataFrame({"perturbation": [f"G{i}" for i in range(n)], "perturbation_type": kind, "context": "x"}, index=[f"G{i}|{kind}|||x" for i in range(n)])
    effects = ad.AnnData(X.astype(np.float32), obs, pd.DataFrame(index=[f"G{i}" for i in range(genes)]), uns={"effect_scale": "mean_log1p"})
    effects.layers["mean"] = effects.X + 1.5
    return effects


@pytest.mark.parametrize("kind, own", [("CRISPRa", .8), ("CRISPRi", -.8), ("knockdown", -.8), ("knockout", -.8), ("knockout", .8)])
def test_planted_targets_are_engaged_and_the_others_are_not(kind, own):
    found = target_engagement(screen(kind, own))
    assert (found["engaged"] == (np.arange(30) % 3 > 0)).all()
    hit = found[found["engaged"]]
    assert (hit["rank"] == 1).all() and (hit["z"].abs() > 5).all()
    assert np.allclose(hit["left"], np.expm1(1.5 + own) / np.expm1(1.5), rtol=.3) and np.allclose(found["control"], 1.5)


@pytest.mark.parametrize("kind, own", [("CRISPRa", -.8), ("CRISPRi", .8)])
def test_a_change_in_the_wrong_direction_is_no_engagement(kind, own):
    found = target_engagement(screen(kind, own))
    assert not found["engaged"][np.arange(30) % 3 > 0].any()


def test_chance_engages_few():
    effects = screen("CRISPRi", -.8, n=60)
    effects.X[:] = np.random.default_rng(1).normal(0, .05, effects.shape)
    assert target_engagement(effects)["engaged"].mean() < .15


def test_combinations_are_asked_for_each_gene_and_drugs_for_none():
    effects = screen("CRISPRa", .8)
    effects.obs["perturbation"] = ["G1+G2", "G1", "G1+UNMEASURED", "control+no gene", *effects.obs["perturbation"][4:]]
    effects.X[0, 1:3] = 1
    found = target_engagement(effects).set_index(["condition", "gene"])
    assert found.loc["G0|CRISPRa|||x"].index.tolist() == ["G1", "G2"] and found.loc["G0|CRISPRa|||x", "combination"].all()
    assert found.loc["G2|CRISPRa|||x"].index.tolist() == ["G1"]
    effects.obs["perturbation_type"] = "drug"
    assert len(target_engagement(effects)) == 0


@needs_shared
def test_norman_guides_activate_their_genes():
    file = ad.read_h5ad(SHARED / "norman" / "norman_effects.h5ad")
    effects = ad.AnnData(file.X, describe(file)[0], file.var, uns={"effect_scale": "log_ratio"})
    found = target_engagement(effects)
    single = found[~found["combination"]]
    assert len(found) == 173 and len(single) == 57 and single["engaged"].all() and (found["effect"] > 0).all()
    assert single["rank"].median() <= 5 and found["left"].isna().all()


@needs_shared
def test_papalexi_knockouts_lower_their_transcripts():
    cells = ad.read_h5ad(SHARED / "papalexi" / "papalexi_lowmoi.h5ad")
    table, _ = describe(cells, kind="knockout")
    condition = condition_ids(table).where(~table["is_control"], "")
    X = sp.csr_matrix(cells.X, dtype=float)
    X = sp.diags(1e4 / np.asarray(X.sum(1)).ravel()) @ X
    X.data = np.log1p(X.data)
    mean = {c: np.asarray(X[(condition == c).to_numpy()].mean(0)).ravel() for c in sorted(condition.unique())}
    control = mean.pop("")
    obs = table.assign(condition=condition).drop_duplicates("condition").set_index("condition").loc[list(mean)]
    effects = ad.AnnData(np.array([*mean.values()]) - control, obs, cells.var, layers={"mean": np.array([*mean.values()])}, uns={"effect_scale": "mean_log1p"})
    found = target_engagement(effects).set_index("gene")
    assert len(found) == 9 and found["engaged"].all() and (found["left"] < .7).all()
    assert found.loc["STAT1", "left"] < .1
    assert set(confounding(table.groupby([*CONDITION, "batch", "is_control"], dropna=False, observed=True).size().reset_index(name="n_cells"))["verdict"]) == {"balanced"}


def processed(out, groups, effects, cells=None):
    "The files of notebook 04 for a data set `toy` below `out`."
    folder = out / "data" / "processed" / "toy"
    folder.mkdir(parents=True)
    effects.write_h5ad(folder / "effects.h5ad")
    if cells is not None:
        cells.write_h5ad(folder / "cells.h5ad")
        groups.to_parquet(folder / "groups.parquet")
        (folder / "preprocess.json").write_text('{"values": "counts", "dropped": {"A|CRISPRi|||x": 4}}')


def test_notebook_says_which_perturbation_lies_in_one_batch(tmp_path):
    table = groups(randomised(0, 8) | {"HERE": (0, 90, 0), "G1": (30, 30, 30), "A": (2, 1, 1)})
    obs = table.loc[table.index.repeat(table["n_cells"])].assign(n_counts=1000., n_genes=300.).drop(columns="n_cells")
    obs.index = [f"c{i}" for i in range(len(obs))]
    effects = screen("CRISPRi", -.8)
    effects.obs = effects.obs.assign(dose=np.nan, time_h=np.nan, n_cells=50)
    effects.uns["simulated"] = False
    processed(tmp_path, table, effects, ad.AnnData(sp.csr_matrix((len(obs), 3), dtype=np.float32), obs))
    run_here("04a_data.quality", tmp_path, dataset="toy", profile="small")
    record = (tmp_path / "runs" / "toy" / "04a_data.quality.record.json").read_text()
    assert "lie in one batch alone: HERE" in record and "dropped for too few: 1" in record and "never engaged: G0, G12" in record
    for slug in ("cell_quality", "cells_per_condition", "batch_confounding", "target_engagement"): assert (tmp_path / "figures" / "toy" / f"{slug}.png").is_file()


def test_notebook_leaves_notes_for_effects_of_drugs(tmp_path):
    effects = screen("drug", .8)
    effects.obs = effects.obs.assign(dose=1., time_h=np.nan, n_cells=np.nan)
    effects.uns["simulated"] = False
    processed(tmp_path, None, effects)
    run_here("04a_data.quality", tmp_path, dataset="toy", profile="small")
    notes = {p.name.split(".")[0]: p.read_text() for p in (tmp_path / "figures" / "toy").glob("*.note.txt")}
    assert set(notes) == {"cell_quality", "cells_per_condition", "batch_confounding", "target_engagement"}
    assert "need not change the transcript" in notes["target_engagement"]
