"Forests: a planted rule is learned, priors are used where they hold, and neither genes' order, last digits nor held-out rows matter."
import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturb_research.core import generator
from perturb_research.data.priors import gather
from perturb_research.models.baselines import Additive, ScaledAdditive
from perturb_research.models.forests import GradientBoosting, RandomForest, RandomForestPermuted, cases, factors, grid, kind_of_question, rounded, signed, spectral

BOTH = pytest.mark.parametrize("make", [RandomForest, GradientBoosting])


def screen(names, X, kind="CRISPRa", contexts="x", **columns):
    obs = pd.DataFrame({"perturbation": names, "perturbation_type": kind, "context": contexts, "dose": np.nan, "time_h": np.nan} | columns)
    obs.index = [f"{i}|{p}" for i, p in enumerate(obs["perturbation"])]
    return ad.AnnData(np.asarray(X, dtype="float32"), obs, pd.DataFrame(index=[f"g{i:02d}" for i in range(np.shape(X)[1])]))


def doubles(n=12, genes=24):
    "Singles along one direction and all pairs: 0.7 times the sum, and a step of 6 on gene 0 where they lie together below 0 on it."
    rng, names = np.random.default_rng(0), [f"P{i:02d}" for i in range(n)]
    main = rng.normal(size=n)
    single = np.outer(main, rng.normal(size=genes)) + .3 * rng.normal(size=(n, genes))
    pairs = [(i, j) for j in range(n) for i in range(j)]
    both = [.7 * (single[i] + single[j]) + 6 * (main[i] + main[j] < 0) * (np.arange(genes) == 0) for i, j in pairs]
    return screen(names + [f"{names[i]}+{names[j]}" for i, j in pairs], np.vstack([single, both]))


ALL = doubles()
TRAIN, TEST = ALL[np.r_[:12, 12:len(ALL):2]].copy(), ALL[np.r_[13:len(ALL):2]].copy()


def error(model, test): return np.linalg.norm(model.predict(test.obs) - test.X, axis=1).mean()


@BOTH
def test_a_planted_rule_is_learned(make):
    model = make(trees=40).fit(TRAIN)
    assert error(model, TEST) < .7 * min(error(ScaledAdditive().fit(TRAIN), TEST), error(Additive().fit(TRAIN), TEST))
    assert model.hyperparameters["shrink"]["2 perturbed, 0 new"] > .5
    assert model.importance().sum() == pytest.approx(1) and model.importance()["profile"] > .3


@BOTH
def test_same_seed_same_numbers_and_another_seed_others(make):
    first, again, other = (make(trees=20).fit(TRAIN, rng=generator(s, "t")).predict(TEST.obs) for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@BOTH
def test_neither_the_order_of_genes_nor_the_last_digits_matter(make):
    first = make(trees=20).fit(TRAIN).predict(TEST.obs)
    order = np.random.default_rng(1).permutation(TRAIN.n_vars)
    assert np.allclose(make(trees=20).fit(TRAIN[:, order].copy()).predict(TEST.obs), first[:, order], atol=1e-5)
    shaken = ad.AnnData((TRAIN.X * (1 + 6e-8 * np.random.default_rng(2).choice([-1, 0, 1], TRAIN.shape))).astype("float32"), TRAIN.obs, TRAIN.var)
    assert np.allclose(make(trees=20).fit(shaken).predict(TEST.obs), first, atol=1e-5)


@BOTH
def test_nothing_of_the_validation_effects_matters(make):
    val = TEST[:5].copy()
    first = make(trees=10).fit(TRAIN, val=val).predict(TEST.obs)
    val.X[:] = 99
    assert np.array_equal(make(trees=10).fit(TRAIN, val=val).predict(TEST.obs), first)


def test_signs_and_steps():
    V = np.random.default_rng(0).normal(size=(6, 3))
    assert np.array_equal(signed(V), signed(-V)) and (signed(V)[abs(V).argmax(0), range(3)] > 0).all()
    F = np.array([[123.4567891, 1e-9], [-1., 2e-9]])
    assert np.allclose(rounded(F, grid(F)), F, rtol=1e-5) and rounded(F + 1e-9, grid(F))[0, 0] == rounded(F, grid(F))[0, 0]
    assert spectral(np.eye(4)).shape == (4, 0)  # nothing is known: no gene is anywhere


def test_examples_hide_what_is_asked():
    parts = [set(p.split("+")) for p in TRAIN.obs["perturbation"]]
    (rows, known), *hidden = cases(TRAIN.obs, None)
    assert all(len(parts[i]) == 2 for i in rows) and len(known) == len(TRAIN)
    for rows, known in hidden:
        assert not set(rows) & set(known) and set(rows) | set(known) == set(range(len(TRAIN)))
        gone = set().union(*parts) - set().union(*(parts[i] for i in known))
        assert gone and all(parts[i] & gone for i in rows)
    assert kind_of_question(TEST.obs[:1].assign(perturbation="P00+NEW"), TRAIN.obs) == [(2, 1)]
    assert factors(np.ones((9, 1)), -np.ones((9, 1)), [(1, 1)] * 9, low=0.) == {(1, 1): 0, (1, None): 0}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    "Forty genes in four families that act alike; sets that name the families; a screen of thirty of them, and ten asked for."
    rng, names = np.random.default_rng(3), [f"P{i:02d}" for i in range(40)]
    X = rng.normal(size=(4, 30))[np.arange(40) % 4] + .3 * rng.normal(size=(40, 30))
    path = tmp_path_factory.mktemp("sets") / "families.gmt"
    path.write_text("".join(f"family{k}\t\t" + "\t".join(names[k::4]) + "\n" for k in range(4)))
    every = screen(names, X)
    order = rng.permutation(40)
    return every[order[:30]].copy(), every[order[30:]].copy(), gather([path], every.var_names, names)


@BOTH
def test_a_prior_that_holds_is_used_for_unseen_genes(make, families):
    train, test, priors = families
    with_prior, without = make(trees=60).fit(train, priors=priors), make(trees=60).fit(train)
    exchanged = make(trees=60).fit(train, priors=priors.permuted(generator(0, "exchanged")))
    assert error(with_prior, test) < .6 * min(error(without, test), error(exchanged, test))
    assert "prior" in with_prior.importance() and "prior" not in without.importance()
    assert RandomForestPermuted.permuted and not RandomForest.permuted


def drugs(n=24):
    "Drugs of two chemical families in three lines; the family decides the effect, the line its strength."
    rng, lines = np.random.default_rng(4), ["l1", "l2", "l3", "l4"]
    smiles = [("c1ccccc1" if i % 2 else "C1CCNCC1") + "C" * (i // 2 + 1) + "O" for i in range(n)]
    effect = rng.normal(size=(2, 20))[np.arange(n) % 2]
    rows = [(f"d{i:02d}", line, smiles[i], [1, 1.5, .8, 1.2][k] * effect[i] + .2 * rng.normal(size=20)) for i in range(n) for k, line in enumerate(lines)]
    return screen([r[0] for r in rows], [r[3] for r in rows], "drug", [r[1] for r in rows], dose=1., time_h=24., smiles=[r[2] for r in rows], targets="")


@BOTH
def test_drugs_by_structure_and_in_new_contexts(make):
    every = drugs()
    new_drug, new_line = every.obs["perturbation"] >= "d18", every.obs["context"] == "l4"
    train, test = every[~new_drug].copy(), every[new_drug].copy()
    model = make(trees=40).fit(train, val=test[:4])
    assert error(model, test) < .6 * np.linalg.norm(model.average - test.X, axis=1).mean()
    train, test = every[~new_line].copy(), every[new_line].copy()
    model = make(trees=40).fit(train, val=test)
    assert set(model.hyperparameters["base"]) == {"1 perturbed, 0 new"} and error(model, test) < 1.25 * error(Additive().fit(train), test)


def test_what_cannot_be_described_is_refused_and_what_was_measured_is_not_bent():
    single = TRAIN[:12]
    assert "nothing is known" in RandomForest().applies(single, TEST[:1].obs.assign(perturbation="Z"))
    assert "no perturbation stands alone" in RandomForest().applies(TRAIN[12:], TEST.obs) and not RandomForest().applies(TRAIN, TEST.obs)
    model = RandomForest(trees=10).fit(TRAIN)
    assert np.allclose(model.predict(single.obs), single.X, atol=1e-5)  # a gene perturbed alone in training
    unseen = model.predict(TEST[:2].obs.assign(perturbation=["NEW", "NEW+OTHER"]))
    assert np.isfinite(unseen).all()
    few = RandomForest(trees=10).fit(TRAIN[:1])
    assert few.importance().empty and np.allclose(few.predict(TRAIN[:1].obs), TRAIN.X[:1])
