"Response to drugs: what the models must find, what they must refuse, and that the treated cell is no input."
import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose

from perturb_research.core import Problem, generator
from perturb_research.data.imbalance import edistances
from perturb_research.data.splits import make_split
from perturb_research.drugs.response import (DrugMean, FingerprintLine, LineDrug, Response, ResponseNet, ResponsePlain, beside_distances, left_together, log10_given, rank_loss, untreated,
                                             without_structure)
from perturb_research.models.baselines import MODELS

FAMILIES = ['CCO CCCO CCCCO CCCCCO', 'CCN CCCN CCCCN CCCCCN', 'c1ccccc1 Cc1ccccc1 CCc1ccccc1 CCCc1ccccc1', 'CC#N CCC#N CCCC#N CCCCC#N']
FAST = dict(epochs=3, d=16, heads=2, layers=1, components=6, tokens=8, batch=64, dropout=0., patience=0)


def screen(genes=30, noise=.2, seed=0):
    "Drugs at three doses in four lines: what they do follows the family, how much the dose and the line."
    rng, family = generator(seed, 'screen'), {s: i for i, names in enumerate(FAMILIES) for s in names.split()}
    obs = pd.DataFrame([(s, f'line{c}', d) for s in family for c in range(4) for d in (.1, 1., 10.)], columns=['smiles', 'context', 'dose'])
    obs = obs.assign(perturbation='drug ' + obs['smiles'], perturbation_type='drug', time_h=24., n_cells=100)
    effect, strength = rng.normal(size=(4, genes)), np.array([1., .8, .6, .4])
    much = strength[obs['context'].str[-1].astype(int)] * obs['dose'].to_numpy() / (1 + obs['dose'].to_numpy())
    X = effect[[family[s] for s in obs['smiles']]] * much[:, None] + noise * rng.normal(size=(len(obs), genes))
    controls = rng.normal(2, .05, (4, genes))
    controls[:, :2] += np.c_[strength, -strength]
    obs.index = obs['perturbation'] + '|drug|' + obs['dose'].map('{:g}'.format) + '|24|' + obs['context']
    return ad.AnnData(X.astype('float32'), obs, pd.DataFrame(index=[f'G{i:02d}' for i in range(genes)]),
                      uns=dict(control_mean=controls, control_contexts=np.array([f'line{c}' for c in range(4)]), dataset_id='toy'))


def held(effects, smiles=('CCCO', 'CCCN', 'CCC#N')):
    new = effects.obs['smiles'].isin(smiles)
    return effects[~new].copy(), effects[new].copy()


def fit(train, make=Response, seed=0, **more):
    given = {k: more.pop(k) for k in ('val', 'checkpoint') if k in more}
    return make(**FAST | more).fit(train, rng=generator(seed, 'fit'), **given)


def error(model, test): return float(np.linalg.norm(model.predict(test.obs) - test.X, axis=1).mean())


@pytest.fixture(scope='module')
def parts(): return held(screen())


@pytest.fixture(scope='module')
def model(parts): return fit(parts[0])


def test_structure_dose_and_line_are_learned(parts):
    train, test = parts
    start, learned = FingerprintLine().fit(train), fit(train, epochs=20, lr=5e-3)
    assert error(start, test) < .8 * error(LineDrug().fit(train), test)
    assert error(learned, test) < error(start, test)
    size = pd.Series(np.linalg.norm(learned.predict(test.obs), axis=1))
    assert size.groupby(test.obs['dose'].to_numpy()).mean().is_monotonic_increasing
    assert size.groupby(test.obs['context'].to_numpy()).mean().is_monotonic_decreasing


def test_untrained_it_is_the_start(parts):
    train, test = parts
    for start, make in (('kernel', FingerprintLine), ('line_drug', LineDrug)):
        assert_allclose(fit(train, epochs=1, lr=0., start=start).predict(test.obs), make().fit(train).predict(test.obs), atol=1e-5)


@pytest.mark.parametrize('kind', ['perturbation', 'context', 'pairs'])
@pytest.mark.parametrize('make', [Response, FingerprintLine])
def test_the_treated_cell_is_no_input(kind, make):
    "All values and layers of the test rows changed: not a digit of the predictions does."
    found = []
    for change in (lambda X: X, lambda X: 50 - 9 * X):
        effects = screen()
        effects.layers['mean'] = effects.X + 2
        split = make_split(effects, kind, n_genes=20)
        rows = effects.obs_names.get_indexer(split.ids['test'])
        for array in (effects.X, effects.layers['mean']): array[rows] = change(array[rows])
        made = make(**FAST) if make is Response else make()
        test = split.test(effects)
        found.append(made.fit(split.train(effects), val=split.val(effects), rng=generator(0, 'fit')).predict(test.obs))
    assert (found[0] == found[1]).all() and found[0].any()


def test_predict_takes_nothing_but_conditions_and_untreated_profiles(parts, model):
    _, test = parts
    assert (model.predict(test.obs) == model.predict(test.obs[['perturbation', 'perturbation_type', 'context', 'dose', 'time_h', 'smiles']])).all()


def test_start_of_training_rows_is_left_out(parts):
    "What the network sees for a training row does not depend on the effects of that row's drug."
    train, _ = parts
    changed = train.copy()
    mine = (train.obs['smiles'] == 'CCO').to_numpy()
    changed.X[mine] += generator(0, 'noise').normal(size=(mine.sum(), train.n_vars)).astype('float32')
    one, other = (FingerprintLine().fit(t) for t in (train, changed))
    if one.hyperparameters['penalty'] == other.hyperparameters['penalty']:
        shift = one.average - other.average  # the mean of all is the only thing that is not left out
        moved = abs(one.left_out()[mine] - other.left_out()[mine]).max()
        assert moved <= 2 * abs(shift).max() + 1e-8 and moved < .2 * abs(one.left_out()[mine] - train.X[mine]).max()
    else: pytest.fail('the penalty changed: choose smaller noise')


def test_left_out_predictions_are_those_of_a_refit(parts):
    train, _ = parts
    model = FingerprintLine().fit(train)
    mine = (train.obs['smiles'] == 'CCO').to_numpy()
    K = lambda a, b: model.similar(train.obs[a], train.obs[b])
    refit = model.average + K(mine, ~mine) @ np.linalg.solve(K(~mine, ~mine) + model.hyperparameters['penalty'] * np.eye((~mine).sum()), train.X[~mine] - model.average)
    assert_allclose(model.left_out()[mine], refit, atol=1e-4)


def test_same_seed_same_numbers_other_seed_others(parts):
    train, test = parts
    one, again, other = (fit(train, seed=s).predict(test.obs) for s in (0, 0, 1))
    assert (one == again).all() and (one != other).any()


def test_order_and_company_of_questions_do_not_matter(parts, model):
    _, test = parts
    whole = model.predict(test.obs)
    assert_allclose(model.predict(test.obs.iloc[::-1]), whole[::-1], atol=1e-6)
    assert_allclose(model.predict(test.obs[5:6]), whole[5:6], atol=1e-6)
    assert model.predict(test.obs[:0]).shape == (0, test.n_vars)


def test_gradients_reach_every_parameter():
    rng = generator(0, 'gradient')
    net = ResponseNet(torch.tensor(rng.normal(size=(9, 3))), torch.zeros(9).double(), cell=2, bits=5, tokens=4, d=8, heads=2, dropout=0.).double()
    t = lambda *shape: torch.tensor(rng.normal(size=shape))
    order = torch.tensor(np.array([rng.permutation(9)[:4] for _ in range(2)]))
    listed = torch.tensor(rng.integers(9, size=(2, 6, 4)))
    optimizer = torch.optim.SGD(net.parameters(), lr=.1)
    for _ in range(3):  # last layers start at zero: what is before them moves from the second step on
        optimizer.zero_grad()
        net(t(2, 6, 9), torch.ones(2, 6).double(), t(2, 6).abs(), order, t(2, 4, 2), t(2, 2), t(2, 6, 5), t(2, 6), t(2, 6, 3), listed, t(2, 6, 4), t(2, 6, 4), torch.tensor([.1]))['loss'].backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_line_that_was_not_in_the_screen_brings_its_profile(parts, model):
    train, test = parts
    asked = test.obs[:4].assign(context='line9')
    for m in (model, FingerprintLine().fit(train)):
        with pytest.raises(Problem, match='line line9 has no untreated profile; give it as'): m.predict(asked)
        profile = untreated(train).loc[['line2']].set_axis(['line9'])
        assert_allclose(m.predict(asked, controls=profile), m.predict(asked.assign(context='line2')), atol=1e-6)
        assert_allclose(m.predict(asked, controls=profile.iloc[:, ::-1]), m.predict(asked, controls=profile), atol=1e-9)  # genes by name
        with pytest.raises(Problem, match='1 of 30 training genes are missing .G00.'): m.predict(asked, controls=profile.iloc[:, 1:])
        with pytest.raises(Problem, match='hold NaN'): m.predict(asked, controls=profile * np.nan)
        with pytest.raises(Problem, match='line9'): m.predict(asked)  # what was brought is forgotten
    assert model.var(asked, controls=profile).shape == (4, 30)
    assert 'no untreated profile of line9' in Response().applies(train, asked)


def test_without_untreated_profiles_lines_are_names(parts):
    train, test = (p.copy() for p in parts)
    for p in (train, test): del p.uns['control_mean']
    for make in (Response, FingerprintLine): assert np.isfinite((fit(train) if make is Response else make().fit(train)).predict(test.obs.assign(context='new'))).all()
    with pytest.raises(Problem, match='learnt without untreated profiles'): fit(train).predict(test.obs, controls=pd.DataFrame())


@pytest.mark.parametrize('dose', [0., -1., np.inf])
def test_doses_that_are_none_are_refused(parts, model, dose):
    train, test = parts
    wrong = test.obs.assign(dose=dose)
    for ask in (lambda: model.predict(wrong), lambda: log10_given(wrong), lambda: fit(ad.AnnData(test.X, wrong, test.var, uns=test.uns))):
        with pytest.raises(Problem, match='expected µM above 0'): ask()


def test_an_unknown_dose_and_a_screen_without_doses_are_answered(parts, model):
    train, test = parts
    assert np.isfinite(model.predict(test.obs.assign(dose=np.nan))).all()
    plain = train.copy()
    plain.obs['dose'] = np.nan
    assert np.isfinite(fit(plain).predict(test.obs.assign(dose=np.nan))).all()


def test_structures_that_cannot_be_read_are_named_and_kept(parts):
    train, test = (p.copy() for p in parts)
    train.obs['smiles'] = train.obs['smiles'].astype(object)
    train.obs.loc[train.obs['smiles'] == 'CCO', 'smiles'] = 'C1('
    model = fit(train)
    assert without_structure(train.obs) == ['drug CCO'] == model.hyperparameters['without_structure']
    assert np.isfinite(model.predict(train.obs)).all() and np.isfinite(model.predict(test.obs.assign(smiles=None))).all()
    train.obs['smiles'] = '?'
    assert Response().applies(train, test.obs) == 'no drug of training has a structure that can be read'


def test_screens_of_genes_are_left_out_in_one_line(parts):
    train, test = (p.copy() for p in parts)
    for make in (DrugMean, LineDrug, FingerprintLine, Response, ResponsePlain):
        assert make().applies(train, test.obs.assign(perturbation_type='CRISPRi')) == 'not a screen of drugs'
        assert MODELS[make.name] is make
    assert 'would equal the mean' in DrugMean().applies(train, test.obs)


def test_what_is_left_out_follows_what_is_asked():
    effects = screen()
    for column, held_out in (('perturbation', 'drug CCO'), ('context', 'line0')):
        new = (effects.obs[column] == held_out).to_numpy()
        assert len(set(left_together(effects.obs[~new], effects[new]))) == effects.obs[column].nunique() - 1
    assert len(set(left_together(effects.obs))) == 16
    split = make_split(effects, 'pairs')
    train = split.train(effects).obs
    assert len(set(left_together(train, split.val(effects)))) == len(train[['perturbation', 'context']].drop_duplicates())


def test_every_ablation_takes_its_part_away(parts, model):
    train, test = parts
    asked = test.obs[:6]
    other = untreated(train).loc[['line2']].set_axis(['line9'])
    other.iloc[0] = generator(0, 'other').permutation(other.iloc[0])
    lines = lambda m: m.predict(asked.assign(context='line9'), controls=untreated(train).loc[['line0']].set_axis(['line9'])) - m.predict(asked.assign(context='line9'), controls=other)
    drugs = lambda m: m.predict(asked) - m.predict(asked.assign(smiles='c1ccncc1', perturbation='drug never seen'))
    plain = fit(train, ResponsePlain)
    assert lines(plain).any() and drugs(plain).any()
    assert not lines(fit(train, ResponsePlain, cell=False, basal=False)).any()
    assert not drugs(fit(train, ResponsePlain, structure=False)).any()
    for more in (dict(cell=False), dict(basal=False), dict(values=False)): assert lines(fit(train, ResponsePlain, **more)).any()
    order = untreated(train).loc[['line0']].set_axis(['line9'])
    ranks = fit(train, ResponsePlain, values=False, cell=False)
    one, other = (ranks.predict(asked.assign(context='line9'), controls=f(order)) for f in (lambda c: c, lambda c: 3 * c + 1))
    assert_allclose(one, other, atol=1e-6)  # ranks alone


def test_ranking_loss_sees_order_not_length_or_sign():
    y = torch.tensor([[4., -3., 1., .5, 0.]])
    assert float(rank_loss(y, y)) == pytest.approx(0, abs=1e-6) == float(rank_loss(-3 * y, y)) or abs(float(rank_loss(-3 * y, y))) < 1e-4
    assert rank_loss(y[:, [1, 0, 2, 3, 4]], y) < rank_loss(y.flip(-1), y)
    guess = torch.randn(1, 5, requires_grad=True)
    rank_loss(guess, y).sum().backward()
    assert guess.grad.abs().sum() > 0 and torch.isfinite(rank_loss(torch.zeros(1, 5), y)).all()


def test_ranking_comes_gradually_in_the_second_stage(parts):
    weights = lambda **more: [float(fit_once.batches(e, generator(0, 'b'))[0][-1]) for e in range(4)] if (fit_once := fit(parts[0], epochs=4, rank=.1, **more)) else None
    assert_allclose(weights(), [0, 0, .05, .1])
    assert_allclose(weights(abrupt=True), [0, 0, .1, .1])


def test_variance_is_stated_and_of_the_right_size(parts):
    train, test = parts
    model = fit(train, epochs=10)
    ratio = ((model.predict(test.obs) - test.X)**2).mean() / model.var(test.obs).mean()
    assert model.var(test.obs).shape == test.shape and (model.var(test.obs) > 0).all() and .2 < ratio < 2


def test_a_finished_checkpoint_gives_the_same_model_and_notices_other_profiles(parts, tmp_path):
    train, test = parts
    one, again = (fit(train, checkpoint=tmp_path/'c.pt').predict(test.obs) for _ in range(2))
    assert (one == again).all()
    other = train.copy()
    other.uns['control_mean'] = other.uns['control_mean'] + generator(0, 'o').normal(size=(4, 30))
    assert (fit(other, checkpoint=tmp_path/'c.pt').predict(test.obs) == fit(other).predict(test.obs)).all()


def test_settings_that_cannot_be_are_refused(parts):
    with pytest.raises(Problem, match='expected a multiple'): fit(parts[0], d=15)
    with pytest.raises(Problem, match="start='nearest'; expected one of 'kernel'"): fit(parts[0], start='nearest')


def test_strengths_meet_the_e_distances_of_the_same_treatment(tmp_path):
    table = pd.DataFrame({'cell_line': ['A549', 'HT-29'], "[('Ethanol', 0.05, 'uM')]": [.1, .3], "[('Ethanol', 5.0, 'uM')]": [.7, np.nan]})
    table.to_csv(tmp_path/'d.tsv', sep='\t', index=False)
    asked = pd.DataFrame(dict(perturbation='ethanol', context=['a549', 'A549', 'HT-29', 'HT-29', 'K562'], dose=[.05, 5., .05, 5., 5.]))
    found = beside_distances(asked, [1., 2., 3., 4., 5.], edistances(tmp_path/'d.tsv'))
    assert found[['strength', 'distance']].to_numpy().tolist() == [[1, .1], [2, .7], [3, .3]]
    assert not len(beside_distances(asked.assign(perturbation='water'), np.ones(5), edistances(tmp_path/'d.tsv')))
