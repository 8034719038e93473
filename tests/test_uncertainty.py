"""Intervals that hold what they promise: exact quantiles, coverage inside the beta-binomial interval, proper scores against their definitions."""
import itertools
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import run_here
from scipy import stats
from scipy.integrate import quad
from sklearn.metrics import roc_auc_score

from perturb_research.core import Problem
from perturb_research.data.splits import freeze, make_split
from perturb_research.evaluate.uncertainty import (
    NOT_GUARANTEED, central_coverage, checked_var, clopper_pearson, conformal_quantile, conformal_rank, conformal_scores, coverage_band, coverage_pmf, coverage_table,
    density_ratio, effective_size, ensemble, ensemble_crps, interval_score, normal_crps, normal_interval, normal_nll, not_exchangeable, ood_auroc, per_unit, pit,
    pit_density, risk_coverage, weighted_quantile)


def counting(scores, level):
    "The least score with at least level * (n + 1) scores at or below it, by trying all."
    good = [s for s in scores if sum(t <= s for t in scores) >= level * (len(scores) + 1) - 1e-9]
    return min(good, default=np.inf)


def test_quantile_is_exact():
    rng = np.random.default_rng(0)
    for n in range(1, 41):
        scores = rng.integers(15, size=n) + rng.choice([0., .5])  # with ties
        for level in (.05, .1, .3, .5, .55, .7, .8, .9, .95, .99): assert conformal_quantile(scores, level) == counting(scores, level), (n, level)
    many = rng.normal(size=(19, 7))
    np.testing.assert_array_equal(conformal_quantile(many, .9), [conformal_quantile(column, .9) for column in many.T])
    assert conformal_rank(19, .55) == 11  # 20 * .55 is 11.000000000000002


def test_too_few_to_calibrate_is_infinite():
    assert conformal_quantile(np.arange(8.), .9) == np.inf and conformal_quantile(np.arange(9.), .9) == 8
    assert np.isinf(conformal_quantile(np.ones((3, 5)), .9)).all()
    np.testing.assert_array_equal(coverage_pmf(3, 4, .9), [0, 0, 0, 0, 1])
    assert coverage_band([(3, 10)], .9) == (1, 1)


@pytest.mark.parametrize("n, level", [(5, .8), (9, .8), (9, .9), (19, .9), (33, .9)])
def test_marginal_coverage_is_inside_its_interval(n, level):
    rng = np.random.default_rng(n)
    draws, m = rng.standard_cauchy(size=(2000, n + 3)), 3
    covered = (draws[:, n:] <= conformal_quantile(draws[:, :n].T, level)[:, None]).sum()
    low, high = coverage_band([(n, m)] * 2000, level, confidence=.999)
    assert low <= covered / (2000 * m) <= high and high - low < .06
    plain = np.mean(draws[:, n:] <= np.quantile(draws[:, :n], level, axis=1)[:, None])
    assert plain < low, "the quantile without the correction must be found out"


def test_beta_binomial_law():
    rng = np.random.default_rng(1)
    draws = rng.random((20_000, 13))
    counts = np.bincount((draws[:, 9:] <= conformal_quantile(draws[:, :9].T, .8)[:, None]).sum(1), minlength=5) / 20_000
    np.testing.assert_allclose(counts, coverage_pmf(9, 4, .8), atol=.012)
    # by counting orders: of 2 to calibrate and 2 to cover, at level .5 the second smallest... every order is as likely
    found = np.zeros(3)
    for order in itertools.permutations(range(4)): found[sum(x <= conformal_quantile(np.array(order[:2], float), .5) for x in order[2:])] += 1 / 24
    np.testing.assert_allclose(found, coverage_pmf(2, 2, .5), atol=1e-12)


def test_pooled_band_is_a_convolution():
    one = stats.betabinom(10, 8, 2)
    low, high = coverage_band([(9, 10)], .8)
    assert (low, high) == (one.ppf(.025) / 10, one.ppf(.975) / 10)
    rng = np.random.default_rng(2)
    pooled = (one.rvs((50_000, 6), random_state=rng).sum(1) + stats.betabinom(4, 16, 4).rvs(50_000, random_state=rng)) / 64
    np.testing.assert_allclose(coverage_band([(9, 10)] * 6 + [(19, 4)], .8), np.quantile(pooled, [.025, .975]), atol=1 / 64)


def test_scores_and_units():
    predicted, truth = np.zeros((3, 4)), np.array([[3., -4, 0, 0], [1, 1, 1, 1], [0, 0, 0, 2]])
    np.testing.assert_allclose(conformal_scores(predicted, truth), [2.5, 1, 1])
    np.testing.assert_allclose(conformal_scores(predicted, truth, scale=np.array([5., 1, 2])), [.5, 1, .5])
    np.testing.assert_allclose(conformal_scores(predicted, truth, "band", np.array([1., 8, 1, 1])), [3, 1, 2])
    names, worst = per_unit(conformal_scores(predicted, truth, "gene"), ["b", "a", "b"])
    assert list(names) == ["a", "b"]
    np.testing.assert_array_equal(worst, [[1, 1, 1, 1], [3, 4, 0, 2]])


def test_band_holds_for_all_genes_at_once_and_genes_one_by_one():
    rng = np.random.default_rng(3)
    together, each = [], []
    for _ in range(300):
        error = rng.normal(size=(40, 30)) * np.linspace(.2, 3, 30) * rng.gamma(4, size=(40, 1))
        for kind, found in (("band", together), ("gene", each)):
            s = conformal_scores(np.zeros_like(error), error, kind)
            found.append((s[19:] <= conformal_quantile(s[:19], .8)).mean())
    low, high = coverage_band([(19, 21)] * 300, .8, confidence=.999)
    assert low <= np.mean(together) <= high and low <= np.mean(each) <= high


def test_equal_weights_are_no_weights():
    rng = np.random.default_rng(4)
    for n in (1, 5, 9, 30):
        scores = rng.integers(9, size=n).astype(float)
        for level in (.5, .8, .9):
            for w in (1., .3, 7.): np.testing.assert_array_equal(weighted_quantile(scores, np.full(n, w), np.full(2, w), level), conformal_quantile(scores, level))


def test_weighted_quantile_by_its_definition():
    rng = np.random.default_rng(5)
    for _ in range(200):
        scores, weights, own = rng.integers(6, size=7).astype(float), rng.random(7), rng.random()
        good = [s for s in scores if weights[scores <= s].sum() >= .7 * (weights.sum() + own)]
        assert weighted_quantile(scores, weights, [own], .7)[0] == min(good, default=np.inf)
    assert weighted_quantile([1.], [1.], [9.], .5)[0] == np.inf


def shifted(estimated, repeats=150, n=150, m=150):
    "Coverage at 0.8 of weighted and unweighted quantiles when larger x, which err more, are asked for."
    rng, found = np.random.default_rng(6), []
    for _ in range(repeats):
        x, asked = rng.normal(size=(n, 1)), rng.normal(1, size=(m, 1))
        error, truth = (np.exp(.7 * v[:, 0]) * np.abs(rng.normal(size=len(v))) for v in (x, asked))
        weights = density_ratio(x, asked) if estimated else tuple(np.exp(v[:, 0] - .5) for v in (x, asked))
        found.append(((truth <= conformal_quantile(error, .8)).mean(), (truth <= weighted_quantile(error, *weights, .8)).mean()))
    return np.mean(found, axis=0)


@pytest.mark.parametrize("estimated", [False, True])
def test_weights_repair_a_covariate_shift(estimated):
    plain, weighted = shifted(estimated)
    assert plain < .65, "the shift must do harm"
    assert .78 <= weighted <= .85


def test_weights_do_not_repair_what_they_do_not_see():
    "A stratum that errs more, with features that say nothing: the printed sentence is needed."
    rng = np.random.default_rng(7)
    x, asked = rng.normal(size=(200, 1)), rng.normal(size=(200, 1))
    error, truth = np.abs(rng.normal(size=200)), 3 * np.abs(rng.normal(size=200))
    assert (truth <= weighted_quantile(error, *density_ratio(x, asked), .9)).mean() < .6
    assert "nothing is guaranteed" in NOT_GUARANTEED


def test_density_ratio():
    rng = np.random.default_rng(8)
    calibration, test = rng.normal(size=(4000, 2)), rng.normal([1, 0], size=(2000, 2))
    weights, _ = density_ratio(calibration, test, clip=1e6)
    assert np.corrcoef(np.log(weights), calibration[:, 0])[0, 1] > .99
    np.testing.assert_allclose(np.log(weights), calibration[:, 0] - .5, atol=.5)
    clipped = np.concatenate(density_ratio(calibration, test, clip=2.))
    assert clipped.max() == 2 and clipped.min() == .5
    assert effective_size(np.ones(7)) == pytest.approx(7) and effective_size([1., 0, 0]) == 1
    same, _ = density_ratio(np.ones((5, 1)), np.ones((9, 1)))  # nothing to tell apart
    np.testing.assert_allclose(same, 1, rtol=1e-3)


def test_clopper_pearson():
    for covered, n in ((0, 5), (5, 5), (3, 7), (80, 100)):
        exact = stats.binomtest(covered, n).proportion_ci(.95, method="exact")
        np.testing.assert_allclose(clopper_pearson(covered, n), (exact.low, exact.high), atol=1e-12)


def test_coverage_by_stratum():
    table = coverage_table([1, 1, 0, 1], ["a", "a", "b", "b"], .9).set_index("stratum")
    assert table["coverage"].to_dict() == {"all": .75, "a": 1, "b": .5} and table["n"].to_dict() == {"all": 4, "a": 2, "b": 2}
    assert table["gap"].max() == pytest.approx(.4) and table.loc["all", "low"] == pytest.approx(clopper_pearson(3, 4)[0])
    repeats = coverage_table([[1, np.nan], [np.nan, 0], [1, np.nan]], ["a", "b"], .9).set_index("stratum")
    assert repeats["coverage"].to_dict() == {"all": 2 / 3, "a": 1, "b": 0} and repeats["low"].isna().all()


def test_what_is_exchangeable(toy_screen):
    assert not_exchangeable("doubles", ["combo_seen2"], ["combo_seen2", "combo_seen1"]) == "" == not_exchangeable("perturbation", ["drug_unseen"], ["drug_unseen"])
    assert "differently" in not_exchangeable("perturbation", ["single_unseen"], ["combo_seen1"])
    assert "contexts" in not_exchangeable("context", ["context_unseen"], ["context_unseen"]) and "both parts" in not_exchangeable("doubles", ["combo_seen2"], ["combo_seen2"], shared=3)
    assert not_exchangeable("anything else", ["x"], ["x"])
    assert not_exchangeable("kfold", ["single_unseen"], ["single_unseen"]) == "" and "differently" in not_exchangeable("kfold", ["single_unseen"], ["combo_seen0"])
    assert not_exchangeable("doubles", ["combo_seen2"], ["combo_seen2"], options=dict(source="a file")) == "the parts were drawn elsewhere" and "balanced by effect" in not_exchangeable("doubles", ["combo_seen2"], ["combo_seen2"], options=dict(stratify="effect"))
    assert not_exchangeable("doubles", ["combo_seen2"], ["combo_seen1", "combo_seen2"], options=dict(fractions=[.2, .5])) and "scaffolds" in not_exchangeable("scaffold", ["x"], ["x"])
    # in a doubles split every held-out pair is as likely to be in the validation part as any other
    splits = [make_split(toy_screen, "doubles", seed) for seed in range(150)]
    held = {c: [c in s.ids["val"] for s in splits if c not in s.ids["train"]] for c in toy_screen.obs_names if "+" in c}
    assert max(np.mean(v) for v in held.values()) - min(np.mean(v) for v in held.values()) < .22


# ------------------------------------------------------------------ stated variances

def test_likelihood_and_crps_against_their_definitions():
    rng = np.random.default_rng(9)
    mean, sd, y = rng.normal(size=20), rng.uniform(.1, 3, 20), rng.normal(scale=3, size=20)
    np.testing.assert_allclose(normal_nll(mean, sd**2, y), -stats.norm.logpdf(y, mean, sd))
    for m, s, t in zip(mean[:6], sd, y):
        F = lambda x: stats.norm.cdf(x, m, s)
        integral = quad(lambda x: F(x)**2, -np.inf, t)[0] + quad(lambda x: (1 - F(x))**2, t, np.inf)[0]
        assert normal_crps(np.array([m]), np.array([s**2]), np.array([t]))[0] == pytest.approx(integral, rel=1e-6)
    assert normal_crps(np.zeros(1), np.zeros(1), np.array([-2.]))[0] == 2 and normal_nll(np.zeros(1), np.zeros(1), np.zeros(1))[0] == np.inf


def test_ensemble_crps_is_fair():
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=3)
    pairs = np.abs(x[:, None] - x[None]).sum((0, 1)) / (2 * 5 * 4)
    np.testing.assert_allclose(ensemble_crps(x, y), np.abs(x - y).mean(0) - pairs)
    few, many = (ensemble_crps(rng.normal(size=(k, 40_000)), np.zeros(40_000)).mean() for k in (2, 20))
    assert few == pytest.approx(many, abs=.01) and many == pytest.approx(normal_crps(np.zeros(1), np.ones(1), np.zeros(1))[0], abs=.01)


def test_total_variance():
    mean, var = ensemble([[0., 1], [2, 1]], [[1., 2], [3, 2]])
    np.testing.assert_array_equal(mean, [1, 1])
    np.testing.assert_array_equal(var, [2 + 1, 2])
    rng = np.random.default_rng(11)
    means, sds = rng.normal(size=(4, 1)), rng.uniform(.5, 2, size=(4, 1))
    sample = (means + sds * rng.normal(size=(4, 200_000))).ravel()
    assert ensemble(means, sds**2)[1][0] == pytest.approx(sample.var(), rel=.02)


def test_interval_score_by_hand():
    assert interval_score(0., 2., np.array([1., 3, -.5]), .9) == pytest.approx([2, 2 + 20, 2 + 10])
    assert interval_score(-np.inf, np.inf, 0., .9) == np.inf
    rng = np.random.default_rng(12)
    y = rng.normal(size=100_000)
    scores = {sd: interval_score(*normal_interval(np.zeros(1), np.full(1, sd**2), .8), y, .8).mean() for sd in (.5, .8, 1, 1.25, 2)}
    assert min(scores, key=scores.get) == 1  # proper: the true interval is best


@pytest.mark.parametrize("level", [.5, .63, .8, .9, .975])
def test_normal_coverage_at_any_level_and_wrong_variances_are_found_out(level):
    rng = np.random.default_rng(13)
    y, zero = rng.normal(size=(40, 2000)), np.zeros((40, 2000))
    low, high = normal_interval(zero, zero + 1, level)
    stated = {v: central_coverage(pit(zero, zero + v, y), [level]).mean() for v in (.25, 1., 4.)}
    assert np.mean((low <= y) & (y <= high)) == pytest.approx(stated[1.], abs=1e-12) and stated[1.] == pytest.approx(level, abs=.008)
    assert stated[.25] < level - .08 and stated[4.] > level + .015


def test_pit_is_flat_only_where_calibrated():
    rng = np.random.default_rng(14)
    y, zero = rng.normal(size=(1, 100_000)), np.zeros((1, 100_000))
    assert np.abs(pit_density(pit(zero, zero + 1, y)) - 1).max() < .06
    u_shape = pit_density(pit(zero, zero + .25, y))
    assert u_shape[0] > 2 and u_shape[-1] > 2 and u_shape[10] < .8
    assert pit_density(rng.random(999)).mean() == pytest.approx(1)
    np.testing.assert_array_equal(pit(np.zeros(3), np.zeros(3), np.array([-1., 0, 1])), [0, .5, 1])


# ------------------------------------------------------------------ sorting by uncertainty

def test_risk_coverage_of_oracle_random_and_constant():
    rng = np.random.default_rng(15)
    risk = rng.gamma(2, size=200)
    oracle, constant, worst = risk_coverage(risk, risk), risk_coverage(risk, np.ones(200)), risk_coverage(risk, -risk)
    assert oracle.excess == 0 and oracle.aurc == pytest.approx(np.mean(np.cumsum(np.sort(risk)) / np.arange(1, 201)))
    assert constant.aurc == pytest.approx(risk.mean()) == constant.random
    random = np.mean([risk_coverage(risk, rng.random(200)).aurc for _ in range(500)])
    assert random == pytest.approx(risk.mean(), rel=.01) and worst.excess > constant.excess > 0
    assert oracle.risk[-1] == pytest.approx(risk.mean())


def test_ties_are_the_mean_over_all_orders():
    risk, uncertainty = np.array([4., 1, 7, 2, 9]), np.array([1, 1, 2, 2, 2])
    means = []
    for order in itertools.permutations(range(5)):
        if list(uncertainty[list(order)]) == sorted(uncertainty): means.append(np.cumsum(risk[list(order)]) / np.arange(1, 6))
    np.testing.assert_allclose(risk_coverage(risk, uncertainty).risk, np.mean(means, axis=0))
    dust = uncertainty * (1 + 1e-15 * np.arange(5))
    np.testing.assert_allclose(risk_coverage(risk, dust).risk, np.mean(means, axis=0))


def test_auroc_with_ties():
    rng = np.random.default_rng(16)
    for values in (2, 5, 1000):
        known, new = rng.integers(values, size=30), rng.integers(values, size=50) + values // 3
        assert ood_auroc(known, new) == pytest.approx(roc_auc_score(np.r_[np.zeros(30), np.ones(50)], np.r_[known, new]))
    assert ood_auroc(np.ones(4), np.ones(9)) == .5


# ------------------------------------------------------------------ bad input, one line each

@pytest.mark.parametrize("call, says", [
    (lambda: conformal_quantile([], .9), "no scores"),
    (lambda: conformal_quantile([1., np.nan], .9), "1 scores are NaN"),
    (lambda: conformal_quantile([1.], 90), "expected a coverage between 0 and 1"),
    (lambda: conformal_scores(np.zeros((2, 3)), np.zeros((3, 3))), "shape"),
    (lambda: conformal_scores(np.full((2, 3), np.nan), np.zeros((2, 3))), "predictions: 6 entries are NaN"),
    (lambda: conformal_scores(np.zeros((2, 3)), np.zeros((2, 3)), "sphere"), "expected one of ball, band, gene"),
    (lambda: conformal_scores(np.zeros((2, 3)), np.ones((2, 3)), "band", np.array([1., 0, 1])), "scale"),
    (lambda: per_unit(np.zeros(3), ["a"]), "1 names for 3"),
    (lambda: weighted_quantile([1., 2], [1.], [1.], .9), "2 scores with 1 weights"),
    (lambda: weighted_quantile([1.], [-1.], [1.], .9), "negative"),
    (lambda: density_ratio(np.zeros((0, 2)), np.zeros((3, 2))), "missing"),
    (lambda: coverage_band([(5, 0)], .9), "no test perturbations"),
    (lambda: clopper_pearson(3, 2), "3 covered of 2"),
    (lambda: coverage_table([1, 0], ["a"], .9), "1 for 2"),
    (lambda: normal_nll(np.zeros(2), np.array([1., -1]), np.zeros(2)), "1 entries are negative"),
    (lambda: checked_var(np.array([np.nan]), (1,)), "NaN"),
    (lambda: checked_var(np.zeros(3), (2,)), "expected a variance for each"),
    (lambda: normal_crps(np.zeros(2), np.ones(2), np.zeros(3)), "shape"),
    (lambda: ensemble(np.zeros((1, 2))), "1 member"),
    (lambda: ensemble_crps(np.zeros((1, 2)), np.zeros(2)), "1 member"),
    (lambda: interval_score(1., 0., 0., .9), "low <= high"),
    (lambda: risk_coverage([1.], [1., 2]), "1 risks with 2"),
    (lambda: risk_coverage([1., np.nan], [1., 2]), "NaN"),
    (lambda: ood_auroc([], [1.]), "one side is empty")])
def test_problems_are_one_line(call, says):
    with pytest.raises(Problem, match=says) as problem: call()
    assert "\n" not in str(problem.value)


# ------------------------------------------------------------------ the step, on models that nobody has heard of

@pytest.fixture(scope="module")
def toy_screen():
    "Ten singles and all 45 pairs of them, 25 genes."
    rng, singles = np.random.default_rng(17), {g: None for g in "ABCDEFGHIJ"}
    singles = {g: rng.normal(size=25) for g in singles}
    X = singles | {f"{a}+{b}": .7 * (singles[a] + singles[b]) + .3 * rng.normal(size=25) for a, b in itertools.combinations(singles, 2)}
    obs = pd.DataFrame(dict(perturbation=list(X), perturbation_type="CRISPRa", dose=np.nan, time_h=np.nan, context="x"), index=[f"{p}|CRISPRa|||x" for p in X])
    return ad.AnnData(np.array(list(X.values()), dtype="float32"), obs, pd.DataFrame(index=[f"g{i}" for i in range(25)]), uns=dict(dataset_id="toy", effect_scale="mean_log1p"))


@pytest.fixture(scope="module")
def step(toy_screen, tmp_path_factory):
    "The step run on predictions of five strangers: one states a variance, one has three seeds, one lacks the validation part, one lacks genes."
    out = tmp_path_factory.mktemp("uncertainty")
    results, rng, listed = out / "data/results/toy", np.random.default_rng(18), []
    (out / "data/processed/toy").mkdir(parents=True)
    toy_screen.write_h5ad(out / "data/processed/toy/effects.h5ad")
    for kind in ("doubles", "combination"):
        split = make_split(toy_screen, kind)
        path = freeze(split, results / "splits", "toy")
        listed.append(dict(name=split.name, kind=kind, seed=0, hash=split.hash, path=str(path.relative_to(out))))
        (results / split.name).mkdir()
        for name, noise, seeds, parts in (("stated", .3, 1, ("val", "test")), ("seeds", .5, 3, ("val", "test")), ("plain", .4, 1, ("val", "test")), ("late", .4, 1, ("test",)), ("narrow", .4, 1, ("val", "test"))):
            for seed, part in itertools.product(range(seeds), parts):
                truth = toy_screen[split.ids[part], :20 if name == "narrow" else 25]
                made = ad.AnnData((truth.X + noise * rng.normal(size=truth.shape)).astype("float32"), truth.obs, truth.var)
                if name == "stated": made.layers["var"] = np.full(truth.shape, noise**2, dtype="float32")
                made.write_h5ad(results / split.name / f"{name}.s{seed}.{part}.h5ad")
    (results / "splits.json").write_text(json.dumps(listed))
    run_here("14a_evaluate.uncertainty", out, dataset="toy")
    return out


def test_step_takes_up_every_model_and_says_what_it_leaves_out(step):
    found = pd.read_parquet(step / "data/results/toy/uncertainty.parquet")
    assert set(found["model"]) == {"stated", "seeds", "plain", "committee"}
    for slug in ("uncertainty_coverage", "risk_coverage", "stated_uncertainty"): assert (step / f"figures/toy/{slug}.csv").is_file()
    notes = json.loads((step / "runs/toy/14a_evaluate.uncertainty.record.json").read_text())["notes"]
    assert any("late is left out: no predictions of the val part" in n for n in notes) and any("narrow.s0.test.h5ad is left out: it lacks 5 of the split's 25 genes" in n for n in notes)
    normal = found.query("split == 'doubles.s0' and score == 'normal' and metric == 'coverage' and stratum == 'all'").set_index(["model", "level"])["value"]
    assert normal["stated", .8] == pytest.approx(.8, abs=.06) and normal["stated", .9] == pytest.approx(.9, abs=.05)
    assert set(found.loc[found["score"] == "sample", "model"]) == {"seeds", "committee"}
    pooled = found.query("calibration == 'divided' and metric == 'coverage' and stratum == 'all' and split == 'doubles.s0'")
    assert pooled["value"].between(pooled["expected_low"] - .06, pooled["expected_high"] + .06).all()
    weighted = found[found["weighted"]]
    assert set(weighted["split"]) == {"combination.s0"} and not weighted["exchangeable"].any()
    assert "nothing is guaranteed" in (step / "figures/toy/uncertainty_coverage.json").read_text()


def test_step_without_predictions_leaves_notes(step, tmp_path):
    bare = tmp_path / "out"
    for name in ("data/processed/toy/effects.h5ad", "data/results/toy/splits.json", *(str(p.relative_to(step)) for p in (step / "data/results/toy/splits").iterdir())):
        (bare / name).parent.mkdir(parents=True, exist_ok=True)
        (bare / name).write_bytes((step / name).read_bytes())
    run_here("14a_evaluate.uncertainty", bare, dataset="toy")
    assert sorted(p.name for p in (bare / "figures/toy").iterdir()) == [f"{s}.note.txt" for s in ("risk_coverage", "stated_uncertainty", "uncertainty_coverage")]
