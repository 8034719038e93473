"The scGPT-style models: equations, checkpoints of the published form, and what they learn on tiny planted screens."
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from perturb_research.core import Problem, generator
from perturb_research.models.baselines import Additive
from perturb_research.models.scgpt import (SPECIAL, CellModel, Effects, LowRankLinear, ScGPT, ScGPTPlain, ScGPTRidge, binned, read_official, shape_of, take,
                                           vocabulary)

MODELS = ScGPT, ScGPTPlain, ScGPTRidge
SMALL = dict(d_model=16, d_hid=16, heads=2, context=8, sample=16, rows=8, pretrain=1, steps=3, epochs=2)


def screen(genes=24, perturbed=7, cells=12, extra=None, seed=0):
    "A planted screen: doubles do 0.7 of the sum, and two genes that both parts move are pushed further together; effects and cells."
    rng = generator(seed, 'planted')
    names, targets = [f'G{i:02}' for i in range(genes)], [f'G{i:02}' for i in range(perturbed)]
    single = pd.DataFrame(rng.normal(0, 1, (perturbed, genes)) * (rng.random((perturbed, genes)) < .4), targets, names)
    pairs = [(a, b) for i, a in enumerate(targets) for b in targets[i + 1:]]
    mean = rng.uniform(2, 3, genes)
    double = pd.DataFrame([.7 * (single.loc[a] + single.loc[b]) for a, b in pairs], [f'{a}+{b}' for a, b in pairs])
    Y = pd.concat([single, double])
    if extra is not None: Y = extra(Y)
    obs = pd.DataFrame(dict(perturbation=Y.index, perturbation_type='CRISPRa', context='x', dose=np.nan, time_h=np.nan, n_cells=float(cells)), Y.index)
    effects = ad.AnnData(Y.to_numpy('float32'), obs, pd.DataFrame(index=names))
    profiles = np.vstack([np.repeat(mean[None], 40, 0), np.repeat(mean + Y.to_numpy(), cells, 0)])
    condition = np.r_[np.repeat('', 40), np.repeat(Y.index, cells)]
    table = pd.DataFrame(dict(condition=condition, context='x', is_control=condition == ''), [f'c{i}' for i in range(len(condition))])
    return effects, ad.AnnData(np.maximum(profiles + .1 * rng.normal(size=profiles.shape), 0).astype('float32'), table, effects.var)


def halves(effects, cells, seed=0):
    "Training and held-out rows of `effects` (all singles and half of the doubles; the other half), and the cells of training."
    double = effects.obs['perturbation'].str.contains('+', regex=False).to_numpy()
    out = generator(seed, 'halves').permutation(np.flatnonzero(double))[::2]
    train = effects[np.setdiff1d(np.arange(effects.n_obs), out)].copy()
    return train, effects[np.sort(out)].copy(), cells[cells.obs['is_control'] | cells.obs['condition'].isin(train.obs_names)].copy()


def fitted(make, train, cells, seed=0, **more): return make(**SMALL | more).fit(train, cells=cells, rng=generator(seed, make.name))
def l2(model, test): return np.linalg.norm(model.predict(test.obs) - test.X, axis=1).mean()


EFFECTS, CELLS = screen()
TRAIN, TEST, TRAIN_CELLS = halves(EFFECTS, CELLS)


def test_bins_are_ranks_among_the_values_that_are_not_zero():
    values = np.array([[0., 3., 1., 2., 0.], [0., .3, .1, .2, 0.]])
    assert (binned(values, 4) == [[0, 3, 1, 2, 0]] * 2).all()
    assert binned(generator(0, 'b').random((3, 200)), 51).max() == 50


@pytest.mark.parametrize('readout', ['cell', 'gene', 'both'])
def test_a_flag_is_never_lost(readout):
    "Perturbed genes are always among the tokens, read or not, whatever sample of genes is drawn; without a flag nothing changes."
    model = fitted(ScGPT, TRAIN, TRAIN_CELLS, readout=readout, read=4, context=3)
    for batch in model.batches(0, generator(0, 'x')):
        parts, flags, own, where, profile, weight, truth, context, controls, genes, asked = batch
        assert ((parts >= len(SPECIAL)) == (flags > 0)).all() and (flags > 0).any(1).all()
        names = {t: n for n, t in model.tokens.items()}
        assert {names[int(t)] for t in parts[flags > 0]} <= {names[int(t)] for t in genes[0]}  # all targets are read
    one = model.predict(TEST.obs)
    model.o.read = 7
    assert np.allclose(model.predict(TEST.obs), one, atol=1e-6)  # chunks of another size say the same
    assert np.allclose(model.predict(TEST.obs.iloc[::-1]), one[::-1], atol=1e-6)


def test_predictions_differ_between_perturbations():
    "Issues 277 and 298 of the published code: a network that does not see what was done predicts the same for all."
    predicted = fitted(ScGPTPlain, TRAIN, TRAIN_CELLS, epochs=25, steps=10).predict(TRAIN.obs[:7])
    assert np.corrcoef(predicted)[np.triu_indices(7, 1)].mean() < .6


@pytest.mark.parametrize('more', [dict(readout='both'), dict(readout='both', rank=2), dict(readout='both', embed='category', bins=5)])
def test_gradient_reaches_every_parameter(more):
    "In pretraining or in fine-tuning; with low-rank corrections, matrices that these correct are thawed in pretraining alone."
    torch.manual_seed(0)
    model = fitted(ScGPT, TRAIN, TRAIN_CELLS, **more)
    net, reached = model.network, set()
    for p in net.parameters(): p.data += .01 * torch.randn_like(p)  # off the zeros at which some start
    net.train(), net.double()
    for loss in (lambda: model.masking(net).double()(*next(iter(model.cell_batches(0, generator(0, 'a')))))['loss'], lambda: net(*next(iter(model.batches(0, generator(0, 'b')))))):
        net.zero_grad(), net.requires_grad_(True)
        loss().backward()
        reached |= {k for k, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {k for k, _ in net.named_parameters()}


@pytest.mark.parametrize('make', MODELS)
def test_order_of_genes_changes_nothing(make):
    order = generator(1, 'order').permutation(TRAIN.n_vars)
    one, other = fitted(make, TRAIN, TRAIN_CELLS), fitted(make, TRAIN[:, order].copy(), TRAIN_CELLS[:, order].copy())
    assert np.allclose(one.predict(TEST.obs)[:, order], other.predict(TEST.obs), atol=1e-5)


@pytest.mark.parametrize('make', MODELS)
def test_same_seed_same_numbers_and_no_leak(make):
    "Two runs agree; validation and test rows that say something else change nothing of what is learnt without early stopping."
    val, wrong = TEST[:3].copy(), TEST[:3].copy()
    wrong.X = wrong.X + 100
    fits = [make(**SMALL).fit(TRAIN, val=v, cells=TRAIN_CELLS, rng=generator(0, 'same')) for v in (val, val, wrong)]
    one, two, three = (m.predict(TEST.obs) for m in fits)
    assert (one == two).all() and (one == three).all()
    assert not np.array_equal(make(**SMALL).fit(TRAIN, cells=TRAIN_CELLS, rng=generator(1, 'same')).predict(TEST.obs), one)


def test_planted_rule_is_learnt():
    "Doubles that do 0.7 of the sum, three genes apart that only react to pairs: both are learnt, from the additive start."
    def extra(Y):
        double = Y.index.str.contains('+', regex=False)
        Y.loc[double, ['G20', 'G21', 'G22']] += [2., -2., 1.5]
        return Y
    effects, cells = screen(extra=extra)
    train, test, train_cells = halves(effects, cells)
    model, additive = fitted(ScGPT, train, train_cells, epochs=15, steps=10, lr=1e-2, dropout=0.), Additive().fit(train)
    assert l2(model, test) < .45 * l2(additive, test)


def test_starts_as_the_additive_model():
    model = ScGPT(**SMALL | dict(lr=0., pretrain_lr=0.)).fit(TRAIN, cells=TRAIN_CELLS, rng=generator(0, 'start'))
    with torch.no_grad(): model.network.scale.zero_()
    assert np.allclose(model.predict(TEST.obs), Additive().fit(TRAIN).predict(TEST.obs), atol=1e-5)


def test_unseen_gene_has_the_mean_single_effect_for_a_start_and_one_without_token_is_answered():
    asked = pd.concat([TEST.obs.iloc[[0]].assign(perturbation='G20'), TEST.obs.iloc[[0]].assign(perturbation='G00+NOVEL')])
    model = fitted(ScGPT, TRAIN, TRAIN_CELLS)
    table = model.ask(asked)
    assert table.flags.tolist() == [[2, 0], [1, 2]] and table.tokens[1, 1] == 0 and table.tokens[0, 0] > 2
    singles = TRAIN.X[~TRAIN.obs['perturbation'].str.contains('+', regex=False)].mean(0)
    assert np.allclose(table.profile(model.Y, np.arange(2))[0], singles[model.sorted], atol=1e-5)
    for make in MODELS: assert np.isfinite(fitted(make, TRAIN, TRAIN_CELLS).predict(asked)).all()


def test_a_single_of_two_contexts_is_predicted_from_the_other():
    both = ad.concat([TRAIN, TRAIN], index_unique='-')
    both.obs['context'], both.X[TRAIN.n_obs:] = np.repeat(['x', 'y'], TRAIN.n_obs), both.X[TRAIN.n_obs:] + 1
    cells = ad.concat([TRAIN_CELLS, TRAIN_CELLS], index_unique='-')
    cells.obs['context'] = np.repeat(['x', 'y'], TRAIN_CELLS.n_obs)
    model = fitted(ScGPT, both, cells)
    assert np.allclose(model.asked.profile(model.Y, np.array([0]))[0], model.Y[TRAIN.n_obs], atol=1e-5)
    assert np.isfinite(model.predict(both.obs.iloc[[0]].assign(context='new'))).all()


@pytest.mark.parametrize('make', [ScGPT, ScGPTRidge])
def test_checkpoint_round_trip(make, tmp_path):
    one = make(**SMALL).fit(TRAIN, cells=TRAIN_CELLS, rng=generator(0, 'ck'), checkpoint=tmp_path/'m.pt')
    two = make(**SMALL).fit(TRAIN, cells=TRAIN_CELLS, rng=generator(0, 'ck'), checkpoint=tmp_path/'m.pt')
    assert np.allclose(one.predict(TEST.obs), two.predict(TEST.obs), atol=1e-12)


@pytest.mark.parametrize('killed', ['cell_batches', 'batches'])
def test_resumed_is_uninterrupted(killed, tmp_path, monkeypatch):
    "Killed in pretraining or in fine-tuning, then run again: the same numbers, and no checkpoint of pretraining is left."
    more = SMALL | dict(pretrain=3, epochs=3, save_every=0.)
    whole = ScGPT(**more).fit(TRAIN, cells=TRAIN_CELLS, rng=generator(0, 'r')).predict(TEST.obs)
    rest = getattr(ScGPT, killed)
    def dies(self, epoch, rng):
        if epoch == 2: raise KeyboardInterrupt
        return rest(self, epoch, rng)
    monkeypatch.setattr(ScGPT, killed, dies)
    with pytest.raises(KeyboardInterrupt): ScGPT(**more).fit(TRAIN, cells=TRAIN_CELLS, rng=generator(0, 'r'), checkpoint=tmp_path/'m.pt')
    monkeypatch.undo()
    assert list(tmp_path.iterdir())
    again = ScGPT(**more).fit(TRAIN, cells=TRAIN_CELLS, rng=generator(0, 'r'), checkpoint=tmp_path/'m.pt').predict(TEST.obs)
    assert np.array_equal(again, whole) and not list(tmp_path.glob('*pretraining*'))


def test_frozen_backbone_low_rank_and_top_genes():
    "Frozen epochs leave the backbone as pretrained; with `rank` it stays so, and the corrections learn; `top` genes alone count."
    model = fitted(ScGPT, TRAIN, TRAIN_CELLS, frozen=9, top=3)
    model.before_epoch(0)
    assert {k.split('.')[0] for k, p in model.network.named_parameters() if p.requires_grad} == {*ScGPT.heads}
    weight = next(iter(model.batches(0, generator(0, 't'))))[5]
    assert ((weight > 0).sum(1) == 3).all()
    for rank, changed in ((0, True), (2, False)):
        model = fitted(ScGPT, TRAIN, TRAIN_CELLS, frozen=0, rank=rank, steps=5)
        first = fitted(ScGPT, TRAIN, TRAIN_CELLS, frozen=0, rank=rank, steps=5, lr=0.)
        name = 'transformer_encoder.layers.0.linear1.weight'
        assert (not torch.equal(model.network.state_dict()[name], first.network.state_dict()[name])) == changed
        if rank: assert any(p.abs().sum() > 0 for k, p in model.network.named_parameters() if k.endswith('lora_B'))
    layer = LowRankLinear(4, 3, rank=2)
    assert torch.equal(layer(torch.ones(1, 4)), torch.nn.functional.linear(torch.ones(1, 4), layer.weight, layer.bias))


PLAIN, FLASH = 'self_attn.in_proj_', 'self_attn.Wqkv.'


def published(folder, naming, d=16, layers=2, hid=32, genes=('G00', 'G03', 'G05', 'OTHER')):
    "Write a folder of the form of the published checkpoints, with tensors of that code's names and shapes; the parameters."
    rng, vocab = torch.Generator().manual_seed(0), {g: i for i, g in enumerate([*genes, '<pad>', '<cls>', '<eoc>'])}
    shapes = {'encoder.embedding.weight': (len(vocab), d), 'encoder.enc_norm.weight': (d,), 'encoder.enc_norm.bias': (d,), 'flag_encoder.weight': (2, d),
              'value_encoder.linear1.weight': (d, 1), 'value_encoder.linear1.bias': (d,), 'value_encoder.linear2.weight': (d, d), 'value_encoder.linear2.bias': (d,),
              'value_encoder.norm.weight': (d,), 'value_encoder.norm.bias': (d,), 'bn.weight': (d,), 'mvc_decoder.gene2query.weight': (d, d),
              'mvc_decoder.gene2query.bias': (d,), 'mvc_decoder.W.weight': (d, d), 'cls_decoder._decoder.0.weight': (d, d), 'cls_decoder.out_layer.weight': (1, d)}
    for i, out in ((0, d), (2, d), (4, 1)): shapes |= {f'decoder.fc.{i}.weight': (out, d), f'decoder.fc.{i}.bias': (out,)}
    for n in range(layers):
        at = f'transformer_encoder.layers.{n}.'
        shapes |= {f'{at}{naming}weight': (3 * d, d), f'{at}{naming}bias': (3 * d,), f'{at}self_attn.out_proj.weight': (d, d), f'{at}self_attn.out_proj.bias': (d,),
                   f'{at}linear1.weight': (hid, d), f'{at}linear1.bias': (hid,), f'{at}linear2.weight': (d, hid), f'{at}linear2.bias': (d,)}
        shapes |= {f'{at}norm{k}.{what}': (d,) for k in (1, 2) for what in ('weight', 'bias')}
    parameters = {k: torch.randn(s, generator=rng) for k, s in shapes.items()}
    folder.mkdir(exist_ok=True)
    torch.save(parameters, folder/'best_model.pt')
    (folder/'vocab.json').write_text(json.dumps(vocab))
    (folder/'args.json').write_text(json.dumps(dict(embsize=d, nheads=4, nlayers=layers, d_hid=hid, dropout=.2, n_bins=11, pad_token='<pad>', pad_value=-2, input_style='binned',
                                                    input_emb_style='continuous', n_layers_cls=3, fast_transformer=naming == FLASH)))
    return parameters, vocab


@pytest.mark.parametrize('naming', [PLAIN, FLASH])
def test_published_checkpoint(naming, tmp_path):
    theirs, vocab = published(tmp_path/'scGPT_small', naming)
    model = ScGPT(**SMALL | dict(folder=str(tmp_path/'scGPT_small'), pretrain=0, lr=0., epochs=1)).fit(TRAIN, cells=TRAIN_CELLS, rng=generator(0, 'p'))
    own, fate = model.network.state_dict(), model.taken.set_index('parameter')['fate']
    for n in range(2):
        assert torch.equal(own[f'transformer_encoder.layers.{n}.self_attn.in_proj.weight'].float(), theirs[f'transformer_encoder.layers.{n}.{naming}weight'])
        assert torch.equal(own[f'transformer_encoder.layers.{n}.linear2.weight'].float(), theirs[f'transformer_encoder.layers.{n}.linear2.weight'])
    assert torch.equal(own['decoder.fc.4.weight'].float(), theirs['decoder.fc.4.weight'])
    assert torch.equal(own['encoder.embedding.weight'][model.tokens['G03']].float(), theirs['encoder.embedding.weight'][vocab['G03']])
    assert torch.equal(own['encoder.embedding.weight'][model.tokens['<cls>']].float(), theirs['encoder.embedding.weight'][vocab['<cls>']])
    assert fate['encoder.embedding.weight'] == 'taken for 3 of 24 genes'
    assert set(fate.index[fate == 'left over']) == {'bn.weight', 'cls_decoder._decoder.0.weight', 'cls_decoder.out_layer.weight'}
    assert set(fate.index[fate == 'not in the checkpoint']) == {'pert_encoder.weight', 'gate.weight', 'scale'}
    assert (model.o.d_model, model.o.layers, model.o.heads, model.o.bins, model.hyperparameters['folder']) == (16, 2, 4, 11, 'scGPT_small')
    assert np.isfinite(model.predict(TEST.obs)).all()
    assert np.isfinite(fitted(ScGPTRidge, TRAIN, TRAIN_CELLS, folder=str(tmp_path/'scGPT_small'), pretrain=0).predict(TEST.obs)).all()


def test_the_two_namings_are_one_network(tmp_path):
    nets = []
    for naming in (PLAIN, FLASH):
        published(tmp_path/'same', naming)
        args, vocab, parameters = read_official(tmp_path/'same')
        nets.append(Effects(7, dropout=0., **shape_of(args)))
        take(nets[-1], vocabulary(['G00', 'G03', 'G05', 'OTHER']), vocab, parameters)
    genes, values = torch.tensor([[3, 4, 5]]), torch.tensor([[1., 2., 0.]])
    one, other = (net.encode(genes, values, 3).detach() for net in nets)
    assert torch.equal(one, other)


def test_the_published_size_fits():
    args = dict(embsize=512, nheads=8, nlayers=12, d_hid=512, n_bins=51, input_emb_style='continuous')
    with torch.device('meta'): net = Effects(60_697, dropout=.2, **shape_of(args))
    assert net.transformer_encoder.layers[11].self_attn.in_proj.weight.shape == (1536, 512) and net.encoder.embedding.weight.shape == (60_697, 512)


def test_bad_checkpoints_are_one_line(tmp_path):
    published(tmp_path/'ok', PLAIN)
    (tmp_path/'ok'/'args.json').write_text('{"embsize": 16}')
    with pytest.raises(Problem, match='args.json has no nheads, nlayers, d_hid'): read_official(tmp_path/'ok')
    with pytest.raises(Problem, match='no args.json'): read_official(tmp_path/'none')
    published(tmp_path/'ok', PLAIN)
    torch.save(pd.DataFrame, tmp_path/'ok'/'best_model.pt')  # a pickled object, which weights_only refuses
    with pytest.raises(Problem, match='best_model.pt cannot be read'): read_official(tmp_path/'ok')


def test_what_does_not_apply_says_so():
    twice = pd.concat([TEST.obs.assign(dose=1.), TEST.obs.assign(dose=2.)])
    assert 'neither dose nor time' in ScGPT().applies(TRAIN, twice)
    assert ScGPT().applies(TRAIN[TRAIN.obs['perturbation'].str.contains('+', regex=False)], TEST.obs) == 'no perturbation stands alone in training'
    assert all(make.needs == ('cells',) for make in MODELS)
    for bad, say in ((dict(d_model=30, heads=4), 'expected a multiple'), (dict(readout='x'), 'readout'), (dict(embed='category'), 'needs bins'), (dict(layer=2), 'layers')):
        with pytest.raises(Problem, match=say): ScGPT(**SMALL | bad).fit(TRAIN, cells=TRAIN_CELLS)
    with pytest.raises(Problem, match='no control cells'): ScGPT(**SMALL).fit(TRAIN, cells=TRAIN_CELLS[~TRAIN_CELLS.obs['is_control']].copy())


def test_edit_of_controls_follows_the_kind_of_perturbation():
    model = ScGPTRidge(**SMALL).fit(TRAIN, val=TEST, cells=TRAIN_CELLS, rng=generator(0, 'ridge'))  # while it reads cells there is nothing to validate yet
    with model.asking(): up, down = (model.embedding(TEST.obs.assign(perturbation_type=kind)) for kind in ('CRISPRa', 'CRISPRi'))
    assert up.shape == (TEST.n_obs, SMALL['d_model']) and not np.allclose(up, down)
    assert np.isfinite(model.hyperparameters['penalty']) and issubclass(ScGPTRidge, CellModel)
