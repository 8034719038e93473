"Latent additive: the rules it must find, and what must not matter to it."
from itertools import combinations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED, needs_shared
from numpy.testing import assert_allclose

from perturb_research.core import Problem, generator
from perturb_research.models.latent_additive import (LatentAdditive, LatentAdditiveNet, LatentAdditivePermuted, LatentAdditivePrior, confidence, log10_dose, places)

FAST = dict(epochs=80, hidden=32, dropout=0.)
SMILES = ['CCO', 'CCCO', 'CC(C)O', 'c1ccccc1', 'Cc1ccccc1', 'CC(=O)O', 'CCN', 'CCCN', 'CCCCO', 'Clc1ccccc1', 'CCCCN', 'CC(N)=O']


def screen(perturbations, effects, contexts='x', kind='CRISPRa', dose=np.nan, genes=None, **columns):
    "Effects as notebook 04 writes them."
    obs = pd.DataFrame(dict(perturbation=perturbations, perturbation_type=kind, context=contexts, dose=dose, time_h=np.nan, **columns))
    obs.index = [f'{p}|{kind}|{d:g}||{c}' for p, d, c in zip(obs['perturbation'], obs['dose'], obs['context'])]
    return ad.AnnData(np.asarray(effects, dtype='float32'), obs, pd.DataFrame(index=genes or [f'G{i}' for i in range(np.shape(effects)[1])]))


def pairs(rule=lambda a, b: .7 * (a + b) + 2 * np.eye(20)[0], genes=20, seed=0):
    "All singles and doubles of eight perturbations, doubles by `rule`; training, and eight doubles held out."
    rng = generator(seed, 'pairs')
    single = {p: 2 * rng.normal(size=genes) for p in 'ABCDEFGH'}
    double = {f'{a}+{b}': rule(single[a], single[b]) for a, b in combinations(single, 2)}
    all_ = screen([*single, *double], [*single.values(), *double.values()])
    return all_[:-8].copy(), all_[-8:].copy()


def drugs(seed=0):
    "Drugs in three lines at three doses: what they do follows structure, how much follows the dose, where it is halved follows the line."
    from perturb_research.models.baselines import structures
    rng = generator(seed, 'drugs')
    obs = [(s, c, d) for s in SMILES for c in range(3) for d in (.1, 1., 10.)]
    name, line, dose = map(list, zip(*obs))
    effects = structures(pd.DataFrame({'smiles': name})) @ rng.normal(size=(1024, 30)) * (np.array(dose) / (1 + np.array(dose)))[:, None] / (1 + np.array(line))[:, None]
    return screen([f'drug{SMILES.index(s):02}' for s in name], effects, [f'line{c}' for c in line], 'drug', dose, smiles=name)


def fit(train, seed=0, make=LatentAdditive, val=None, priors=None, **changes):
    return make(**FAST | changes).fit(train, val=val, priors=priors, rng=generator(seed, 'fit'))


def error(guess, truth): return np.linalg.norm(guess - truth, axis=1).mean()


def test_a_planted_rule_is_learned():
    train, test = pairs()
    additive = np.array([sum(train.X[train.obs['perturbation'] == p][0] for p in name.split('+')) for name in test.obs['perturbation']])
    assert error(fit(train, epochs=150).predict(test.obs), test.X) < .5 * error(additive, test.X)
    assert_allclose(fit(train, epochs=1, lr=0.).predict(test.obs), additive, atol=1e-4)  # before training: the additive profile
    assert error(fit(train, epochs=1, lr=0., start='nothing').predict(test.obs), additive) > 1


def test_dose_line_and_structure_are_learned():
    effects = drugs()
    new = effects.obs['perturbation'].isin(['drug02', 'drug07'])  # of the families of propanol and of the amines
    train, test = effects[~new].copy(), effects[new].copy()
    model = fit(train, epochs=120)
    assert error(model.predict(test.obs), test.X) < .75 * error(np.tile(train.X.mean(0), (len(test), 1)), test.X)
    size = np.linalg.norm(model.predict(train.obs), axis=1)
    by = lambda column: pd.Series(size).groupby(train.obs[column].to_numpy()).mean()
    assert by('dose').is_monotonic_increasing and by('context').is_monotonic_decreasing


def test_same_seed_same_numbers_other_seed_others():
    train, test = pairs()
    one, again, other = (fit(train, s, epochs=5).predict(test.obs) for s in (0, 0, 1))
    assert (one == again).all() and (one != other).any()


def test_order_of_genes_and_of_questions_does_not_matter():
    for train, test in (pairs(), (drugs()[:90].copy(), drugs()[90:].copy())):
        genes = generator(0, 'genes').permutation(train.n_vars)
        one, other = fit(train, epochs=5), fit(train[:, genes].copy(), epochs=5)
        assert_allclose(other.predict(test.obs), one.predict(test.obs)[:, genes], atol=1e-5)
        assert_allclose(one.predict(test.obs.iloc[::-1]), one.predict(test.obs)[::-1], atol=1e-6)


def test_gradients_reach_every_parameter():
    rng = generator(0, 'gradient')
    net = LatentAdditiveNet(rng.normal(size=(5, 6)), contexts=3, bits=7, dosed=True, hidden=16).double()
    y, who, bits, u = (torch.tensor(rng.normal(size=(9, k))) for k in (6, 5, 7, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=.1)
    for _ in range(3):  # last layers start at zero: what is before them moves from the second step on
        optimizer.zero_grad()
        net(y, who, bits, u, torch.tensor(rng.normal(size=9)), torch.ones(9).double()).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_no_perturbation_does_nothing_in_any_context():
    train = drugs()
    model = fit(train, epochs=10)
    with torch.no_grad():
        _, u, dose = model.told(train.obs)
        assert not model.network.decoded(torch.zeros(len(u), model.V.shape[1]).double(), u, dose).any()


def test_training_rows_are_all_that_counts():
    train, test = pairs()
    changed = test.copy()
    changed.X = changed.X + 100
    one, other = (fit(train, val=v, epochs=5, patience=0).predict(test.obs) for v in (test, changed))
    assert (one == other).all()
    stopped = fit(train, val=test, epochs=60, patience=2)  # stops by validation, and gives back the best weights
    val = stopped.history.query("what == 'val'")['value']
    assert error(stopped.predict(test.obs), test.X) == pytest.approx(val.min(), rel=1e-5) and len(val) <= 60


def test_a_finished_checkpoint_gives_the_same_model(tmp_path):
    train, test = pairs()
    one, again = (LatentAdditive(**FAST | dict(epochs=4)).fit(train, rng=generator(0, 'fit'), checkpoint=tmp_path/'c.pt') for _ in range(2))
    assert (one.predict(test.obs) == again.predict(test.obs)).all()


def test_unseen_genes_are_guessed_and_unseen_contexts_lie_in_the_middle():
    train, test = pairs()
    model = fit(train, epochs=1, lr=0.)
    asked = test.obs[:1].assign(perturbation='never seen')
    assert_allclose(model.predict(asked)[0], train.X[:8].mean(0), atol=1e-4)
    effects = drugs()
    known = fit(effects, epochs=5)
    assert np.isfinite(known.predict(effects.obs[:3].assign(context='never seen'))).all()
    assert_allclose(places(effects).sum(0), 0, atol=1e-12)


def test_priors_enter_by_name_only():
    "The plain row never looks at priors; the others are left out where these cannot matter."
    train, test = pairs()
    assert (fit(train, epochs=2, priors='anything').predict(test.obs) == fit(train, epochs=2).predict(test.obs)).all()
    for make in (LatentAdditivePrior, LatentAdditivePermuted):
        assert make.needs == ('graph',) and 'priors would change nothing' in make().applies(train, test.obs)
        assert make().applies(train, test.obs.assign(perturbation='new')) == ''
        assert 'structures speak' in make().applies(drugs(), drugs().obs)
    assert LatentAdditivePermuted.permuted and not LatentAdditivePrior.permuted


def test_weights_follow_cells():
    obs = pd.DataFrame(dict(n_cells=[10., 100., np.nan], dose=[np.nan, 1., 0.]))
    weight = confidence(obs)
    assert weight.mean() == pytest.approx(1) and weight[0] < weight[2] <= weight[1]
    assert (confidence(obs[['dose']]) == 1).all() and np.isnan(log10_dose(obs)[0]) and log10_dose(obs)[2] == -6


def test_controls_say_where_a_context_lies():
    train = drugs()
    train.uns |= dict(control_contexts=['line0', 'line1', 'line2', 'held out'], control_mean=generator(0, 'controls').normal(size=(4, 30)))
    where = places(train)
    assert list(where.index) == ['line0', 'line1', 'line2', 'held out'] and where.shape[1] == 3
    assert fit(train, epochs=2).told(train.obs[:1].assign(context='held out'))[1].abs().sum() > 0


def test_bad_settings_are_refused_in_one_line():
    with pytest.raises(Problem, match="latent_additive: setting 'hiden'.*did you mean 'hidden'"): LatentAdditive(hiden=3)


@needs_shared
def test_doubles_of_norman_below_additive():
    "Half of the doubles held out: better than adding, as every model that sees doubles should be."
    from perturb_research.data.splits import make_split
    from perturb_research.models.baselines import MODELS
    effects = norman()
    split = make_split(effects, 'doubles', 0)
    train, val, test = split.train(effects), split.val(effects), split.test(effects)
    own = LatentAdditive().fit(train, val=val, rng=generator(0, 'norman')).predict(test.obs)
    assert error(own, test.X) < .95 * error(MODELS['additive']().fit(train).predict(test.obs), test.X)


def norman():
    "Norman's effects as notebook 04 reads them."
    from perturb_research.data.labels import describe
    from perturb_research.data.preprocess import read_effects
    from perturb_research.data.read import read_screen
    screen = read_screen(SHARED/'norman'/'norman_effects.h5ad')
    table, report = describe(screen)
    effects = read_effects(screen, table, report)
    effects = effects[0] if isinstance(effects, tuple) else effects
    effects.uns['dataset_id'] = 'norman'
    return effects
