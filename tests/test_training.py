"The training loop: what it computes, that it forgets nothing when cut, and that it leaves no trace."
import os
import subprocess
import sys
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from conftest import ROOT
from numpy.testing import assert_allclose
from torch import nn

from perturb_research.core import Problem, generator
from perturb_research.models.training import NeuralModel, Settings, computing, digest, read_checkpoint, share, source_of, train

X = torch.as_tensor(generator(0, 'x').normal(size=(24, 3)))
Y = torch.as_tensor(generator(0, 'y').normal(size=(24, 2))) + X[:, :2]
SHORT = Settings(epochs=6, lr=.02, save_every=0)


class Net(nn.Module):
    "Dropout and a running average, so that noise and buffers matter."
    def __init__(self, dropout=.3):
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 2)

    def f(self, x): return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))

    def forward(self, x, y):
        error = self.f(x) - y
        return {'loss': (error**2).mean(), 'mae': abs(error).mean()}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 2)

    def f(self, x): return self.last(x)
    def forward(self, x, y): return ((self.f(x) - y)**2).mean()


def network(kind=Net, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().double()


def batches(epoch, rng):
    for rows in np.split(rng.permutation(24), range(7, 24, 7)): yield X[rows], Y[rows] + .1 * torch.randn(len(rows), 2)  # torch's numbers count too


def trained(kind=Net, batches=batches, scored=True, **given):
    net = network(kind)
    score = (lambda: float(((net.f(X) - Y)**2).mean())) if scored else None
    return net, train(net, batches, **{'settings': SHORT, 'seed': 1, 'score': score} | given)


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def cut(after, at=1):
    "Batches that fail in the middle of epoch `after`."
    def failing(epoch, rng):
        for i, batch in enumerate(batches(epoch, rng)):
            if epoch == after and i == at: raise InterruptedError
            yield batch
    return failing


def test_steps_are_those_of_the_formulas():
    "AdamW, warm-up and cosine, and the shortened gradient, written out in numpy."
    net, s = network(Plain), Settings(epochs=4, lr=.05, weight_decay=.1, warmup=.3, clip=.7, patience=0)
    W, b = (p.detach().numpy().copy() for p in net.parameters())
    one = lambda epoch, rng: [(X[:10], Y[:10]), (X[10:], Y[10:])]
    m, v, losses = [0, 0], [0, 0], []
    for k in range(8):
        x, y = (part.numpy() for part in one(0, None)[k % 2])
        t = (k + .5) / 8
        rate = .05 * (t / .3 if t < .3 else (1 + np.cos(np.pi * (t - .3) / .7)) / 2)
        error = x @ W.T + b - y
        losses.append((error**2).mean())
        g = [2 * error.T @ x / error.size, 2 * error.sum(0) / error.size]
        length = np.sqrt(sum((part**2).sum() for part in g))
        for i, (w, part) in enumerate(zip((W, b), g)):
            part = part * min(1, .7 / length)
            m[i], v[i] = .9 * m[i] + .1 * part, .999 * v[i] + .001 * part**2
            w -= rate * (m[i] / (1 - .9**(k + 1)) / (np.sqrt(v[i] / (1 - .999**(k + 1))) + 1e-8) + .1 * w)
    history = train(net, one, settings=s)
    for p, w in zip(net.parameters(), (W, b)): assert_allclose(p.detach().numpy(), w, rtol=1e-5, atol=1e-6)  # the shortening adds 1e-6 to the length
    assert_allclose(history['value'], np.reshape(losses, (4, 2)).mean(1), rtol=1e-5)
    assert history.columns.tolist() == ['epoch', 'what', 'value'] and history['epoch'].tolist() == [1, 2, 3, 4] and set(history['what']) == {'train'}


def test_same_seed_same_numbers_whatever_came_before():
    a, history = trained()
    torch.manual_seed(99), torch.randn(5)
    b, again = trained()
    assert same(a, b) and history.equals(again) and set(history['what']) == {'train', 'mae', 'val'}
    assert not same(a, trained(seed=2)[0])


@pytest.mark.parametrize('fails', [False, True])
def test_everything_is_left_as_it_was_found(fails, capfd):
    net = network()
    net.first.weight.requires_grad_(False)
    first, random = net.first.weight.clone(), (torch.get_rng_state(), np.random.get_state()[1].copy())
    if fails:
        with pytest.raises(InterruptedError): train(net, cut(2), settings=SHORT)
    else: train(net, batches, settings=SHORT)
    assert torch.equal(torch.get_rng_state(), random[0]) and (np.random.get_state()[1] == random[1]).all()
    assert torch.get_default_dtype() == torch.float32 and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.equal(net.first.weight, first) and not net.first.weight.requires_grad and net.last.weight.requires_grad
    assert fails or (not net.training and all(p.grad is None for p in net.parameters()))
    assert not ''.join(capfd.readouterr())


@pytest.mark.parametrize('after, at', [(1, 0), (3, 2), (5, 3)])
def test_cut_and_resumed_equals_uninterrupted(tmp_path, capsys, after, at):
    whole, history = trained()
    with pytest.raises(InterruptedError): trained(batches=cut(after, at), checkpoint=tmp_path / 'c')
    resumed, again = trained(checkpoint=tmp_path / 'c')
    assert f"Net: goes on after epoch {after} of " in capsys.readouterr().out
    assert same(whole, resumed) and again.equals(history)
    assert [p.name for p in tmp_path.iterdir()] == ['c']


SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from test_training import *
def killed(epoch, rng):
    for i, batch in enumerate(batches(epoch, rng)):
        if epoch == 4 and i == 2: os.kill(os.getpid(), 9)
        yield batch
way, path, out = sys.argv[1:]
network, history = trained(**dict(batches=killed) if way == 'killed' else {{}}, checkpoint=None if way == 'whole' else path)
torch.save(dict(network=network.state_dict(), history=history.to_numpy(dtype=object).tolist()), out)
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    "Each in a process of its own, as users have it."
    code, made = SCRIPT.format(tests=str(ROOT / 'tests')), {}
    for way in ('killed', 'resumed', 'whole'):
        done = subprocess.run([sys.executable, '-c', code, way, str(tmp_path / 'c'), str(tmp_path / way)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == (-9 if way == 'killed' else 0), done.stderr
        assert ('goes on after epoch 4' in done.stdout) == (way == 'resumed')
        if way != 'killed': made[way] = torch.load(tmp_path / way, weights_only=True)
    whole, resumed = made['whole'], made['resumed']
    assert whole['history'] == resumed['history'] and all(torch.equal(whole['network'][k], resumed['network'][k]) for k in whole['network'])


def test_a_checkpoint_is_written_after_the_given_seconds_and_at_the_end(tmp_path):
    with pytest.raises(InterruptedError): trained(batches=cut(4), settings=replace(SHORT, save_every=1000.), checkpoint=tmp_path / 'c')
    assert not list(tmp_path.iterdir())
    trained(settings=replace(SHORT, save_every=1000.), checkpoint=tmp_path / 'c')
    assert torch.load(tmp_path / 'c', weights_only=True)['finished']


def test_a_finished_checkpoint_needs_no_training(tmp_path):
    net, history = trained(checkpoint=tmp_path / 'c')
    def never(epoch, rng): raise AssertionError
    again, loaded = trained(batches=never, checkpoint=tmp_path / 'c')
    assert same(net, again) and loaded.equals(history) and not again.training
    assert same(net, trained(batches=never, checkpoint=str(tmp_path / 'c'), settings=replace(SHORT, progress=True, save_every=5.))[0])  # how it is shown is no part of the run


def test_the_same_training_writes_the_same_bytes(tmp_path):
    "Figures are traced to the digests of their inputs; no name or process is written into the file."
    for name in ('a', 'another'): trained(checkpoint=tmp_path / name)
    assert (tmp_path / 'a').read_bytes() == (tmp_path / 'another').read_bytes()


@pytest.mark.parametrize('change, said', [(dict(settings=replace(SHORT, lr=.03)), 'lr'), (dict(seed=2), 'seed'), (dict(identity={'data': 2}), 'data'), (dict(kind=Plain), 'network'),
                                          (dict(settings=replace(SHORT, epochs=3, clip=0.)), 'clip, epochs')])
def test_a_checkpoint_of_another_run_is_not_used(tmp_path, capsys, change, said):
    trained(checkpoint=tmp_path / 'c', identity={'data': 1})
    changed = {'identity': {'data': 1}} | change
    net, history = trained(checkpoint=tmp_path / 'c', **changed)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and f'is of another run (other {said}); not used' in lines[0]
    assert same(net, trained(**changed)[0])
    assert same(net, trained(checkpoint=tmp_path / 'c', **changed)[0]) and not capsys.readouterr().out  # it was replaced


@pytest.mark.parametrize('length', [0, 100, -100])
def test_a_broken_checkpoint_is_set_aside(tmp_path, capsys, length):
    net, _ = trained(checkpoint=tmp_path / 'c')
    (tmp_path / 'c').write_bytes((tmp_path / 'c').read_bytes()[:length])
    again, _ = trained(checkpoint=tmp_path / 'c')
    assert 'is broken; set aside as c.broken' in capsys.readouterr().out and same(net, again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['c', 'c.broken']


class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_what_is_no_checkpoint_is_refused_and_kept(tmp_path):
    files = {'table.csv': b'a,b\n', 'weights.pt': None, 'folder': None}
    (tmp_path / 'table.csv').write_bytes(files['table.csv'])
    torch.save(network().state_dict(), tmp_path / 'weights.pt')
    (tmp_path / 'folder').mkdir()
    for name in files:
        with pytest.raises(Problem, match=f'{name} is no checkpoint of a training; expected'): trained(checkpoint=tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)
    torch.save(dict(identity=Trap(tmp_path / 'sprung')), tmp_path / 'trap')
    assert read_checkpoint(tmp_path / 'trap', {}, 'm') is None and not (tmp_path / 'sprung').exists()  # nothing in the file is run


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(Problem, match='cannot be written'): trained(checkpoint=tmp_path / 'file' / 'c')


@pytest.mark.parametrize('patience, epochs, best', [(2, 4, 2), (3, 5, 2), (4, 6, 6), (0, 6, None)])
def test_early_stopping_brings_the_best_weights_back(patience, epochs, best):
    "Of two equal scores the earlier counts; without patience the last weights stay."
    weights, scores = [], iter([3., 1., 2., 1., 1.5, .5])
    net = network()
    def score():
        assert not net.training and not torch.is_grad_enabled()
        weights.append(net.last.weight.detach().clone())
        return next(scores)
    history = train(net, batches, settings=replace(SHORT, patience=patience), score=score)
    assert history['epoch'].max() == epochs and torch.equal(net.last.weight, weights[best - 1 if best else -1])
    assert history.query('what == "val"')['value'].tolist() == [3., 1., 2., 1., 1.5, .5][:epochs]


def test_a_score_of_none_is_none():
    net, history = trained(score=lambda: None)
    assert same(net, trained(scored=False)[0]) and set(history['what']) == {'train', 'mae'}


def test_numbers_that_are_none_end_the_training():
    bad = Y.clone()
    bad[5] = torch.nan
    give = lambda epoch, rng: [(X, bad if epoch == 2 else Y)]
    with pytest.raises(Problem, match=r'^gears: the loss or its gradient is NaN or infinite in epoch 3; try a smaller lr \(it is 0.02\)'): trained(batches=give, name='gears')
    with pytest.raises(Problem, match='^Net: the validation score is NaN or infinite in epoch 1;'): trained(score=lambda: float('nan'))

    class Root(Plain):
        def forward(self, x, y): return torch.sqrt(((self.f(x) - y).detach() * 0 * self.last.weight.sum()).abs()).sum()  # 0, with a gradient that is none
    with pytest.raises(Problem, match='Root: the loss or its gradient'): trained(Root, scored=False)


def test_no_batches_is_a_problem():
    with pytest.raises(Problem, match=r'^Net: batches\(\) gave none'): trained(batches=lambda epoch, rng: [])


def test_parameters_may_rest_at_first(tmp_path):
    def thaw(net): return lambda epoch: net.first.requires_grad_(epoch == 3)  # thawed in one epoch, frozen again: a resumed run has to know
    def run(batches=batches, **given):
        net = network()
        return net, train(net, batches, settings=SHORT, before_epoch=thaw(net), **given)
    net, _ = run()
    fixed = network()
    train(fixed, batches, settings=SHORT, before_epoch=lambda epoch: fixed.first.requires_grad_(False))
    assert torch.equal(fixed.first.weight, network().first.weight) and not torch.equal(net.first.weight, fixed.first.weight)
    assert all(p.requires_grad for p in net.parameters())
    for after in (2, 4):
        with pytest.raises(InterruptedError): run(cut(after), checkpoint=tmp_path / str(after))
        assert same(net, run(checkpoint=tmp_path / str(after))[0])


@pytest.mark.parametrize('precision, tolerance', [('32-true', 1e-4), ('bf16-mixed', .1)])
def test_other_number_formats_come_to_about_the_same(precision, tolerance):
    "Batches in float64 are converted on the way in; a bfloat16 run keeps its weights in float32."
    s = Settings(epochs=5, precision=precision)
    give = lambda epoch, rng: [(X.float(), Y.float())]
    one, two = network(Plain).float(), network(Plain)
    train(one, give, settings=s), train(two, lambda epoch, rng: [(X, Y)], settings=replace(s, precision='64-true'))
    assert one.last.weight.dtype == torch.float32 and torch.get_default_dtype() == torch.float32
    assert_allclose(one.last.weight.detach().numpy(), two.last.weight.detach().numpy(), atol=tolerance)


def test_shares_add_up_to_the_batch():
    batch = X[:7], Y[:7], torch.arange(3), torch.tensor(2.), None
    parts = [share(batch, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([p[0] for p, _ in parts]).sort(0)[0], X[:7].sort(0)[0])
    assert all(torch.equal(p[2], batch[2]) and p[3] == 2 and p[4] is None for p, _ in parts)
    assert_allclose(np.mean([w * float(p[1].mean()) for p, w in parts]), float(Y[:7].mean()))
    assert share(batch, 0, 1) == (batch, 1.) and share((X[:1], Y[:1]), 1, 2)[1] == 1.


MANY = """
import sys, logging
sys.path.insert(0, {tests!r})
from perturb_research.models.training import *
assert 'lightning_fabric' not in sys.modules
from test_training import *
if __name__ == '__main__':
    effects = screen()
    fit = lambda **given: Toy(epochs=4, dropout=0., **given).fit(effects[:26], val=effects[26:], rng=generator(0, 'fit'))
    two, one = fit(strategy={strategy!r}, devices=2), fit()
    assert_allclose(one.history['value'], two.history['value'], rtol=1e-9)
    assert_allclose(one.predict(effects.obs), two.predict(effects.obs), rtol=1e-5)
    if {strategy!r} == 'ddp_spawn': pytest.raises(Problem, fit, strategy='ddp_fork', devices=2, lr=1e300, clip=0.).match('toy: the .* is NaN or infinite in epoch')
    os.write(1, b'equal ')  # at once: print may be cut in two by the other process
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    "Shares of unequal size, own weights in each process: the same history and predictions, nothing printed besides."
    env = {k: v for k, v in os.environ.items() if k not in ('LOCAL_RANK', 'MASTER_PORT', 'WORLD_SIZE')} | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    running = []
    for strategy in ('ddp', 'ddp_spawn'):
        (script := tmp_path / f'{strategy}.py').write_text(MANY.format(tests=str(ROOT / 'tests'), strategy=strategy))
        running.append(subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and set(out.split()) == {'equal'}, out + err
        assert 'GLOBAL_RANK' not in err and 'distributed_backend' not in err, err


def test_devices_that_are_not_there_are_one_line():
    with pytest.raises(Problem, match="^Net: cannot train with accelerator='abacus'"): trained(settings=Settings(accelerator='abacus'))
    with pytest.raises(Problem, match="^Net: cannot train with .*strategy='telepathy'"): trained(settings=Settings(strategy='telepathy'))
    if not torch.cuda.is_available():
        with pytest.raises(Problem, match="^Net: cannot train with accelerator='cuda'"): trained(settings=Settings(accelerator='cuda'))


def test_a_bar_if_asked_for(capfd):
    trained(settings=replace(SHORT, progress=True))
    out, err = capfd.readouterr()
    assert not out and 'Net: 100%' in err and 'train=' in err and 'val=' in err


# --- the model around it


class Toy(NeuralModel):
    name, settings, options = 'toy', Settings(epochs=12, lr=.05, save_every=0), dict(dropout=.1, batch=7, tag='', extra=None)

    def code(self, obs): return self.tensor([[float(p in name.split('+')) for p in 'ABCDEFGH'] for name in obs['perturbation']])

    def build(self):
        self.x, self.y = self.code(self.train), self.tensor(self.X)
        return Body(8, len(self.genes), self.o.dropout)

    def batches(self, epoch, rng):
        order = rng.permutation(len(self.x))
        return [(self.x[rows], self.y[rows]) for rows in np.split(order, range(self.o.batch, len(order), self.o.batch))]

    def effects(self, conditions): return self.array(self.network.f(self.code(conditions)))


class Body(nn.Module):
    def __init__(self, parts, genes, dropout):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(parts, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, genes))

    def forward(self, x, y): return ((self.f(x) - y)**2).mean()


def screen(genes=5):
    rng, parts = generator(0, 'screen'), list('ABCDEFGH')
    single = {p: rng.normal(size=genes) for p in parts}
    names = parts + [f'{a}+{b}' for a in parts for b in parts if a < b]
    effects = np.array([(.7 if '+' in n else 1) * sum(single[p] for p in n.split('+')) for n in names], dtype='float32')
    obs = pd.DataFrame(dict(perturbation=names, perturbation_type='CRISPRa', context='x', dose=np.nan, time_h=np.nan), index=names)
    return ad.AnnData(effects, obs, pd.DataFrame(index=[f'G{i}' for i in range(genes)]))


EFFECTS = screen()


def fitted(cls=Toy, effects=EFFECTS, rows=26, rng=0, checkpoint=None, val=True, cells=None, priors=None, **changes):
    return cls(**changes).fit(effects[:rows], val=effects[rows:30] if val else None, cells=cells, priors=priors, rng=generator(rng, 'fit'), checkpoint=checkpoint)


def test_two_models_of_one_seed_agree_and_asking_changes_nothing():
    a, b = fitted(), fitted()
    predicted = a.predict(EFFECTS.obs)
    assert (predicted == b.predict(EFFECTS.obs)).all() and (predicted == a.predict(EFFECTS.obs)).all()
    assert (predicted[::-1] == a.predict(EFFECTS.obs[::-1])).all() or np.allclose(predicted[::-1], a.predict(EFFECTS.obs[::-1]), atol=1e-6)
    assert not (predicted == fitted(rng=1).predict(EFFECTS.obs)).all() and predicted.dtype == np.float32
    assert a.hyperparameters['epochs_run'] <= 12 and a.hyperparameters['parameters'] == 8 * 16 + 16 + 16 * 5 + 5
    assert a.hyperparameters['lr'] == .05 and a.hyperparameters['batch'] == 7 and 'devices' not in a.hyperparameters
    val = a.history.query('what == "val"')
    assert a.hyperparameters['best_epoch'] == val['epoch'].to_numpy()[val['value'].argmin()]
    assert_allclose(np.linalg.norm(a.predict(EFFECTS[26:30].obs) - EFFECTS[26:30].X, axis=1).mean(), val['value'].min(), rtol=1e-5)  # the best weights are in force


def test_a_model_comes_back_from_its_checkpoint(tmp_path, monkeypatch):
    whole = fitted(checkpoint=tmp_path / 'm').predict(EFFECTS.obs)
    monkeypatch.setattr(Toy, 'batches', lambda self, epoch, rng: 1 / 0)
    back = fitted(checkpoint=tmp_path / 'm')
    assert (back.predict(EFFECTS.obs) == whole).all() and back.hyperparameters['epochs_run'] > 0


def changed(i=0):
    effects = EFFECTS.copy()
    effects.X[i, 0] += 1e-3
    return effects


CELLS = ad.AnnData(sp.csr_matrix(np.eye(3, dtype='float32')), pd.DataFrame({'condition': list('AB') + ['']}, index=list('xyz')), layers={'counts': sp.csr_matrix(np.eye(3))})
OTHER = ad.AnnData(sp.csr_matrix(2 * np.eye(3, dtype='float32')), CELLS.obs.copy(), layers={'counts': sp.csr_matrix(np.eye(3))})


@pytest.mark.parametrize('change, said', [(dict(effects=changed()), 'effects'), (dict(effects=changed(27)), 'val'), (dict(rows=25), 'conditions, effects, val'), (dict(rng=1), 'seed'),
                                          (dict(dropout=.2), 'dropout'), (dict(lr=.04), 'lr'), (dict(effects=EFFECTS[:, ::-1].copy()), 'effects, genes, val'), (dict(cells=OTHER), 'cells'),
                                          (dict(priors={'graph': sp.csr_array(np.eye(2))}), 'priors'), (dict(val=False), 'val')])
def test_whatever_changes_the_model_keeps_its_checkpoint_from_being_used(tmp_path, capsys, change, said):
    fitted(checkpoint=tmp_path / 'm', cells=CELLS, epochs=2)
    model = fitted(checkpoint=tmp_path / 'm', **dict(cells=CELLS, epochs=2) | change)
    assert f'toy: the checkpoint {tmp_path / "m"} is of another run (other {said}); not used' in capsys.readouterr().out
    assert (model.predict(EFFECTS.obs) == fitted(**dict(cells=CELLS, epochs=2) | change).predict(EFFECTS.obs)).all()


def test_the_source_is_part_of_a_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, factor in (('edited_a', 1), ('edited_b', 2)): (tmp_path / f'{name}.py').write_text(f'class Net:\n    def f(self): return {factor}\n')
    import edited_a, edited_b
    assert source_of(edited_a.Net()) != source_of(edited_b.Net()) and source_of(edited_a.Net()) == source_of(edited_a.Net(), nn.Linear(1, 1))
    made = [{}, {}, {}]
    for scope, factor in zip(made, (1, 2, 1)): exec(f'class Net:\n    def f(self): return {factor}', scope | {'__name__': 'nowhere'}, scope)
    one, two, three = (source_of(scope['Net']()) for scope in made)
    assert one == three != two


def test_digests_follow_content():
    frame = pd.DataFrame({'a': [1., np.nan], 'b': pd.Categorical(['x', 'y'])}, index=['r', 's'])
    assert digest(frame) == digest(frame.copy()) == digest(frame.assign(b=pd.Categorical(['x', 'y'], categories=['y', 'x'])))
    assert digest(CELLS) == digest(CELLS.copy()) != digest(OTHER)
    assert digest(CELLS) != digest(ad.AnnData(CELLS.X, CELLS.obs.assign(condition='A'), layers=dict(CELLS.layers)))
    assert digest(sp.csr_array(np.eye(2))) == digest(sp.csc_array(np.eye(2))) != digest(np.eye(2))
    assert digest(np.zeros(4)) != digest(np.zeros((2, 2))) != digest(np.zeros((2, 2), dtype=int))


@pytest.mark.parametrize('changes, said', [(dict(epoch=3), "toy: setting 'epoch' is unknown; did you mean 'epochs'\\?"), (dict(nonsense=3), "'nonsense' is unknown; there are epochs, lr"),
                                           (dict(batch='many'), "toy: parameter 'batch' is 'many'; expected an integer"), (dict(dropout=True), 'expected a number'), (dict(tag=3), 'expected text'),
                                           (dict(epochs=0), 'expected an integer from 1'), (dict(lr=-1.), 'expected a number from 0'), (dict(lr=float('nan')), 'expected a number'),
                                           (dict(precision='64'), "expected one of '64-true'"), (dict(devices=True), 'expected a number, a list'), (dict(warmup=2), 'from 0 to 1')])
def test_wrong_settings_are_one_line(changes, said):
    with pytest.raises(Problem, match=said): Toy(**changes)


def test_options_are_those_of_the_instance():
    model = Toy(extra=[1, 2], epochs=3)
    assert (model.o.extra, model.settings.epochs, Toy().o.extra, Toy().settings.epochs, Toy.settings.epochs) == ([1, 2], 3, None, 12, 12)
    with pytest.raises(Problem, match='toy: not fitted yet'): model.predict(EFFECTS.obs)


def test_tensors_have_the_number_format_of_the_training():
    model = fitted(epochs=1)
    kinds = {torch.float64: np.ones(2, 'float32'), torch.int64: np.ones(2, 'int32'), torch.bool: np.array([True])}
    for dtype, array in kinds.items(): assert model.tensor(array).dtype == dtype
    assert model.tensor(pd.Series([1., 2.])).tolist() == [1, 2]
    for kind in (sp.csr_matrix, sp.coo_array):
        graph = model.tensor(kind(np.array([[0, 2], [3, 0]])))
        assert graph.is_coalesced() and graph.dtype == torch.float64 and (graph.to_dense().numpy() == [[0, 2], [3, 0]]).all()
    single = fitted(epochs=1, precision='32-true')
    assert single.tensor([.5]).dtype == torch.float32 and {p.dtype for p in single.network.parameters()} == {torch.float32}
    assert single.array(single.tensor([.5])).dtype == np.float64
    half, full = (fitted(precision=p, patience=0).predict(EFFECTS.obs) for p in ('bf16-mixed', '64-true'))
    assert np.corrcoef(half.ravel(), full.ravel())[0, 1] > .95


def test_a_rule_is_learned():
    "Doubles that are 0.7 times the sum of the singles, half of them held out."
    effects = screen(genes=12)
    order = [*range(8), *(8 + generator(0, 'rule').permutation(28))]
    effects = effects[order].copy()
    model = Toy(epochs=300, lr=.05, dropout=0., patience=0, batch=26).fit(effects[:26], rng=generator(0, 'rule'))
    error = np.linalg.norm(model.predict(effects[26:].obs) - effects[26:].X, axis=1).mean()
    assert error < .4 * np.linalg.norm(effects[26:].X, axis=1).mean()


def test_a_seed_makes_the_weights_and_sums_have_an_order():
    with computing(Settings()):
        assert torch.are_deterministic_algorithms_enabled() and torch.get_default_dtype() == torch.float64
    assert (Toy(epochs=1).fit(EFFECTS).predict(EFFECTS.obs) == Toy(epochs=1).fit(EFFECTS).predict(EFFECTS.obs)).all()  # no rng: seed 0
