"Flow matching: what it must learn, what it must not see, and what must not matter."
from itertools import combinations
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED, needs_shared
from numpy.testing import assert_allclose
from scipy import sparse

from perturb_research.core import Problem, generator
from perturb_research.models.transport import FlowMatching, FlowMatchingPermuted, Guess, Velocity, members, nothing_to_guess, paired, relative, space, sums

FAST = dict(epochs=25, hidden=32, components=12, dropout=0., lr=3e-3)


def screen(rule=lambda a, b: .7 * (a + b) + 2 * np.eye(20)[0], contexts='x', genes=20, n=40, seed=0, parts='ABCDEFGH', doubles=True):
    "Cells and effects of a screen of all singles and pairs of `parts` in each of `contexts`, with a batch effect that is no effect of any perturbation."
    rng = generator(seed, 'cells')
    single = {p: 2 * rng.normal(size=genes) for p in parts}
    means = {'control': np.zeros(genes)} | single | ({f'{a}+{b}': rule(single[a], single[b]) for a, b in combinations(parts, 2)} if doubles else {})
    rows = [(name, context, str(i % 2)) for context in contexts for name in means for i in range(n * (3 if name == 'control' else 1))]
    label, context, batch = map(list, zip(*rows))
    X = 5 + np.array([means[name] for name in label]) + (np.array(batch) == '1')[:, None] * 3. + .5 * rng.normal(size=(len(rows), genes))
    X += 4 * (np.array([contexts.index(c) for c in context]))[:, None] * np.eye(genes)[-1]
    obs = pd.DataFrame(dict(perturbation=label, perturbation_type='CRISPRa', context=context, dose=np.nan, time_h=np.nan, batch=batch))
    obs['is_control'] = obs['perturbation'] == 'control'
    obs['condition'] = np.where(obs['is_control'], '', obs['perturbation'] + '|CRISPRa|||' + obs['context'])
    cells = ad.AnnData(sparse.csr_matrix(X.astype('float32')), obs.set_index(np.arange(len(obs)).astype(str)), pd.DataFrame(index=[f'G{i}' for i in range(genes)]))
    D, each = relative(cells) @ np.eye(genes), obs[~obs['is_control']].groupby('condition', sort=False)
    return cells, ad.AnnData(np.array([D[r.index].mean(0) for _, r in each], dtype='float32'), each.first().drop(columns=['batch', 'is_control']), cells.var)


def halved(cells, effects, held):
    "Training effects and cells, and the effects that are `held` (ids)."
    out = effects.obs_names.isin(held)
    return effects[~out].copy(), cells[~cells.obs['condition'].isin(held)].copy(), effects[out].copy()


def fitted(train, cells, seed=0, **changes): return FlowMatching(**FAST | changes).fit(train, cells=cells, rng=generator(seed, 'flow'))


def error(guess, truth): return np.linalg.norm(guess - truth, axis=1).mean()


@pytest.fixture(scope='module')
def planted():
    cells, effects = screen()
    return *halved(cells, effects, effects.obs_names[-8:]), effects


def test_a_planted_rule_is_learned(planted):
    train, cells, test, effects = planted
    additive = np.array([sum(train.X[train.obs['perturbation'] == p][0] for p in name.split('+')) for name in test.obs['perturbation']])
    model = fitted(train, cells)
    assert error(model.predict(test.obs), test.X) < .7 * error(additive, test.X)
    start = fitted(train, cells, epochs=1, lr=0.)  # before training: the additive profile in the space
    assert_allclose(start.predict(test.obs), additive @ start.V @ start.V.T, atol=1e-5)


def test_same_seed_same_numbers_other_seed_others(planted):
    train, cells, test, _ = planted
    one, again, other = (fitted(train, cells, s, epochs=3).predict(test.obs) for s in (0, 0, 1))
    assert (one == again).all() and (one != other).any()


def test_order_of_genes_and_of_rows_does_not_matter(planted):
    train, cells, test, _ = planted
    genes = generator(0, 'genes').permutation(train.n_vars)
    one, other = fitted(train, cells, epochs=4), fitted(train[:, genes].copy(), cells[:, genes].copy(), epochs=4)
    assert_allclose(other.predict(test.obs), one.predict(test.obs)[:, genes], atol=1e-5)
    backwards = test.obs.iloc[::-1]
    assert_allclose(one.predict(backwards), one.predict(test.obs)[::-1], atol=1e-5)


def test_gradients_reach_every_parameter():
    net = Velocity(np.eye(6), 2, 16, 2, 0.).double()
    rng = generator(0, 'gradient')
    x0, x1, who, other = (torch.tensor(rng.normal(size=(9, k))) for k in (6, 6, 6, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=.1)
    for _ in range(2):  # the last layer starts at zero: what is before it moves from the second step on
        optimizer.zero_grad()
        net(x0, x1, torch.tensor(rng.random(9)), who, other).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_nothing_of_held_out_conditions_is_seen(planted):
    "Cells of conditions that are not in training may lie around: they change nothing; nor do validation effects when nobody stops early."
    train, cells, test, effects = planted
    everything, _ = screen()
    assert everything.n_obs > cells.n_obs
    one, other = fitted(train, cells, epochs=2), fitted(train, everything, epochs=2)
    assert_allclose(other.predict(test.obs), one.predict(test.obs), atol=1e-6)
    changed = test.copy()
    changed.X = changed.X + 100
    models = [FlowMatching(**FAST | dict(epochs=2, patience=0)).fit(train, val=v, cells=cells, rng=generator(0, 'flow')) for v in (test, changed)]
    assert (models[0].predict(test.obs) == models[1].predict(test.obs)).all()


def test_a_finished_checkpoint_gives_the_same_model(planted, tmp_path):
    train, cells, test, _ = planted
    one, again = (FlowMatching(**FAST | dict(epochs=3)).fit(train, cells=cells, rng=generator(0, 'flow'), checkpoint=tmp_path/'c.pt') for _ in range(2))
    assert (one.predict(test.obs) == again.predict(test.obs)).all()
    assert set(torch.load(tmp_path/'c.pt', weights_only=True)['network']) == set(one.network.state_dict())


def test_a_gene_never_seen_is_the_mean_and_itself():
    "Every perturbation does the same, and raises its own gene: so is the new one, without priors."
    parts = [f'G{i}' for i in range(8)]
    cells, effects = screen(parts=parts, doubles=False)
    effects.X = np.ones_like(effects.X) + 3 * np.eye(20)[:8].astype('float32')
    train, known, test = halved(cells, effects, effects.obs_names[-1:])
    model = fitted(train, known, epochs=1, lr=0.)
    predicted = model.predict(test.obs)[0]
    assert predicted[7] == pytest.approx(4, abs=.5) and predicted[10] == pytest.approx(1, abs=.1)


def test_priors_help_where_they_are_right_and_not_when_permuted():
    rng = generator(0, 'priors')
    genes, parts = [f'G{i}' for i in range(60)], [('CRISPRa', f'G{i}') for i in range(30)]
    A = sparse.csr_array((rng.random((60, 60)) < .1).astype(float))
    known = SimpleNamespace(genes=pd.Index(genes), graphs={'net': A}, similarity=lambda names: {'net': np.eye(len(names))})
    order = np.r_[rng.permutation(30), 30 + rng.permutation(30)]
    wrong = SimpleNamespace(genes=pd.Index(genes), graphs={'net': A[order][:, order]}, similarity=known.similarity)
    effects = A.toarray()[:30] + .3 * rng.normal(size=(30, 60))
    right, lost, without = (error(Guess(parts[:24], effects[:24], genes, p)(parts[24:]), effects[24:]) for p in (known, wrong, None))
    assert right < .8 * without and lost > .95 * without


def test_permuted_row_is_left_out_where_priors_cannot_matter(planted):
    train, _, test, _ = planted
    assert 'priors would change nothing' in FlowMatchingPermuted().applies(train, test.obs)
    assert nothing_to_guess(train.obs, test.obs.assign(perturbation='new')) == ''


def test_activation_and_repression_of_a_gene_are_two_perturbations():
    obs = pd.DataFrame(dict(perturbation=['A', 'A+B'], perturbation_type=['CRISPRa', 'CRISPRi']))
    assert members(obs, [('CRISPRa', 'A'), ('CRISPRi', 'A'), ('CRISPRi', 'B')]).tolist() == [[1, 0, 0], [0, 1, 1]]
    e, beside = sums(obs, [('CRISPRa', 'A')], np.ones((1, 2)), None, np.eye(3)[:, :2], 1.)
    assert e.tolist() == [[1, 1], [0, 0]] and not beside.any()


def test_space_holds_effects_then_cells(planted):
    train, cells, _, _ = planted
    few = train[:3]
    V = space(np.asarray(few.X, dtype=float), relative(cells), 6)
    assert_allclose(V.T @ V, np.eye(6), atol=1e-8)
    assert_allclose(few.X @ V @ V.T, few.X, atol=1e-4)
    rest = (relative(cells) @ np.eye(20)) @ (np.eye(20) - V[:, :3] @ V[:, :3].T)
    top = np.linalg.svd(rest, full_matrices=False)[2][:3]
    assert_allclose(abs(top @ V[:, 3:]), np.eye(3), atol=1e-6)
    assert space(few.X, relative(cells), 0).shape == (20, 20)


def test_batches_and_pairs(planted):
    "Every condition is met once an epoch, with its own cells; batch effects are no effects."
    train, cells, _, _ = planted
    model = fitted(train, cells, epochs=1)
    seen = torch.cat([who for _, _, _, who, _ in model.batches(0, generator(0, 'batches'))])
    assert len(seen) == train.n_obs * model.o.pairs
    assert_allclose(seen.sum(0), members(train.obs, model.parts).sum(0) * model.o.pairs)
    batch, control = cells.obs['batch'].to_numpy(), cells.obs['is_control'].to_numpy()
    assert abs(model.Z[control & (batch == '0')].mean(0) - model.Z[control & (batch == '1')].mean(0)).max() < 1e-3
    x = generator(0, 'pairs').normal(size=(20, 3))
    assert (paired(x, x[::-1] + 5) == np.arange(20)[::-1]).all()


def test_cells_are_carried_from_controls_of_their_own_context():
    cells, effects = screen(contexts='xy')
    train, known, test = halved(cells, effects, effects.obs_names[-3:])
    model = fitted(train, known, epochs=3)
    for name, (moved, rows), effect in zip(test.obs_names, model.predict_cells(test.obs, 32), model.predict(test.obs)):
        assert moved.shape == (32, 20) and moved.dtype == np.float32
        assert set(known.obs['context'].iloc[rows]) == {name[-1]} and known.obs['is_control'].iloc[rows].all()
        assert_allclose((moved - known.X[rows].toarray()).mean(0), effect, atol=1e-4)  # as many cells as effects are made of
    unknown = test.obs.assign(context='never seen')
    assert np.isfinite(model.predict(unknown)).all()


def test_bad_settings_are_refused_in_one_line():
    with pytest.raises(Problem, match="flow_matching: setting 'component'.*did you mean 'components'"): FlowMatching(component=3)


@needs_shared
def test_kang_stimulated_cells_of_a_type_never_seen_stimulated():
    "The home task of CellOT and scGen: one stimulus, one cell type held out; nearer than the mean of the other types' effects is not promised, nearer than no change is."
    from perturb_research.data.splits import make_split
    cells, effects = kang()
    split = make_split(effects, 'leave_context_out', 0)
    train, test = split.train(effects), split.test(effects)
    model = FlowMatching(epochs=5, components=20, hidden=32).fit(train, cells=split.train_cells(cells, effects), rng=generator(0, 'kang'))
    assert error(model.predict(test.obs), test.X) < .8 * np.linalg.norm(test.X, axis=1).mean()


def kang():
    "Cells and effects of Kang's screen as notebook 04 makes them."
    from perturb_research.data.labels import describe
    from perturb_research.data.preprocess import measure
    from perturb_research.data.read import read_screen
    screen = read_screen(SHARED/'kang'/'kang_pbmc_ifnb.h5ad')
    effects, cells, _ = measure(screen, describe(screen)[0])
    effects.uns['dataset_id'] = 'kang'
    return cells, effects
