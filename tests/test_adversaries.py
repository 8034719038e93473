"""Adversaries: each does what it says; the metrics that are known to be gamed are gamed, and those that are recommended are not."""
import numpy as np
import pandas as pd
import pytest

from perturb_research.core import Problem, generator
from perturb_research.evaluate import adversaries as adv
from perturb_research.evaluate.metrics import METRICS, discrimination
from perturb_research.evaluate.panels import FAMILIES, Cells, Comparison

G, N, SIZE = 100, 14, 40
GENES = np.array([f"G{i:03d}" for i in range(G)])
NAMES = list(GENES[:N])
TARGETS = [(name,) for name in NAMES]
ALL = [name for name in [*METRICS, *FAMILIES] if "clustering" not in name]  # Leiden takes seconds


def screen(seed, first=0, sign=1, conditions=N, cells=SIZE, controls=100):
    "Cells of a screen in which condition i moves gene `first` + i by `sign` * 2; all conditions share a part of their effect."
    truth = np.random.default_rng(3)
    level, common = truth.gamma(2, 4, G) + 2, .4 * truth.normal(size=G)
    effect = common + truth.normal(0, .7, (2 * N, G)) * (truth.random((2 * N, G)) < .4)
    effect[np.arange(2 * N), np.arange(2 * N)] = 2. * sign
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(-1, conditions), [controls] + [cells] * conditions)
    rate = level * np.exp(np.vstack([np.zeros(G), effect[first:first + conditions]])[group + 1]) * rng.lognormal(0, .2, (len(group), 1))
    counts = rng.poisson(rate * rng.gamma(5, .2, rate.shape)).astype("float32")
    return Cells(np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).astype("float32"), group, counts)


def trial(sign=1, targets=TARGETS):
    "(truth, replicate, Known): other conditions than those asked for are known from training."
    truth, replicate, training = screen(1, sign=sign), screen(2, sign=sign), screen(3, N, sign)
    profiles, control = training.means(N)
    mean = profiles.mean(0) - truth.means(N)[1]
    return truth, replicate, adv.known(truth.X[truth.group < 0], mean, training.X[training.group >= 0], targets, GENES, SIZE, sign > 0, replicate)


@pytest.fixture(scope="module")
def up(): return trial()


@pytest.fixture(scope="module")
def scores(up): return adv.score_adversaries(*up, NAMES, TARGETS, GENES, names=ALL)


@pytest.fixture(scope="module")
def means(scores): return scores.pivot_table(index="metric", columns="prediction", values="value", sort=False, dropna=False)


@pytest.fixture(scope="module")
def verdicts(scores): return adv.judged(scores, generator(0, "test"))


def made(known, name, seed=0): return adv.ADVERSARIES[name](known, generator(seed, name))


def profiles(known, name): return made(known, name).means(NAMES)


def compare(truth, cells, known, targets=TARGETS): return Comparison.of_cells(truth, cells, NAMES, targets, GENES, train_mean=known.mean)


def test_every_adversary_hands_in_usable_cells_for_every_condition(up):
    for name in adv.ADVERSARIES:
        cells = made(up[2], name)
        assert (np.bincount(cells.group + 1) == [100] + [SIZE] * N).all(), name
        assert np.isfinite(cells.X).all() and cells.X.min() >= 0 and (cells.counts == np.floor(cells.counts)).all(), name
        assert (cells.X == made(up[2], name).X).all(), name  # the same seed, the same cells
        if name != "edited controls": assert (cells.X[cells.group < 0] == up[2].control).all(), name


def test_the_mean_is_handed_in_with_cells_like_real_ones(up):
    known = up[2]
    cells = adv.mean_response(known, generator(0))
    handed = cells.X[cells.group == 0]
    assert all((cells.X[cells.group == p] == handed).all() and (cells.counts[cells.group == p] == cells.counts[cells.group == 0]).all() for p in range(N))
    np.testing.assert_allclose(handed.mean(0), known.profile, atol=.02)
    assert handed.std(0).mean() > .8 * known.control.std(0).mean()
    rare = known.trained.copy()
    rare[:, 0] = 0
    rare[::len(rare) // 3, 0] = 3.  # a gene in three cells, whose mean is to be large, is not blown up beyond what log values are
    cells = adv.mean_response(known._replace(trained=rare, mean=known.mean + 5. * (np.arange(G) == 0)), generator(4))
    assert cells.X[cells.group >= 0].max() <= rare.max() < 20


def test_control_paste_is_made_of_control_cells(up):
    cells = made(up[2], "control paste")
    real = {row.tobytes() for row in up[2].control}
    assert all(row.tobytes() in real for row in cells.X)
    assert len({cells.X[cells.group == p].tobytes() for p in range(N)}) == N


@pytest.mark.parametrize("name,factor", [("mean tile", 1), ("scaled mean", 3), ("zero variance", 1), ("edited controls", 1)])
def test_profiles_that_are_made_of_the_mean(up, name, factor):
    found = profiles(up[2], name)[0]
    expected = np.maximum(up[2].profile + (factor - 1) * up[2].mean, 0)
    np.testing.assert_allclose(found, np.tile(expected, (N, 1)), atol=1e-12)
    spread = made(up[2], name).X[100:100 + SIZE].std(0)
    assert (spread.max() < 1e-12) == (name == "zero variance")


def test_constant_is_one_number_and_all_significant_calls_nearly_all_genes(up):
    cells = made(up[2], "constant")
    assert np.unique(cells.X[cells.group >= 0]).size == 1 and cells.X[-1, 0] % 1 != 0
    c = compare(up[0], made(up[2], "all significant"), up[2])
    assert (adv.cell_panels.tested(c, "predicted").p_adjusted < .05).mean() > .95
    assert (np.sign(c.predicted_effects) == np.sign(up[2].mean)).mean() > .95


def test_label_permutation_gives_nobody_an_own_cell_nor_one_that_shares_a_gene(up):
    known = up[2]
    owner = {row.tobytes(): p for row, p in zip(known.others.X.astype(float), known.others.group)}
    cells = made(known, "label permutation")
    assert all(owner[row.tobytes()] not in (-1, p) for row, p in zip(cells.X[cells.group >= 0], cells.group[cells.group >= 0]))
    pairs = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]], bool)  # A+B may only be swapped with C+D
    assert list(adv.deranged(pairs, generator(0))) == [2, 3, 0, 1]
    with pytest.raises(Problem, match="share too many"): adv.deranged(np.ones((5, 1), bool), generator(0), 20)
    with pytest.raises(Problem, match="others"): made(known._replace(others=None), "label permutation")


@pytest.mark.parametrize("sign", [1, -1])
def test_spike_moves_the_perturbed_genes_alone_and_against_the_perturbation(sign):
    truth, _, known = trial(sign)
    effects = compare(truth, made(known, "spike"), known).predicted_effects
    assert (effects[:, N:] == 0).all() and (np.sign(effects[:, :N]) == -sign).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["spike", "edited controls"])
def test_target_genes_open_the_ranking_that_removes_only_the_own_one(sign, name):
    truth, replicate, known = trial(sign)
    found = adv.score_adversaries(truth, replicate, known, NAMES, TARGETS, GENES, adversaries=[name], names=["cell_eval.pds_cosine", "vcc2026.pds_cosine", "vcc2026.pds_cosine_effects"])
    mean = found.pivot_table(index="metric", columns="prediction", values="value")
    assert mean.loc["cell_eval.pds_cosine", name] > max(.7, mean.loc["cell_eval.pds_cosine", "mean"])  # chance is 1/2 + 1/28
    np.testing.assert_allclose(mean.loc["vcc2026.pds_cosine_effects", name], .5, atol=1e-12)
    np.testing.assert_allclose(mean.loc["vcc2026.pds_cosine", [name, "mean"]], .5, atol=1e-12)
    assert set(adv.gamed(adv.judged(found, generator(0)))) <= {"cell_eval.pds_cosine"}


def test_the_panel_mask_is_what_closes_it(up):
    c = compare(up[0], made(up[2], "spike"), up[2])
    own, panel = (discrimination(c.predicted_effects, c.real_effects, distance="cosine", removed=mask) for mask in (c.own_targets, c.panel_targets))
    assert own.mean() > .7 and panel.mean() == .5


def test_mean_tile_is_praised_against_the_control_and_nothing_once_centred(means):
    for name in ("pearson", "gears.pearson_delta", "cell_eval.pearson_delta"): assert means.loc[name, "mean tile"] > .4
    for name in ("pearson_centred", "cosine_centred", "spearman_centred", "cellsimbench.pearson_deltapert"): assert means.loc[name, "mean tile"] == 0
    assert means.loc["beats_mean", "mean tile"] == .5 and np.isnan(means.loc["systema.pearson_centred", "mean tile"])


def test_a_constant_prediction_is_exactly_chance_for_every_rank(up):
    ranks = [name for name in [*METRICS, *FAMILIES] if adv.measures(name) == "identity"]
    assert len(ranks) >= 11
    found = adv.score_adversaries(*up[:2], up[2], NAMES, [()] * N, GENES, adversaries=["constant", "mean tile", "scaled mean", "all significant", "spike"], names=ranks)
    mean = found[~found["prediction"].isin(["replicate"])].pivot_table(index="metric", columns="prediction", values="value")
    chance = {name: 1. if name.endswith("_paper") else .5 + .5 / N if name.startswith("cell_eval") else .5 for name in ranks}  # ties against: worst; over n: a little above
    for name in ranks: np.testing.assert_allclose(mean.loc[name], chance[name], atol=1e-12, err_msg=name)


def test_edited_controls_move_what_subtracts_them_and_nothing_else(up):
    truth, _, known = up
    both = [adv.all_scores(compare(truth, make(known, generator(0, "same")), known), ALL) for make in (adv.mean_tile, adv.edited_controls)]
    assert (both[0]["metric"] == both[1]["metric"]).all()
    changed = set(both[0]["metric"][both[0]["value"].to_numpy() != both[1]["value"].fillna(np.inf).to_numpy()]) & set(both[0].dropna()["metric"])
    registry = METRICS | FAMILIES
    own = {name for name in set(both[0]["metric"]) if "own" in registry[name].choices.control}
    assert changed <= own, changed - own
    assert {"cell_eval.pearson_delta", "cell_eval.mae_delta", "cell_eval.pds_cosine", "cell_eval.overlap_at_N", "perturbench.cosine_logfc", "cell_eval.pearson_edistance"} <= changed | set(
        both[0]["metric"][both[0]["value"].isna()])
    assert not {"pearson", "rmse", "gears.pearson_delta", "vcc2026.pds_cosine", "vcc2026.de_wilcoxon_sig_jaccard", "cells.energy"} & changed


def test_cells_without_variance_are_caught_by_distances_between_populations(verdicts):
    table = verdicts[verdicts["adversary"] == "zero variance"].set_index("metric")
    for name in ("cells.energy", "cells.mmd_rbf", "cells.sliced_wasserstein", "scperteval.e_distance", "pertpy.e_distance", "perturbench.energy"):
        assert table.loc[name, "high"] < 0, name


def test_calling_everything_fills_recall_but_not_a_list_of_fixed_length(means, verdicts):
    assert means.loc["cell_eval.de_sig_genes_recall", "all significant"] > .95
    by = adv.gamed(verdicts)
    for name in ("perturbench.deg_recall", "perturbench.deg_recall_20", "scperturbench.common_degs", "genespeaks.ndcg_at_30"): assert "all significant" not in by.get(name, []), name
    assert "all significant" in by["cell_eval.de_sig_genes_recall"]


def test_nobody_games_the_recommended_panel(scores, verdicts):
    left = adv.recommended(verdicts)
    assert set(adv.PANEL.values()) <= set(left["metric"])
    assert not set(left["metric"]) & set(adv.gamed(verdicts))
    assert set(left["measures"]) == set(adv.MEASURES)
    grouped = adv.recommended(verdicts, scores)
    named = [name for line in grouped.itertuples() for name in [line.metric, *filter(None, line.same.split(", "))]]
    assert sorted(named) == sorted(left["metric"])
    assert "gears.pearson_delta" in grouped.set_index("metric").loc["pearson", "same"]


def test_verdicts_by_hand():
    "Ten perturbations; the mean gets 0 in all, a replicate 1; one adversary .2 everywhere, one .2 on average with much noise, one below."
    values = {"mean": np.zeros(10), "replicate": np.ones(10), "sure": np.full(10, .2), "noisy": .2 + 2. * np.tile([-1, 1], 5), "worse": np.full(10, -.5), "partly": np.r_[np.full(5, .3), [np.nan] * 5]}
    long = pd.concat([pd.DataFrame({"prediction": p, "condition": [f"c{i}" for i in range(10)], "metric": "pearson", "value": v}) for p, v in values.items()])
    low = long.assign(metric="l2", value=1 - long["value"])  # the same, less is better
    flat = long.assign(metric="cosine", value=long["value"].where(long["prediction"] != "replicate", -.1))  # the replicate does not beat the mean
    panel = long.groupby("prediction", as_index=False, sort=False)["value"].mean().assign(condition="*", metric="genespeaks.rmse").assign(value=lambda t: 1 - t["value"])
    table = adv.judged(pd.concat([long, low, flat, panel]), generator(0)).set_index(["metric", "adversary"])
    for name in ("pearson", "l2"):
        assert np.allclose(table.loc[name]["scaled"][["sure", "noisy", "worse", "partly"]], [.2, .2, -.5, .3])
        assert list(table.loc[name].index[table.loc[name]["gamed"]]) == ["sure", "partly"]
        assert np.allclose(table.loc[(name, "sure"), ["low", "high"]].astype(float), .2) and table.loc[(name, "noisy"), "low"] < 0 and table.loc[(name, "partly"), "n"] == 5
        assert table.loc[name]["informative"].all()
    assert not table.loc["cosine"]["informative"].any() and not table.loc["cosine"]["gamed"].any()
    assert np.isclose(table.loc[("genespeaks.rmse", "sure"), "scaled"], .2) and not table.loc["genespeaks.rmse"]["gamed"].any()


def test_too_little_to_work_with():
    truth = screen(1)
    with pytest.raises(Problem, match="1 control cells"): adv.known(truth.X[:1], np.zeros(G), truth.X[200:], TARGETS, GENES, SIZE)
    with pytest.raises(Problem, match="unknown"): adv.score_adversaries(*trial(), NAMES, TARGETS, GENES, names=["pearsn"])
