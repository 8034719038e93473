"""Families that need cells: parity with cell-eval, scanpy, SciPy and scikit-learn; the formulas of VCC 2026 and GEARS by hand; traps."""
import dataclasses
import warnings
from importlib.util import find_spec

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn import metrics as sk

from perturb_research.core import Problem
from perturb_research.evaluate import cell_panels as cp
from perturb_research.evaluate.metrics import Choices
from perturb_research.evaluate.panels import FAMILIES, Cells, Comparison, panel_scores

G, PANEL = 100, ["G005", "G017", "G033", "G048", "G060", "G091"]
GENES = np.array([f"G{i:03d}" for i in range(G)])
MINE = [name for name, metric in FAMILIES.items() if metric.needs in ("cells", "counts")]


def screen(seed, size=1., shift=0., cells=40, controls=80):
    "`Cells` of six perturbations of 100 genes, groups of unequal size; `shift` moves the controls too."
    truth = np.random.default_rng(3)
    level = truth.gamma(2, 3, G) + 1
    effect = truth.normal(0, .8, (6, G)) * (truth.random((6, G)) < .25)
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(-1, 6), [controls, *(cells + 5 * np.arange(6))])
    rate = level * np.exp(size * np.vstack([np.full(G, shift) * (np.arange(G) % 3 == 0), effect])[group + 1])
    counts = rng.poisson(rate * rng.lognormal(0, .3, (len(group), 1)) * rng.gamma(4, .25, rate.shape)).astype("float32")
    return Cells(np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype("float32"), group, counts)


def compare(real, predicted, conditions=PANEL, **fields):
    return Comparison.of_cells(real, predicted, conditions, [tuple(c.split("+")) for c in conditions], GENES, **fields)


def values(comparison, names):
    "Values by metric: (n,) arrays, or numbers where the panel has one."
    table = panel_scores(comparison, names)
    return {m: t["value"].to_numpy() if len(t) > 1 else t["value"].iloc[0] for m, t in table.groupby("metric", sort=False)}


@pytest.fixture(scope="module")
def pair(): return compare(screen(10), screen(100, .7))


def anndata(cells):
    return ad.AnnData(cells.X.astype(float), pd.DataFrame({"target": np.array([*PANEL, "control"])[cells.group]}, index=np.arange(len(cells.group)).astype(str)), pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def theirs(pair, tmp_path_factory):
    "Every metric of cell-eval's profile 'full', by cell-eval: perturbation x metric."
    cell_eval = pytest.importorskip("cell_eval")
    given = dict(control_pert="control", pert_col="target", num_threads=1, outdir=str(tmp_path_factory.mktemp("cell_eval")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judge = cell_eval.MetricsEvaluator(anndata(pair.predicted_cells), anndata(pair.real_cells), **given)
        table, _ = judge.compute(profile="full", write_csv=False, break_on_error=True)
    return table.to_pandas().set_index("perturbation").loc[PANEL]


RENAMED = {"discrimination_score_l1": "pds_l1", "discrimination_score_l2": "pds_l2", "discrimination_score_cosine": "pds_cosine"}


def test_every_metric_of_cell_eval(pair, theirs):
    assert len(theirs.columns) == 28
    mine = values(pair, "cell_eval")
    for name in theirs:
        np.testing.assert_allclose(np.broadcast_to(mine[f"cell_eval.{RENAMED.get(name, name)}"], 6), theirs[name], rtol=1e-6, atol=1e-9, err_msg=name)
    assert theirs["de_nsig_counts_real"].min() > 5 and theirs["overlap_at_N"].between(.1, .95).all()  # something was compared


def test_clusters_of_forty_conditions():
    "Six conditions make two clusters at best; forty show that neighbours, Leiden and resolutions agree."
    cell_eval = pytest.importorskip("cell_eval.metrics._anndata")
    pairs = pytest.importorskip("cell_eval._types")
    pytest.importorskip("igraph")
    rng = np.random.default_rng(1)
    centre = rng.normal(2, .5, (5, G))[np.arange(40) % 5]
    names = [f"P{i:02d}" for i in rng.permutation(40)]
    sides = []
    for noise in (.8, 1.6):
        group = np.r_[np.full(3, -1), np.repeat(np.arange(40), 3)]
        sides.append(Cells((np.vstack([np.full((1, G), 2.), centre])[group + 1] + np.repeat(rng.normal(0, noise, (41, G)), 3, axis=0)).clip(0).astype("float32"), group))
    tables = [ad.AnnData(cells.X, pd.DataFrame({"target": np.array([*names, "control"])[cells.group]}, index=np.arange(len(cells.group)).astype(str)), pd.DataFrame(index=GENES)) for cells in sides]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = cell_eval.ClusteringAgreement()(pairs.PerturbationAnndataPair(*tables, pert_col="target", control_pert="control"))
        got = values(Comparison.of_cells(*sides, names, [()] * 40, GENES), ["cell_eval.clustering_agreement"])["cell_eval.clustering_agreement"]
    assert .1 < expected < .95 and got == pytest.approx(expected, rel=1e-6)


def test_cell_eval_and_the_challenge_of_2026_differ_on_purpose(pair):
    "cell-eval lets a prediction edit its own controls; cell-eval2 tests against the real ones."
    edited = compare(pair.real_cells, screen(100, .7, shift=.5))
    before, after = (values(c, ["cell_eval.overlap_at_N", "cell_eval.de_direction_match", "vcc2026"]) for c in (pair, edited))
    assert np.abs(before["cell_eval.overlap_at_N"] - after["cell_eval.overlap_at_N"]).max() > .1
    same = [name for name in before if name.startswith("vcc2026") and "expr" not in name and "pds" not in name]
    assert len(same) == 4
    X, group = cp._against_real_control(edited)  # no predicted control is left in it
    assert (group == -1).sum() == (pair.real_cells.group == -1).sum() and np.array_equal(X[group == -1], pair.real_cells.X[pair.real_cells.group == -1])
    swapped = compare(pair.real_cells, Cells(*(np.concatenate([getattr(pair.predicted_cells, f)[pair.predicted_cells.group >= 0], getattr(edited.predicted_cells, f)[edited.predicted_cells.group == -1]])
                                               for f in ("X", "group", "counts"))))
    other = values(swapped, "vcc2026")
    for name, value in other.items(): np.testing.assert_array_equal(value, before[name], err_msg=name)  # other controls, same six scores


def test_the_score_of_2025_is_cell_evals_own(theirs):
    polars, cell_eval = pytest.importorskip("polars"), pytest.importorskip("cell_eval._score")
    names = ["mae", "discrimination_score_l1", "overlap_at_N"]
    user, base = theirs[names].mean(), pd.Series([.15, .6, .7], names)  # in overlap worse than the baseline
    frames = [polars.DataFrame({"statistic": ["mean"], **{n: [row[n]] for n in names}}) for row in (user, base)]
    expected = dict(cell_eval.score_agg_metrics(*frames).iter_rows())
    ours = {f"cell_eval.{RENAMED.get(n, n)}": n for n in names}
    score = cp.from_baseline(*({o: row[n] for o, n in ours.items()} for row in (user, base)))
    for o, n in ours.items(): assert score[o] == pytest.approx(expected[n], rel=1e-9)
    assert score["average"] == pytest.approx(expected["avg_score"], rel=1e-9) and expected["overlap_at_N"] == 0
    assert cp.from_baseline(*({o: row[n] for o, n in ours.items()} for row in (user, base)), clip=False)["average"] < score["average"]


# lists of changed genes, by scanpy

def scanpy_ranks(cells, method="t-test", reference="control", absolute=True, drop_control=False):
    "Positions, scores and adjusted p of all genes by scanpy, best first: dicts of perturbation."
    sc = pytest.importorskip("scanpy")
    table = anndata(cells)
    if drop_control: table = table[table.obs["target"] != "control"].copy()
    table.obs["target"] = table.obs["target"].astype("category")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.tl.rank_genes_groups(table, "target", method=method, reference=reference, rankby_abs=absolute, n_genes=G)
    found = table.uns["rank_genes_groups"]
    return {p: (pd.Index(GENES).get_indexer(found["names"][p]), found["scores"][p], found["pvals_adj"][p]) for p in PANEL}


@pytest.mark.parametrize("name, k", [("perturbench.deg_recall", 50), ("perturbench.deg_recall_20", 20)])
def test_shared_top_genes_by_scanpy(pair, name, k):
    real, predicted = scanpy_ranks(pair.real_cells), scanpy_ranks(pair.predicted_cells)
    for p, value in zip(PANEL, values(pair, [name])[name]):
        t, q = set(real[p][0][:k]), set(predicted[p][0][:k])
        assert value == pytest.approx(len(t & q) / k, rel=1e-12)


def test_jaccard_of_systema(pair):
    for value, t, q in zip(values(pair, ["systema.jaccard_top20"])["systema.jaccard_top20"], pair.real_effects, pair.predicted_effects):
        t, q = (set(np.argsort(np.abs(side))[-20:]) for side in (t, q))
        assert value == pytest.approx(len(t & q) / len(t | q))


def gears_by_hand(pair, p, genes):
    "The numbers of GEARS's analysis for one condition on its `genes`."
    x = pair.real_cells.X[pair.real_cells.group == p][:, genes].astype(float)
    predicted, truth, control = pair.predicted[p, genes], x.mean(0), pair.control[genes]
    gap = np.abs(np.sign(predicted - control) - np.sign(truth - control))
    out = {"mse_de20": sk.mean_squared_error(truth, predicted), "mse_de20_normalised": sk.mean_squared_error(truth, predicted) / sk.mean_squared_error(truth, control),
           "direction_correct_de20": (gap == 0).mean(), "direction_opposite_de20": (gap == 2).mean()}
    some = ~((x.min(0) == 0) & (x.max(0) == 0))
    for low, high, name in ((.45, .55, "45_55"), (.4, .6, "40_60"), (.25, .75, "25_75"), (0, 1, "min_max")):
        a, b = np.quantile(x, (low, high), axis=0)
        out[f"frac_in_range_{name}"] = ((predicted >= a) & (predicted <= b))[some].mean()
    sigma = np.abs(predicted - truth)[x.std(0) > 0] / x.std(0)[x.std(0) > 0]
    return out | {f"frac_sigma_below_{i}": (sigma <= i).mean() for i in (1, 2)}


def test_gears_by_hand(pair):
    ranks, got = scanpy_ranks(pair.real_cells), values(pair, "gears")
    for p, name in enumerate(PANEL):
        alive = (pair.real[p] != 0) | (pair.control == 0)
        listed = {"": ranks[name][0][:20], "_non_dropout": [g for g in ranks[name][0] if alive[g]][:20]}
        for called, genes in listed.items():
            by_hand = gears_by_hand(pair, p, np.array(genes))
            for metric, value in by_hand.items():
                own = metric.replace("de20", f"de20{called}")
                if "range" in metric or "sigma" in metric:
                    if not called: continue
                    own = metric
                assert got[f"gears.{own}"][p] == pytest.approx(value, rel=1e-6, abs=1e-9), (metric, called)


def test_dropouts_and_all_zero_genes_are_left_out_of_gears():
    real = screen(10)
    real.X[np.ix_(real.group == 0, np.arange(0, 60))] = 0  # condition 0 has lost sixty genes that controls express
    c = compare(real, screen(100, .7))
    genes = cp.gears_genes(c)
    assert (genes[0] >= 60).all() and (cp.gears_genes(c, "all")[0] < 60).sum() > 10
    assert np.isfinite(values(c, ["gears.frac_in_range_25_75"])["gears.frac_in_range_25_75"]).all()


# CellSimBench, by scanpy and scikit-learn

def test_weights_and_r2_of_cellsimbench(pair):
    ranks, got = scanpy_ranks(pair.real_cells, "t-test_overestim_var", "rest", absolute=False, drop_control=True), values(pair, "cellsimbench")
    for p, name in enumerate(PANEL):
        places, scores, adjusted = ranks[name]
        t, q = np.empty(G), np.empty(G)
        t[places], q[places] = np.abs(scores), adjusted
        weight, changed = ((t - t.min()) / np.ptp(t))**2, q < .05
        np.testing.assert_allclose(cp.gene_weights(pair)[p], weight, rtol=1e-4, atol=1e-6)  # scanpy keeps scores in single precision
        assert got["cellsimbench.wmse"][p] == pytest.approx(np.average((pair.predicted[p] - pair.real[p])**2, weights=weight), rel=1e-5)
        for called, centre in (("deltactrl", 0), ("deltapert", pair.reference)):
            a, b = pair.predicted_effects[p] - centre, pair.real_effects[p] - centre
            assert got[f"cellsimbench.weighted_r2_{called}"][p] == pytest.approx(sk.r2_score(b, a, sample_weight=weight), rel=1e-5, abs=1e-5)
            assert changed.sum() > 2
            assert got[f"cellsimbench.r2_{called}_degs"][p] == pytest.approx(sk.r2_score(b[changed], a[changed]), rel=1e-6, abs=1e-6)
            assert got[f"cellsimbench.pearson_{called}_degs"][p] == pytest.approx(stats.pearsonr(a[changed], b[changed])[0], rel=1e-6)


def test_stated_values_where_weights_say_nothing():
    few = [Cells(np.ones((8, 3)), np.repeat([-1, 0, 1, 2], 2)) for _ in range(2)]
    flat = Comparison.of_cells(*few, list("abc"), [()] * 3, list("xyz"))
    got = values(flat, "cellsimbench")  # no gene tells one condition from the others: no weights
    assert not cp.gene_weights(flat).any() and np.isnan(got["cellsimbench.wmse"]).all() and (got["cellsimbench.weighted_r2_deltactrl"] == 1).all()
    assert np.isnan(cp.on_changed(cp.pearson, np.ones((1, 3)), np.ones((1, 3)), np.array([[True, True, False]]))).all()


# clouds

def test_energy_is_half_of_the_v_statistic(pair):
    real, predicted = cp.in_components(pair, 30)
    assert real.shape[1] == 30 and np.array_equal(cp.in_components(pair)[0][:, :30], real)
    for p, value in enumerate(values(pair, ["perturbench.energy"])["perturbench.energy"]):
        x, y = predicted[pair.predicted_cells.group == p], real[pair.real_cells.group == p]
        assert value == pytest.approx(cdist(x, y).mean() - cdist(x, x).mean() / 2 - cdist(y, y).mean() / 2, rel=1e-6)


def test_scperturbench_looks_at_the_hundred_genes_of_the_truth():
    "With more genes than a hundred: those of the largest |t|, by SciPy."
    rng = np.random.default_rng(0)
    wide = [Cells(np.hstack([cells.X, rng.normal(1, .1, (len(cells.X), 60)).clip(0).astype("float32")]), cells.group) for cells in (screen(10, 1.5), screen(100, .7))]
    genes = np.array([f"W{i}" for i in range(160)])
    c = Comparison.of_cells(*wide, PANEL, [()] * 6, genes)
    control = wide[0].X[wide[0].group == -1].astype(float)
    got = values(c, "scperturbench")
    for p in range(6):
        y, x = (cells.X[cells.group == p].astype(float) for cells in wide)
        top = np.argsort(-np.abs(stats.ttest_ind(y, control, equal_var=False).statistic), kind="stable")[:100]
        y, x = y[:, top], x[:, top]
        expected = 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()
        assert got["scperturbench.e_distance"][p] == pytest.approx(expected, rel=1e-6)
        a, b = (x.mean(0), x.var(0)), (y.mean(0), y.var(0))
        kl = lambda a, b: .5 * np.log(b[1] / a[1]) + (a[1] + (a[0] - b[0])**2) / (2 * b[1]) - .5
        assert got["scperturbench.sym_kl"][p] == pytest.approx(np.log2(1 + (kl(a, b) + kl(b, a)).mean()), rel=1e-4)
        assert got["scperturbench.wasserstein"][p] > 0
        other = wide[1].X[wide[1].group == -1].astype(float)
        found = np.argsort(-np.abs(stats.ttest_ind(wide[1].X[wide[1].group == p].astype(float), other, equal_var=False).statistic), kind="stable")[:100]
        assert got["scperturbench.common_degs"][p] == len(set(top) & set(found)) / 100 < 1


def test_distances_fall_as_the_prediction_improves():
    names = ["cells", "perturbench.energy", "scperturbench.e_distance", "scperturbench.wasserstein", "scperturbench.sym_kl"]
    good, bad = (values(compare(screen(10), screen(200, size)), names) for size in (1., 0.))
    for name in good: assert good[name].mean() < bad[name].mean(), name


R2 = {"scgen.r2": lambda p, t: stats.linregress(t, p).rvalue**2, "cellot.r2": lambda p, t: stats.pearsonr(p, t)[0], "cpa.r2": lambda p, t: sk.r2_score(t, p),
      "chemcpa.r2": lambda p, t: max(0, sk.r2_score(t, p)), "perturbench.r2": lambda p, t: sk.r2_score(p, t)}


@pytest.mark.parametrize("name", R2)
def test_five_r2(pair, name):
    "One name, five numbers; all of them praise a prediction of no change."
    np.testing.assert_allclose(values(pair, [name])[name], [R2[name](p, t) for p, t in zip(pair.predicted, pair.real)], rtol=1e-6)
    others = [values(pair, [other])[other].mean() for other in ("scgen.r2", "cellot.r2", "cpa.r2", "perturbench.r2")]
    assert len(np.unique(np.round(others, 6))) == 4
    nothing = compare(pair.real_cells, screen(300, 0.))
    assert values(nothing, [name])[name].mean() > .5 and values(nothing, ["cellsimbench.r2_deltactrl"])["cellsimbench.r2_deltactrl"].mean() < .1


# VCC 2026, by hand

def profile_by_hand(counts):
    total = counts.sum(0)
    return np.log(1 + 5e4 * total / total.sum())


def noise_by_hand(counts):
    without = [profile_by_hand(np.delete(counts, i, axis=0)) for i in range(len(counts))]
    return (len(counts) - 1) / len(counts) * ((without - np.mean(without, 0))**2).sum()


def groups(cells, p): return cells.counts[cells.group == p].astype(float)


def test_expression_error_and_pds_of_2026_by_hand(pair):
    got, above, below, ranks, credit, predicted = values(pair, "vcc2026"), [], [], [], [], []
    control = profile_by_hand(groups(pair.real_cells, -1))
    c0 = noise_by_hand(groups(pair.real_cells, -1))
    keep_panel = ~np.isin(GENES, PANEL)
    effects = np.array([profile_by_hand(groups(pair.real_cells, p)) for p in range(6)]) - control
    for p in range(6):
        keep = GENES != PANEL[p]
        b, v = profile_by_hand(groups(pair.predicted_cells, p)), noise_by_hand(groups(pair.predicted_cells, p))
        t, w = effects[p] + control, noise_by_hand(groups(pair.real_cells, p))
        credit.append(min(v, w)), predicted.append(b)
        above.append((((b - t)**2)[keep].sum() - w) / 99), below.append((((t - control)**2)[keep].sum() - w - c0) / 99)
        d = cdist((b - control)[None, keep_panel], effects[:, keep_panel], "cosine")[0]
        ranks.append(1 - ((d < d[p]).sum() + .5 * ((d == d[p]).sum() - 1)) / 5)
    spread = 0.
    for g in range(G):
        who = [p for p in range(6) if PANEL[p] != GENES[g]]
        x = np.array([predicted[p][g] for p in who])
        spread += ((x - x.mean())**2).sum() / 99  # every condition leaves one gene out: equal weights
    rho = min(1, spread / (sum(credit) / 99))
    expected = (sum(above) - rho * sum(credit) / 99) / sum(below)
    np.testing.assert_allclose(got["vcc2026.pds_cosine"], ranks)
    assert got["vcc2026.expr_mse_unbiased_capped_norm"] == pytest.approx(expected, rel=1e-8)
    assert 0 < expected < 1


def test_identical_predictions_are_not_forgiven_noise():
    "400 scattered cells pasted under every label: they vary within, not between, conditions; rho takes the credit away."
    real, source = screen(10), screen(200)
    pasted = np.r_[np.tile(np.flatnonzero(source.group >= 0)[::7], 6)]
    count = len(pasted) // 6
    rows, group = np.r_[pasted, np.flatnonzero(source.group == -1)], np.r_[np.repeat(np.arange(6), count), np.full((source.group == -1).sum(), -1)]
    c = compare(real, Cells(source.X[rows], group, source.counts[rows]))
    b, v, _, _ = cp.count_profiles(c, "predicted")
    t, w, zero, w0 = cp.count_profiles(c, "real")
    everything = np.ones_like(t, dtype=bool)
    assert v.min() > 0
    got = cp.expression_error(b, v, t, w, zero, w0, everything)
    assert got == pytest.approx((((b - t)**2).sum(1) - w).sum() / (((t - zero)**2).sum(1) - w - w0).sum())
    assert cp.expression_error(b, v, t, w, zero, w0, everything) > (((b - t)**2).sum(1) - w - np.minimum(v, w)).sum() / (((t - zero)**2).sum(1) - w - w0).sum()
    assert np.allclose(values(c, ["vcc2026.pds_cosine"])["vcc2026.pds_cosine"].mean(), .5)


def test_counts_must_be_raw(pair):
    c = compare(pair.real_cells, Cells(pair.predicted_cells.X, pair.predicted_cells.group, pair.predicted_cells.X))
    with pytest.raises(Problem, match="predicted cells: counts hold negative or broken numbers; expected raw counts"): panel_scores(c, "vcc2026")
    without = compare(pair.real_cells, Cells(pair.predicted_cells.X, pair.predicted_cells.group))
    assert set(values(without, "vcc2026")) == {n for n in FAMILIES if n.startswith("vcc2026") and FAMILIES[n].needs != "counts"}


def changed_by_hand(cells, control_of):
    "Significance, log2 fold change, p and FDR (n, g) by SciPy on counts per million."
    control = control_of.counts[control_of.group == -1].astype(float)
    control = control / control.sum(1, keepdims=True) * 1e6
    tested = control.mean(0) > 5
    out = {name: np.full((6, G), np.nan) for name in ("p", "fdr", "lfc")}
    for p in range(6):
        x = groups(cells, p)
        x = x / x.sum(1, keepdims=True) * 1e6
        out["p"][p, tested] = stats.mannwhitneyu(x[:, tested], control[:, tested], method="asymptotic").pvalue
        out["fdr"][p, tested] = stats.false_discovery_control(out["p"][p, tested])
        out["lfc"][p] = np.log2((x.mean(0) + 1e-9) / (control.mean(0) + 1e-9))
        for name in ("p", "fdr"): out[name][p, GENES == PANEL[p]] = np.nan
    return out


def test_changed_genes_of_2026_by_hand():
    real, prediction = screen(10), screen(100, .7)
    for cells in (real, prediction):  # two genes that the controls hardly have
        cells.counts[:, :2] = 0
        cells.counts[cells.group == 3, :2] = 5
        cells.X = np.log1p(1e4 * cells.counts / cells.counts.sum(1, keepdims=True))
    c = compare(real, prediction)
    mine, theirs = cp.tested_2026(c), (changed_by_hand(real, real), changed_by_hand(prediction, real))
    for ours, scipy in zip(mine, theirs):
        np.testing.assert_allclose(ours.p, scipy["p"], rtol=1e-6)
        np.testing.assert_allclose(ours.p_adjusted, scipy["fdr"], rtol=1e-6)
        assert np.isnan(ours.p[:, :2]).all()  # a gene that appears by the perturbation is not admitted
        np.testing.assert_allclose(ours.log2_fold_change[:, 2:], scipy["lfc"][:, 2:], rtol=1e-4, atol=1e-5)
    R, P = (t["fdr"] < .05 for t in theirs)
    right = np.sign(theirs[0]["lfc"]) == np.sign(theirs[1]["lfc"])
    got = values(c, "vcc2026")
    np.testing.assert_allclose(got["vcc2026.de_wilcoxon_sig_jaccard"], (R & P).sum(1) / (R | P).sum(1))
    np.testing.assert_allclose(got["vcc2026.de_wilcoxon_direction_fidelity_yield_raw"], (P & right).sum(1) / np.maximum(P.sum(1), R.sum(1)))
    off, enough = np.abs(theirs[1]["lfc"] - theirs[0]["lfc"]), R.sum(1) >= 10
    assert 3 <= enough.sum() < 6
    np.testing.assert_allclose(got["vcc2026.de_wilcoxon_lfc_nmae"], np.where(enough, (off * R).sum(1) / (np.abs(theirs[0]["lfc"]) * R).sum(1), np.nan), rtol=1e-5)
    for p in range(6):
        order = sorted(np.flatnonzero(R[p]), key=lambda g: (not P[p, g], theirs[1]["fdr"][p, g], theirs[1]["p"][p, g], -abs(theirs[1]["lfc"][p, g])))
        purity = np.cumsum(right[p, order]) / (1 + np.arange(len(order)))
        deep = max([k + 1 for k in range(len(order)) if purity[k] >= .9], default=0)
        assert got["vcc2026.de_wilcoxon_direction_reach_raw"][p] == pytest.approx(deep / len(order))


def test_scaled_scores_and_their_clamps():
    names = [f"vcc2026.{name}" for name in cp.VCC2026]
    base, replicate = dict(zip(names, (.5, .99, .5, .05, .02, 1.))), dict(zip(names, (.95, .03, .8, .95, .4, .4)))
    assert np.allclose(cp.vcc2026_score(base, base, replicate), 0) and np.allclose(cp.vcc2026_score(replicate, base, replicate), 1)
    perfect = cp.vcc2026_score(dict(zip(names, (1, 0, 1, 1, 1, 0))), base, replicate)
    assert perfect["vcc2026.expr_mse_unbiased_capped_norm"] == 1 and (perfect.drop(["vcc2026.expr_mse_unbiased_capped_norm", "average"]) > 1).all()
    awful = cp.vcc2026_score(dict(zip(names, (0, 100., 0, 0, 0, 100.))), base, replicate)
    assert awful["vcc2026.expr_mse_unbiased_capped_norm"] == 0 and awful["vcc2026.de_wilcoxon_lfc_nmae"] == -6 and awful["vcc2026.pds_cosine"] < -1
    assert awful["average"] == pytest.approx(awful.iloc[:6].mean())
    assert np.isnan(cp.vcc2026_score(base, base, base)["average"])


def test_replicates_are_disjoint_halves_with_their_own_controls(monkeypatch):
    cells, seen = screen(10), []
    cells.X[:, 0] = np.arange(len(cells.X))  # every cell is marked
    monkeypatch.setattr(cp, "panel_means", lambda c, names: seen.append(c) or pd.Series({"x": len(seen)}))
    assert cp.replicate_means(cells, PANEL, [()] * 6, GENES, None, np.random.default_rng(0), splits=3)["x"] == 2
    for c in seen:
        a, b = set(c.real_cells.X[:, 0]), set(c.predicted_cells.X[:, 0])
        assert not a & b and len(a | b) == len(cells.X)
        sizes = [np.bincount(side.group + 1) for side in (c.real_cells, c.predicted_cells)]
        assert np.abs(sizes[0] - sizes[1]).max() <= 1
    with pytest.raises(Problem, match="G017 has fewer than 2 cells"):
        rows = np.flatnonzero(cells.group != 1)
        rows = np.r_[rows, np.flatnonzero(cells.group == 1)[:1]]
        cp.replicate_means(Cells(cells.X[rows], cells.group[rows]), PANEL, [()] * 6, GENES, None, np.random.default_rng(0))


# all of them

def test_shared_quantities_are_made_once(monkeypatch):
    calls = []
    for module, name in ((cp.DE, "differential_expression"), (cp, "principal_components"), (cp, "noisy_profile"), (cp, "against_rest")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    real = screen(10)
    one, two = compare(real, screen(100, .7)), compare(real, screen(200, .2))
    names = [name for name in MINE if "clustering" not in name]
    panel_scores(one, names)
    count = pd.Series(calls).value_counts()
    assert count["differential_expression"] == 6 and count["principal_components"] == 1 and count["noisy_profile"] == 14 and count["against_rest"] == 1
    calls.clear()
    panel_scores(two, names)  # the real side is known, but for what stands against the real controls of this comparison
    count = pd.Series(calls).value_counts()
    assert count["differential_expression"] <= 4 and "principal_components" not in count and count["noisy_profile"] == 7 and "against_rest" not in count


def test_sparse_and_dense_cells_agree(pair):
    thin = [Cells(sp.csr_matrix(cells.X), cells.group, sp.csr_matrix(cells.counts)) for cells in (pair.real_cells, pair.predicted_cells)]
    names = [name for name in MINE if "clustering" not in name]
    dense, sparse = values(pair, names), values(compare(*thin), names)
    assert set(dense) == set(names)
    for name in names: np.testing.assert_allclose(sparse[name], dense[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", MINE)
def test_ten_choices_are_stated(name):
    metric = FAMILIES[name]
    assert len(metric.choices) == len(Choices._fields) == 10 and all(isinstance(choice, str) and choice for choice in metric.choices)
    assert metric.formula and metric.source and metric.range and metric.degenerate


@pytest.mark.parametrize("name", [n for n in MINE if "clustering" not in n and "common" not in n and FAMILIES[n].best == FAMILIES[n].best])
def test_a_better_prediction_scores_better(name):
    "The truth's own cells against cells of no effect."
    real = screen(10, 1.5)
    perfect, nothing = (pd.Series(values(compare(real, other), [name])[name]).mean() for other in (real, screen(300, 0.)))
    if not np.isnan(nothing): assert (perfect > nothing) == FAMILIES[name].higher
    if name not in ("scperturbench.wasserstein", "scperteval.e_distance", "scperteval.mmd", "cells.energy", "cells.mmd_rbf", "vcc2026.expr_mse_unbiased_capped_norm") and "range" not in name:
        assert perfect == pytest.approx(FAMILIES[name].best, abs=1e-6)


def test_a_screen_in_which_nothing_changes():
    quiet = compare(screen(10, 0.), screen(11, 0.))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = values(quiet, [name for name in MINE if "clustering" not in name])
    assert (got["cell_eval.overlap_at_N"] == 0).any() and np.isfinite(got["cellsimbench.weighted_r2_deltactrl"]).all()
    if (got["cell_eval.de_nsig_counts_real"] == 0).all(): assert got["cell_eval.de_spearman_sig"] == 1


def test_combinations_leave_out_all_their_genes():
    "'A+B' perturbs both; cell-eval compares names and would leave out neither."
    names = ["G005+G017", *PANEL[1:]]
    c = compare(screen(10), screen(100, .7), names)
    assert np.flatnonzero(c.own_targets[0]).tolist() == [5, 17]
    assert np.isnan(cp.tested_2026(c)[0].p_adjusted[0, [5, 17]]).all()


@pytest.mark.skipif(find_spec("igraph") is None, reason="igraph is an optional package")
def test_clusters_do_not_depend_on_the_order_of_conditions(pair):
    other = [3, 1, 5, 0, 2, 4]
    place = np.r_[np.argsort(other), -1]
    moved = [dataclasses.replace(cells, group=place[cells.group]) for cells in (pair.real_cells, pair.predicted_cells)]
    assert cp.clustering_agreement(compare(*moved, [PANEL[i] for i in other])) == cp.clustering_agreement(pair)


def test_the_step(small):
    "Three predictions under every metric; where a screen has no cells, a note."
    scores = pd.read_parquet(small / "data/results/sim/families.parquet")
    mean = scores.groupby(["metric", "prediction"])["value"].mean().unstack()
    assert set(mean.columns) == {"replicate", "mean response", "no change"} and set(mean.index) >= set(FAMILIES) - {m for m in FAMILIES if FAMILIES[m].needs == "additive" or "clustering" in m}
    for metric in ("cell_eval.overlap_at_N", "vcc2026.pds_cosine", "perturbench.deg_recall", "cellsimbench.weighted_r2_deltactrl"): assert mean.loc[metric, "replicate"] > mean.loc[metric, "no change"]
    assert np.allclose(mean.loc["vcc2026.pds_cosine", ["mean response", "no change"]], .5)
    assert len(pd.read_csv(small / "figures/sim/parity_lab.csv")) % 3 == 0
    assert "no cells" in (small / "figures/sim_drugs/parity_lab.note.txt").read_text()
    assert not (small / "data/results/sim_drugs/families.parquet").exists()
