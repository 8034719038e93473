"Every baseline against what it must get right, and against what it must not see."
from itertools import combinations
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from sklearn.kernel_ridge import KernelRidge

from perturb_research.core import Problem, generator
from perturb_research.data.splits import make_split
from perturb_research.models import baselines
from perturb_research.models.baselines import MODELS as EVERY

MODELS = {name: model for name, model in EVERY.items() if model.__module__ == baselines.__name__}  # other test files import further models

DATA = Path(__file__).parents[2]/'shared'/'data'
SMILES = ['CCO', 'CCCO', 'CC(C)O', 'c1ccccc1', 'Cc1ccccc1', 'CC(=O)O', 'CCN', 'CCCN']


def screen(perturbations, effects, contexts='x', kind='CRISPRa', dose=np.nan, genes=None, **columns):
    "Effects as notebook 04 writes them."
    obs = pd.DataFrame(dict(perturbation=perturbations, perturbation_type=kind, context=contexts, dose=dose, time_h=np.nan, **columns))
    obs.index = [f'{p}|{kind}|{d:g}||{c}' for p, d, c in zip(obs['perturbation'], obs['dose'], obs['context'])]
    genes = genes or [f'G{i}' for i in range(np.shape(effects)[1])]
    return ad.AnnData(np.asarray(effects, dtype='float32'), obs, var=pd.DataFrame(index=genes), uns={'dataset_id': 'toy'})


def pairs(rule=lambda a, b: a + b, genes=12, outputs=60, noise=0., seed=0):
    "All singles and doubles of `genes` genes, doubles by `rule`; every perturbed gene is read out."
    rng = generator(seed, 'pairs')
    names = [f'G{i}' for i in range(genes)]
    single = {n: rng.normal(size=outputs) for n in names}
    double = {f'{a}+{b}': rule(single[a], single[b]) for a, b in combinations(names, 2)}
    effects = np.array([*single.values(), *double.values()])
    return screen([*single, *double], effects + noise * rng.normal(size=effects.shape))


def drugs(lines=4, doses=(.1, 1., 10.), seed=0):
    "Drugs with structures and targets in several lines at several doses; the effect follows structure, line and dose."
    rng = generator(seed, 'drugs')
    obs = [(s, f'line{c}', d) for s in SMILES for c in range(lines) for d in doses]
    name, context, dose = map(list, zip(*obs))
    follows = baselines.structures(pd.DataFrame({'smiles': name})) @ rng.normal(size=(1024, 40))
    line = {f'line{c}': 1 + .2 * rng.normal(size=40) for c in range(lines)}
    effects = follows * np.array([line[c] for c in context]) * (1 + np.log10(dose))[:, None] + .1 * rng.normal(size=(len(obs), 40))
    return screen([f'drug{SMILES.index(s)}' for s in name], effects, context, 'drug', dose, smiles=name, targets=[f'G{SMILES.index(s)};G30' for s in name])


def halved(effects, seed=0):
    "All singles and half of the doubles; the other half."
    split = make_split(effects, 'doubles', seed)
    return effects[split.ids['train'] + split.ids['val']], effects[split.ids['test']]


def l2(model, train, test): return np.linalg.norm(MODELS[model]().fit(train).predict(test.obs) - test.X, axis=1).mean()


def test_the_mean_model_is_the_mean_that_metrics_centre_on():
    "Also where a gene is perturbed in two ways: then the model scores 0 after centring, by definition."
    from perturb_research.evaluate.metrics import perturbation_mean
    up, down = pairs(genes=4, outputs=20), pairs(genes=3, outputs=20, seed=1)
    down.obs['perturbation_type'] = 'CRISPRi'
    both = ad.concat([up, down], index_unique='-')
    assert_allclose(MODELS['mean']().fit(both).predict(both.obs)[0], perturbation_mean(both), rtol=1e-5, atol=1e-7)


def test_order_of_the_models():
    assert list(MODELS) == ['no_change', 'mean', 'context_mean', 'additive', 'scaled_additive', 'ridge', 'linear', 'latent_shift', 'nearest', 'kernel']
    with pytest.raises(KeyError, match='mean'): baselines.register(type('Other', (baselines.Model,), dict(name='mean')))
    assert baselines.register(MODELS['mean']) is MODELS['mean']  # a cell may run twice


def test_mean_gives_every_perturbation_one_vote():
    many = screen(['a'] * 9 + ['b'], [[0.]] * 9 + [[10.]], dose=[*range(1, 10), 1])
    assert_allclose(MODELS['mean']().fit(many).predict(many.obs[:1]), [[5]])
    assert_allclose(MODELS['no_change']().fit(many).predict(many.obs), 0)


def test_context_mean_falls_back_on_the_mean_of_all():
    two = screen(['a', 'b', 'a'], [[0.], [2.], [8.]], ['x', 'x', 'y'])
    asked = two.obs.assign(context=['x', 'y', 'z'])
    assert_allclose(MODELS['context_mean']().fit(two).predict(asked)[:, 0], [1, 8, 3])


def test_additive_is_exact_on_an_additive_screen():
    train, test = halved(pairs())
    assert l2('additive', train, test) < 1e-5
    assert l2('latent_shift', train, test) < 1e-4
    assert l2('kernel', train, test) < .02 * l2('mean', train, test)


def test_an_unseen_constituent_counts_as_the_mean_single():
    three = screen(['a', 'b', 'c'], [[1., 0.], [3., 0.], [0., 9.]])
    asked = three.obs[:1].assign(perturbation='a+new')
    assert_allclose(MODELS['additive']().fit(three).predict(asked), [[1 + 4 / 3, 3]], rtol=1e-6)


def test_transfer_takes_the_nearest_dose_and_one_vote_a_context():
    train = screen(['d'] * 4 + ['e'], [[1.], [2.], [4.], [8.], [0.]], ['x', 'x', 'y', 'y', 'z'], 'drug', [1., 10., 10., 11., 1.])
    asked = train.obs[4:].assign(perturbation='d', dose=10.)
    assert_allclose(MODELS['additive']().fit(train).predict(asked), [[3]])
    assert_allclose((baselines.additive_weights(train.obs[:2], train.obs, own_context=False) @ train.X)[:, 0], [4, 4])
    assert_allclose((baselines.additive_weights(train.obs[:2], train.obs) @ train.X)[:, 0], [1, 2])


@pytest.mark.parametrize('scale', [.4, 1., 1.7])
def test_scaled_additive_recovers_a_planted_scale(scale):
    train, test = halved(pairs(lambda a, b: scale * (a + b), noise=.05))
    model = MODELS['scaled_additive']().fit(train)
    assert abs(model.hyperparameters['scale'] - scale) < .02
    singles = train[~train.obs['perturbation'].str.contains('+', regex=False)]
    assert_allclose(model.predict(singles.obs), singles.X)


def test_scale_of_transfers_leaves_the_own_context_out():
    effects = drugs()
    split = make_split(effects, 'context')
    model = MODELS['scaled_additive']().fit(split.train(effects))
    assert .5 < model.hyperparameters['scale'] < .99
    assert np.isfinite(model.predict(split.test(effects).obs)).all()


def test_kernel_finds_a_planted_interaction_and_invents_none():
    ruled = lambda a, b: .6 * (a + b) + 3 * np.tanh((a + b)[:5].sum()) * np.linspace(-1, 1, 60)
    train, test = halved(pairs(ruled, genes=16, noise=.1))
    assert l2('kernel', train, test) < .7 * l2('additive', train, test)
    assert l2('kernel', train, test) < .9 * l2('scaled_additive', train, test)
    train, test = halved(pairs(genes=16, noise=1.))
    assert l2('kernel', train, test) < 1.02 * l2('additive', train, test)


def test_linear_is_the_published_formula():
    train, test = halved(pairs(noise=.1))
    Y, K, ridge = train.X.T.astype(float), 10, .1
    U, S, _ = np.linalg.svd(Y - Y.mean(0), full_matrices=False)  # prcomp of genes x conditions: scores
    G = U[:, :K] * S[:K]
    row = dict(zip(train.var_names, G))
    P, asked = (np.array([sum(row[g] for g in p.split('+')) for p in c['perturbation']]) for c in (train.obs, test.obs))
    b, eye = Y.mean(1, keepdims=True), np.eye(K)
    W = np.linalg.inv(G.T @ G + ridge * eye) @ G.T @ (Y - b) @ P @ np.linalg.inv(P.T @ P + ridge * eye)
    assert_allclose(MODELS['linear']().fit(train).predict(test.obs), (G @ W @ asked.T + b).T, atol=1e-4)


def test_linear_averages_the_targets_of_a_drug():
    hit = baselines.hit_genes(drugs().obs[:1].assign(targets='G0;G7; nowhere'), [f'G{i}' for i in range(9)]).toarray()
    assert_allclose(hit, [[.5, 0, 0, 0, 0, 0, 0, .5, 0]])


@pytest.mark.parametrize('shape', [(15, 6), (9, 30)])
def test_left_out_residuals_equal_refitting(shape):
    rng = generator(0, 'left out', *shape)
    F, Y, penalty = rng.normal(size=shape), rng.normal(size=(shape[0], 4)), .3
    V, w = baselines.spectrum(F)
    fit = lambda keep, ask: KernelRidge(alpha=penalty).fit(F[keep], Y[keep]).predict(F[ask])
    alone = np.vstack([Y[[i]] - fit(np.arange(len(F)) != i, [i]) for i in range(len(F))])
    assert_allclose(baselines.left_out(V, w, Y, penalty), alone, atol=1e-8)
    groups = rng.integers(4, size=len(F))
    together = np.vstack([Y[[i]] - fit(groups != groups[i], [i]) for i in range(len(F))])
    assert_allclose(baselines.left_out(V, w, Y, penalty, groups), together, atol=1e-8)
    assert_allclose(F @ (F.T @ baselines.dual(V, w, Y, penalty)), fit(slice(None), slice(None)), atol=1e-8)


def test_shrunk_slopes_leave_rows_out_as_refitting_does():
    rng = generator(0, 'slopes')
    A = rng.normal(size=(30, 40))
    Y = A * rng.normal(1, .5, size=40) + .01 * rng.normal(size=A.shape)
    slopes, shrinkage = baselines.shrunk_slopes(A, Y)
    assert shrinkage == .1 and np.corrcoef(slopes, (A * Y).sum(0) / (A**2).sum(0))[0, 1] > .999
    assert np.ptp(baselines.shrunk_slopes(A, A + 5 * rng.normal(size=A.shape))[0]) < .4


def test_penalties_are_compared_without_loss_on_leading_coordinates():
    rng = generator(0, 'leading')
    Y = rng.normal(size=(20, 90))
    L = baselines.leading(Y, 200)
    assert_allclose(L.T @ L, np.eye(20), atol=1e-8)
    assert_allclose(Y @ L @ L.T, Y, atol=1e-8)


def test_ridge_leaves_out_what_is_new():
    effects = drugs()
    context, drug = make_split(effects, 'context'), make_split(effects, 'perturbation')
    train, val = context.train(effects), context.val(effects)
    new_line = val if val.n_obs else context.test(effects)
    assert len(set(baselines.folds(train.obs, new_line))) == train.obs['context'].nunique()
    train = drug.train(effects)
    assert len(set(baselines.folds(train.obs, drug.val(effects)))) == train.obs['perturbation'].nunique()


def test_structure_helps_where_it_carries_the_effect():
    effects = drugs()
    held = effects.obs['perturbation'].isin(['drug1', 'drug4'])
    train, test = effects[~held], effects[held]
    for model in ('ridge', 'nearest', 'kernel'): assert l2(model, train, test) < l2('mean', train, test), model


def test_similarities():
    effects = drugs()
    alike = baselines.structure_similarity(effects.obs, effects.obs)
    assert_allclose(alike, alike.T)
    assert alike.max() == 1 and np.linalg.eigvalsh(alike[::12, ::12]).min() > -1e-9
    contexts = baselines.context_similarity(effects.obs, effects.X)
    assert_allclose(np.diag(contexts), 1)
    new = baselines.similarity(effects.obs[:1].assign(context='new'), effects.obs, contexts)
    assert ((new >= 0) & (new <= 1 + 1e-9)).all() and new[0].argmax() < 12


def applicable(train, test): return [name for name, make in MODELS.items() if not make().applies(train, test.obs)]


@pytest.mark.parametrize('make, kind', [(lambda: pairs(noise=.2), 'doubles'), (lambda: pairs(noise=.2), 'combination'), (drugs, 'perturbation'), (drugs, 'context')])
def test_no_model_reads_held_out_rows(make, kind):
    effects = make()
    split, changed = make_split(effects, kind), make()
    changed.X[changed.obs_names.get_indexer(split.ids['test'])] = 1e3
    for name in applicable(split.train(effects), split.test(effects)):
        before, after = (MODELS[name]().fit(split.train(e), val=split.val(e)).predict(split.test(e).obs) for e in (effects, changed))
        assert np.array_equal(before, after), name
        assert before.shape == split.test(effects).shape and before.dtype == np.float32 and np.isfinite(before).all(), name


@pytest.mark.parametrize('make, kind', [(lambda: pairs(noise=.2), 'combination'), (drugs, 'perturbation'), (drugs, 'context')])
def test_order_of_genes_and_rows_means_nothing(make, kind):
    effects = make()
    split, rng = make_split(effects, kind), generator(0, 'permutation')
    genes = rng.permutation(effects.n_vars)
    train, test = split.train(effects), split.test(effects)
    for name in applicable(train, test):
        fitted = MODELS[name]().fit(train).predict(test.obs)
        assert_allclose(MODELS[name]().fit(train[:, genes]).predict(test.obs), fitted[:, genes], atol=2e-4, err_msg=name)
        if name in ('nearest', 'latent_shift'): continue  # ties and folds follow the order of rows and names
        rows = rng.permutation(train.n_obs)
        assert_allclose(MODELS[name]().fit(train[rows]).predict(test.obs), fitted, atol=2e-3, err_msg=name)


def test_hyperparameters_are_plain_numbers():
    for train, test in (halved(pairs(noise=.2)), (drugs()[:60], drugs()[60:])):
        for name in applicable(train, test):
            values = MODELS[name]().fit(train).hyperparameters.values()
            assert all(type(v) in (int, float) for v in values), (name, values)


def test_reasons_for_standing_aside():
    doubles, lone = pairs(), screen(list('abcdef'), np.eye(6), genes=list('uvwxyz'))
    why = lambda name, train, test: MODELS[name]().applies(train, test.obs)
    for name in ('additive', 'scaled_additive', 'latent_shift'): assert 'no combinations and no second context' in why(name, lone[:4], lone[4:])
    for name in ('nearest', 'kernel'): assert 'no combinations, structures or second context' in why(name, lone[:4], lone[4:])
    assert 'no perturbed gene' in why('linear', lone[:4], lone[4:])
    assert 'one context' in why('context_mean', *halved(doubles))
    assert 'no perturbation stands alone' in why('additive', doubles[12:40], doubles[40:])
    assert '0 training combinations: too few' in why('kernel', doubles[:12], doubles[12:])
    assert '2 training combinations: too few to learn from (4 needed)' in why('nearest', doubles[:14], doubles[14:])
    assert set(MODELS) - set(applicable(*halved(doubles))) == {'context_mean'}
    effects = drugs()
    assert 'would equal the context mean' in why('additive', effects[effects.obs['perturbation'] != 'drug1'], effects[effects.obs['perturbation'] == 'drug1'])
    for name in MODELS: assert '\n' not in why(name, lone[:4], lone[4:])


def test_what_is_missing_is_said_in_one_line():
    effects = pairs()
    broken = effects.copy()
    broken.X[0, 0] = np.nan
    with pytest.raises(Problem, match='NaN or inf'): MODELS['mean']().fit(broken)
    with pytest.raises(Problem, match='no training conditions'): MODELS['mean']().fit(effects[:0])
    with pytest.raises(Problem, match='not fitted yet'): MODELS['mean']().predict(effects.obs)
    with pytest.raises(Problem, match='no column context'): MODELS['mean']().fit(effects).predict(effects.obs.drop(columns='context'))
    with pytest.raises(Problem, match='stands alone'): MODELS['additive']().fit(effects[20:]).predict(effects.obs)
    with pytest.raises(Problem, match='no training combination'): MODELS['scaled_additive']().fit(effects[:12])


def test_candidates_are_all_singles_and_pairs():
    train, _ = halved(pairs(genes=5))
    asked = baselines.candidates(train.obs)
    assert len(asked) == 5 + 10 and asked.index.is_unique and set(train.obs['perturbation']) <= set(asked['perturbation'])
    assert np.isfinite(MODELS['kernel']().fit(train).predict(asked)).all()
    assert list(baselines.candidates(drugs().obs).index) == list(drugs().obs_names)  # no combinations: what training knows


@pytest.mark.skipif(not DATA.exists(), reason='real screens are not here')
@pytest.mark.parametrize('name, most', [('norman', .84), ('carpool', .60)])
def test_kernel_on_real_doubles(name, most):
    import importlib.util
    spec = importlib.util.spec_from_file_location('doubles', Path(__file__).parents[1]/'benchmarks'/'doubles.py')
    doubles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(doubles)
    table = doubles.table(doubles.measure(doubles.read(DATA/name/f'{name}_effects.h5ad'), ('additive', 'scaled_additive', 'kernel')))
    assert table.loc['kernel', 'L2 / additive'] <= most
    assert table['L2 / additive'].idxmin() == 'kernel' and table.loc['additive', 'L2 / additive'] == 1
