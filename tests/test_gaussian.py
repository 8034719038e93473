"The Gaussian-process family against refitting, a planted rule, exchanged labels and rows that it must not see."
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import needs_shared

from perturb_research.core import generator
from perturb_research.data.priors import Priors
from perturb_research.models.baselines import MODELS, candidates, mean_length
from perturb_research.models.gaussian import (FAMILY, Average, Joint, MultiKernel, Pairs, Prior, PriorPermuted, SlopesFirst, co_response,
                                              descend, each_alone, family, held_out, informative, level_weights, together)

PAIRS = SlopesFirst, Joint, MultiKernel, Average


def screen(perturbations, effects, kind='CRISPRa', context='x'):
    obs = pd.DataFrame(dict(perturbation=perturbations, perturbation_type=kind, context=context, dose=np.nan, time_h=np.nan))
    obs.index = obs['perturbation'] + '|' + obs['context'].astype(str)
    return ad.AnnData(np.asarray(effects, dtype='float32'), obs, var=pd.DataFrame(index=[f'G{i}' for i in range(np.shape(effects)[1])]))


def planted(genes='ABCDEFGHIJ', outputs=40, noise=.15, seed=0):
    "Pairs are 0.7 of the sum of their parts, and gene G39 is switched on where both parts raise G0."
    rng = generator(seed, 'planted')
    alone = {g: rng.normal(size=outputs) for g in genes}
    pairs = {f'{a}+{b}': .7 * (alone[a] + alone[b]) for i, a in enumerate(genes) for b in genes[i + 1:]}
    for name, y in pairs.items(): y[-1] += 3 * all(alone[g][0] > 0 for g in name.split('+'))
    return screen([*alone, *pairs], np.array([*alone.values(), *pairs.values()]) + rng.normal(scale=noise, size=(len(alone) + len(pairs), outputs)))


def relatives(seed=0):
    "Single perturbations of five families of six; the last member of each is to be held out."
    rng = generator(seed, 'relatives')
    names = [f'{f}{i}' for f in ('AA', 'BB', 'CC', 'DD', 'EE') for i in range(6)]
    of_family = {f: rng.normal(size=50) for f in ('AA', 'BB', 'CC', 'DD', 'EE')}
    data = screen(names, [of_family[n[:2]] + rng.normal(scale=.4, size=50) for n in names])
    return data, np.array([n.endswith('5') for n in names])


def nothing_known(data):
    names = pd.Index(sorted({p for x in data.obs['perturbation'] for p in x.split('+')}))
    return Priors(names, names)


@pytest.fixture(scope='module')
def halves():
    data = planted()
    held = np.isin(data.obs_names, data.obs_names[10:][::4])
    return data[~held].copy(), data[held].copy()


@pytest.fixture(scope='module')
def fitted(halves): return {make.name: make().fit(halves[0]) for make in PAIRS}


# ---- pieces

def test_groups_left_out_equal_refitting():
    rng = generator(0, 'refit')
    N, T = np.cov(rng.normal(size=(7, 60))), rng.normal(size=(7, 4))
    groups = [(np.array([0, 2, 5]), np.array([2, 5])), (np.array([1]), np.array([1])), (np.array([3, 4]), np.array([3, 4]))]
    residual, variance = held_out(N, T, together(groups))
    at = 0
    for out, judged in groups:
        rest = np.setdiff1d(range(7), out)
        weights = N[np.ix_(judged, rest)] @ np.linalg.inv(N[np.ix_(rest, rest)])
        assert np.allclose(residual[at:at + len(judged)], T[judged] - weights @ T[rest])
        assert np.allclose(variance[at:at + len(judged)], np.diag(N)[judged] - (weights * N[np.ix_(judged, rest)]).sum(1))
        at += len(judged)
    one, two = held_out(N, T, each_alone([3, 1])), held_out(N, T, together([(np.array([3]), np.array([3])), (np.array([1, 0]), np.array([1]))]))
    assert np.allclose(one[0][0], two[0][0]) and not np.allclose(one[0][1], two[0][1])


def test_descent_finds_the_least_and_stays_within_bounds():
    assert descend(lambda x: 1 + ((x - [3., -2.5])**2).sum(), [0, 0]).tolist() == [3, -2.5]
    assert abs(descend(lambda x: 100 - x[0], [0.])[0]) <= 14


def test_levels_prefer_what_predicts():
    residuals = np.ones((3, 20, 2))
    residuals[1, :, 0] = .5
    weights = level_weights(residuals)
    assert np.allclose(weights.sum(0), 1) and weights[1, 0] > .99 and np.allclose(weights[:, 1], 1 / 3)
    assert np.isfinite(level_weights(np.zeros((3, 4, 1)))).all()


def test_kernels_are_covariances():
    rng = generator(1, 'kernels')
    shares = rng.integers(0, 2, size=(12, 5)) + 1e-9
    some = Pairs(rng.normal(size=(12, 6)), shares / shares.sum(1, keepdims=True), rng.normal(size=(5, 6)))
    for kernel in [*some.alike(some, 3.), *informative({'x': np.corrcoef(rng.normal(size=(6, 4)))}).values()]:
        assert np.allclose(kernel, kernel.T) and np.linalg.eigvalsh(kernel).min() > -1e-9


def test_families_and_co_response():
    K = family(['FOXA1', 'FOXA3', 'MAP2K3', 'MAP2K6', 'KLF1', 'T'])
    assert K[0, 1] == K[2, 3] == 1 and K[0, 2] == K[4, 5] == 0
    X = np.array([[1., 2, 0], [-1, -2, 1], [0, 0, -1]])
    K = co_response(['a', 'b', 'away'], ['a', 'b', 'c'], X)
    assert np.isclose(K[0, 1], 1) and K[2, 0] == 0 and np.allclose(np.diag(K), 1)
    assert [*informative({'no': np.eye(3), 'yes': np.ones((3, 3))})] == ['yes']


# ---- pairs of known genes

def test_planted_rule_is_learnt(halves, fitted):
    train, test = halves
    additive = mean_length(MODELS['additive']().fit(train).predict(test.obs) - test.X)
    for name, model in fitted.items(): assert mean_length(model.predict(test.obs) - test.X) < .5 * additive, name


def test_order_of_genes_and_rows_does_not_matter(halves, fitted):
    train, test = halves
    rng = generator(0, 'order')
    genes, rows = rng.permutation(train.n_vars), rng.permutation(train.n_obs)
    for make in PAIRS:
        again = make().fit(train[rows][:, genes].copy()).predict(test.obs)
        assert np.allclose(again, fitted[make.name].predict(test.obs)[:, genes], atol=1e-3), make.name


def test_same_again_and_test_rows_unseen(halves, fitted):
    train, test = halves
    for make in PAIRS:
        model = make().fit(train, val=test)
        assert np.array_equal(model.predict(test.obs), fitted[make.name].predict(test.obs))
        assert np.array_equal(model.predict(test.obs[::-1])[::-1], model.predict(test.obs)) or np.allclose(model.predict(test.obs[::-1])[::-1], model.predict(test.obs), atol=1e-5)


def test_stated_variance_covers_and_grows_with_distance(halves, fitted):
    train, test = halves
    for name, model in fitted.items():
        var = model.var(test.obs)
        assert var.shape == test.shape and (var > 0).all()
        inside = (abs(model.predict(test.obs) - test.X) < 1.645 * np.sqrt(var)).mean()
        assert .75 < inside <= 1, (name, inside)
    away = test.obs.iloc[:1].assign(perturbation='A+new')
    assert fitted['gp_joint'].var(away).mean() > 2 * fitted['gp_joint'].var(test.obs).mean()
    assert fitted['gp_slopes'].var(away) is None and fitted['gp_joint'].var(train.obs) is None


def test_average_is_the_average(halves, fitted):
    train, test = halves
    model = fitted['gp_average']
    members = [m.predict(test.obs) for m in (model.joint, *model.others)]
    assert np.allclose(model.predict(test.obs), np.mean(members, axis=0), atol=1e-5)
    within = np.mean([m.var(test.obs) for m in (model.joint, *model.others)], axis=0)
    assert np.allclose(model.var(test.obs), within + np.var(members, axis=0), rtol=1e-3)


def test_average_leaves_the_joint_process_as_it_is(halves, fitted):
    train, test = halves
    assert np.allclose(fitted['gp_average'].joint.X, train.X) and np.array_equal(fitted['gp_average'].predict(train.obs), fitted['gp_joint'].predict(train.obs))
    new = test.obs.iloc[:2].assign(perturbation=['A+new', 'new'])
    assert np.array_equal(fitted['gp_average'].predict(new), fitted['gp_joint'].predict(new))


def test_gallery_and_known_conditions(halves, fitted):
    train, test = halves
    gallery = candidates(train.obs)
    assert fitted['gp_average'].predict(gallery).shape == (55, train.n_vars)
    known = fitted['gp_joint'].predict(train.obs)
    assert mean_length(known - train.X) < .5 * mean_length(train.X)


def test_single_effects_are_freed_from_noise():
    noisy, clean = planted(noise=.6), planted(noise=0)
    model = Joint().fit(noisy)
    single = (clean.obs['perturbation'].str.len() == 1).to_numpy()
    assert mean_length(model.smoothed() - clean.X[single]) < mean_length(noisy.X[single] - clean.X[single])


# ---- new genes

def test_relatives_tell_and_exchanged_labels_do_not():
    data, new = relatives()
    off = {make.name: mean_length(make().fit(data[~new], priors=nothing_known(data), rng=generator(0, 'rng')).predict(data[new].obs) - data[new].X)
           for make in (MODELS['mean'], Prior, PriorPermuted)}
    assert off['gp_prior'] < .6 * off['mean'] < .6 / .9 * off['gp_prior_permuted']


def test_known_targets_of_a_new_gene_are_expected():
    rng = generator(0, 'targets')
    data, new = relatives(1)
    data = data.copy()
    genes = pd.Index(sorted({*data.var_names, *data.obs['perturbation']}))
    from scipy import sparse
    A = np.zeros((len(genes), len(genes)))
    effects = rng.normal(scale=.3, size=data.shape)
    for i, name in enumerate(data.obs['perturbation']):
        hit = rng.permutation(50)[:8]
        A[genes.get_loc(name), genes.get_indexer(data.var_names[hit])] = sign = rng.choice([-1, 1], 8)
        effects[i, hit] += 2 * sign
    data.X = effects.astype('float32')
    priors = Priors(genes, pd.Index(sorted(data.obs['perturbation'])), graphs={'net': sparse.csr_array(A)})
    off = {name: mean_length(make().fit(data[~new], priors=known, rng=rng).predict(data[new].obs) - data[new].X)
           for name, make, known in (('mean', MODELS['mean'], None), ('true', Prior, priors), ('permuted', PriorPermuted, priors.permuted(rng)))}
    assert off['true'] < .6 * off['mean'] and off['permuted'] > .9 * off['mean']


def test_pairs_with_new_genes(halves):
    train, test = halves
    without = ~train.obs['perturbation'].str.contains('A')
    asked = train.obs[~without.to_numpy()]
    model = Joint().fit(train[without.to_numpy()].copy())
    kinds = model.asked(asked)
    assert set(kinds) == {'single', 'one'}
    pairs = kinds == 'one'
    truth = train[~without.to_numpy()].X
    assert mean_length(model.predict(asked)[pairs] - truth[pairs]) < mean_length(truth[pairs] - MODELS['mean']().fit(train[without.to_numpy()]).predict(asked)[pairs])
    both = asked.iloc[:1].assign(perturbation='new+newer')
    assert model.asked(both).tolist() == ['both'] and np.isfinite(model.predict(both)).all() and np.isfinite(model.var(both)).all()


# ---- what a model says no to

def test_one_line_where_nothing_applies(halves):
    train, test = halves
    drugs = screen(['x', 'y'], np.eye(2), kind='drug')
    lines = ad.concat([train, screen(['A'], np.ones((1, 40)), context='other')])
    assert 'not of drugs' in Joint().applies(drugs, drugs.obs) and 'several contexts' in Average().applies(lines, test.obs)
    assert 'would equal gp_joint' in Prior().applies(train, test.obs)
    assert 'no combinations' in Joint().applies(*(lambda d: (d, d.obs))(relatives()[0]))
    few = train[[*range(10), 10, 11]]
    assert 'too few' in Joint().applies(few, test.obs) and Prior().applies(train, test.obs.assign(perturbation='A+new')) == ''
    for make in FAMILY: assert '\n' not in make().applies(train, test.obs)


# ---- real screens

@needs_shared
def test_norman_and_carpool_pairs():
    sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
    import doubles
    for path, most in zip(doubles.DEFAULT, (.83, .59)):
        effects = doubles.read(path)
        train, held = next(doubles.halves(effects))
        truth, asked = effects[held].X, effects.obs[held]
        error = {make.name: mean_length(make().fit(effects[train]).predict(asked) - truth) for make in (MODELS['additive'], MODELS['kernel'], Average)}
        assert error['gp_average'] < most * error['additive'] and error['gp_average'] < error['kernel']
