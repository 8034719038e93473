"""GEARS-style model: seconds an epoch and peak memory on synthetic screens of Norman's shape, and accuracy beside cell-gears 0.1.2 on the same cells.

    python benchmarks/gears.py [small] [full]                 each in a process of its own. Limits: LIMITS below
    python benchmarks/gears.py peers FOLDER PYTHON            cell-gears and ours on the K562 part of norman_mcfaline_cells.h5ad (about 20 minutes); FOLDER keeps
                                                              what was made; PYTHON is the interpreter of an environment with cell-gears 0.1.2, torch and torch_geometric
"""
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

LIMITS = {'small': (27.8, 1.0)}  # seconds for as many training cells, GB: a tenth and a half of cell-gears 0.1.2's 278 s an epoch and 2.0 GB on the same machine
SCREENS = {'small': dict(cells=9_148, density=.27), 'full': dict(cells=91_000, density=.155)}
SHARED = Path(__file__).resolve().parents[2]/'shared'/'data'
THEIRS = {0: 2.051, 1: 2.005, 2: 2.059}  # split -> mean L2 of cell-gears 0.1.2 on its held-out conditions, as `peers` measured it
SPLITS = 3  # splits of the comparison, the seed of training with each of them


# ---------------------------------------------------------------- ours, large screens

def norman_sized(name):
    "`(cells, effects, split, priors)` of a synthetic screen: half of the conditions are pairs; the prior is a random graph of 20 edges a gene."
    import anndata as ad
    import pandas as pd
    from scipy import sparse

    from evaluation import draw
    from perturb_research.core import generator
    from perturb_research.data.labels import condition_ids
    from perturb_research.data.priors import Priors
    from perturb_research.data.splits import make_split
    size = dict(genes=5_000, singles=110, pairs=126) | SCREENS[name]
    rng = generator(0, name)
    genes = np.array([f'G{i:05d}' for i in range(size['genes'])])
    rates = rng.lognormal(0, 1.8, size['genes'])
    low, high = -20., 20.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-rates * np.exp(middle))).mean() < size['density'] else (low, middle)
    single = (rng.random((size['singles'], size['genes'])) < .05) * rng.normal(0, .6, (size['singles'], size['genes']))
    pairs = sorted({tuple(sorted(rng.choice(size['singles'], 2, replace=False))) for _ in range(4 * size['pairs'])})
    pairs = [pairs[i] for i in sorted(rng.permutation(len(pairs))[:size['pairs']])]
    fold = np.vstack([single, [.7 * (single[a] + single[b]) for a, b in pairs]])
    names = [genes[i] for i in range(size['singles'])] + [f'{genes[a]}+{genes[b]}' for a, b in pairs]
    group = rng.permutation(np.r_[np.full(int(.088 * size['cells']), -1), rng.integers(0, len(names), size['cells'] - int(.088 * size['cells']))])
    X = draw(size['cells'], (rates * np.exp(middle)).astype(np.float32), np.exp(fold).astype(np.float32), group, 0, name)
    obs = pd.DataFrame(dict(perturbation=names, perturbation_type='CRISPRa', context='k562', dose=np.nan, time_h=np.nan))
    obs.index = condition_ids(obs)
    known = sparse.csr_array((np.ones(len(group)), (np.where(group < 0, len(names), group), np.arange(len(group)))), shape=(len(names) + 1, len(group)))
    means = (known @ X).toarray() / np.maximum(np.asarray(known.sum(1)), 1)[:, None]
    effects = ad.AnnData((means[:-1] - means[-1]).astype(np.float32), obs.assign(n_cells=np.bincount(group[group >= 0], minlength=len(names))), pd.DataFrame(index=genes))
    effects.uns |= dict(dataset_id=name, effect_scale='mean_log1p')
    table = obs.reset_index(drop=True).reindex(group).fillna({'perturbation': 'control', 'perturbation_type': 'CRISPRa', 'context': 'k562'})
    cells = ad.AnnData(X, table.assign(batch='0', is_control=group < 0, condition=np.where(group < 0, '', obs.index.to_numpy()[group])).set_index(pd.Index([f'c{i}' for i in range(len(group))])),
                       pd.DataFrame(index=genes))
    edges = sparse.csr_array((np.ones(20 * len(genes)), (np.repeat(np.arange(len(genes)), 20), rng.integers(0, len(genes), 20 * len(genes)))), shape=(len(genes),) * 2)
    return cells, effects, make_split(effects, 'combination', 0, n_genes=len(genes)), Priors(pd.Index(genes), pd.Index(genes[:size['singles']]), graphs={'random': edges}, profiles={'random:targets': edges})


def measure(name, folder):
    "Prints what one screen takes, as JSON; the screen is made in another process, so that its memory does not count."
    import anndata as ad

    from perturb_research.core import generator, peak_memory_gb
    from perturb_research.data.priors import read_priors
    from perturb_research.models.gears import Gears
    train, cells, priors = ad.read_h5ad(folder/'train.h5ad'), ad.read_h5ad(folder/'cells.h5ad'), read_priors(folder/'priors.npz')
    start = peak_memory_gb()
    marks = []

    class Timed(Gears):
        def before_epoch(self, epoch): marks.append(time.perf_counter())

    began = time.perf_counter()
    Timed(epochs=6, precision='32-true', hidden=64).fit(train, cells=cells, priors=priors, rng=generator(0, 'benchmark'))
    epoch = statistics.median(np.diff(marks))
    print(json.dumps(dict(seconds_an_epoch=epoch, preparation=marks[0] - began, conditions=train.n_obs, cells=int((~cells.obs['is_control']).sum()),
                          genes=train.n_vars, peak_gb=peak_memory_gb(), peak_before_gb=start)))


def sizes(names):
    import tempfile

    from perturb_research.data.priors import write_priors
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            if os.fork() == 0:
                cells, effects, split, priors = norman_sized(name)
                split.train(effects).write_h5ad(folder/'train.h5ad')
                split.train_cells(cells, effects).write_h5ad(folder/'cells.h5ad')
                import pandas as pd
                from dataclasses import replace
                write_priors(folder/'priors.npz', replace(priors, report=pd.DataFrame()))
                os._exit(0)
            assert os.wait()[1] == 0
            done = subprocess.run([sys.executable, __file__, 'measure', name, folder], capture_output=True, text=True)
            if done.returncode: sys.exit(done.stdout + done.stderr)
            f = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {f['cells']:,} training cells of {f['conditions']} conditions x {f['genes']:,} genes: {f['seconds_an_epoch']:.2f} s an epoch (every cell of every condition, by its moments), "
              f"{f['preparation']:.1f} s of preparation, peak {f['peak_gb']:.2f} GB ({f['peak_before_gb']:.2f} with the data alone)")
        if name in LIMITS:
            seconds, gb = LIMITS[name]
            print(f"  limits {seconds} s: {'kept' if f['seconds_an_epoch'] <= seconds else 'BROKEN'}; {gb} GB: {'kept' if f['peak_gb'] <= gb else 'BROKEN'}")


# ---------------------------------------------------------------- beside cell-gears

def k562():
    "`(cells, effects, priors)` of the K562 part: 18 single and 15 double activations x 500 genes, 100 cells each."
    import anndata as ad
    import pandas as pd
    from scipy import sparse

    from perturb_research.data.labels import condition_ids, parts_of
    from perturb_research.data.priors import gather
    cells = ad.read_h5ad(SHARED/'norman'/'norman_mcfaline_cells.h5ad')
    cells = cells[cells.obs['perturbation_type'] == 'CRISPRa']
    names = ['+'.join(sorted(p.split('+'))) for p in cells.obs['perturbation'].astype(str)]
    obs = pd.DataFrame(dict(perturbation=names, perturbation_type='CRISPRa', context='k562', dose=np.nan, time_h=np.nan), index=cells.obs_names)
    obs['is_control'] = obs['perturbation'] == 'control'
    obs['condition'] = np.where(obs['is_control'], '', condition_ids(obs))
    cells = ad.AnnData(sparse.csr_matrix(cells.X, dtype=np.float32), obs.assign(batch='0'), pd.DataFrame(index=cells.var_names))
    rows = obs[~obs['is_control']].drop_duplicates('condition').set_index('condition').sort_index()
    mean = lambda mine: np.asarray(cells.X[mine.to_numpy()].mean(0)).ravel()
    X = np.array([mean(obs['condition'] == c) for c in rows.index]) - mean(obs['is_control'])
    effects = ad.AnnData(X.astype(np.float32), rows.assign(n_cells=obs['condition'].value_counts().reindex(rows.index)), cells.var)
    effects.uns |= dict(dataset_id='k562', effect_scale='mean_log1p')
    genes = sorted({p for mine in parts_of(effects.obs) for p in mine})
    return cells, effects, gather([SHARED/'graphs'/'hallmark.gmt', SHARED/'graphs'/'collectri_signed.tsv'], effects.var_names, genes)


def drawn(effects, seed):
    "A split: a fifth of the genes and a quarter of the other pairs held out, and as much for validation."
    from perturb_research.data.splits import make_split
    return make_split(effects, 'combination', seed, n_genes=effects.n_vars)


def hand_over(folder):
    "Files for cell-gears: the same cells, the same splits, and one perturbation graph: the mean similarity under the same priors."
    import pandas as pd
    cells, effects, priors = k562()
    genes = list(priors.perturbed)
    ctrl = {c: '+'.join(p if '+' in p else p + '+ctrl' for p in [p]) for c, p in zip(effects.obs_names, effects.obs['perturbation'])}
    cells.obs = cells.obs.assign(condition=[ctrl.get(c, 'ctrl') for c in cells.obs['condition']], cell_type='K562')[['condition', 'cell_type']]
    cells.var['gene_name'] = cells.var_names
    cells.write_h5ad(folder/'cells.h5ad')
    S = np.mean(list(priors.similarity(genes).values()), axis=0)
    pd.DataFrame([(genes[i], genes[j], S[i, j]) for i, j in np.argwhere(S > 0)], columns=['source', 'target', 'importance']).to_csv(folder/'graph.csv', index=False)
    splits = {seed: {part: [ctrl[c] for c in drawn(effects, seed).ids[part]] for part in ('train', 'val', 'test')} for seed in range(SPLITS)}
    (folder/'splits.json').write_text(json.dumps(dict(splits=splits, genes=genes)))


def cell_gears(folder, seed, epochs):
    "Train cell-gears 0.1.2 in the folder of `hand_over`; its predicted effects go to `theirs.<seed>.npz`. Runs in an environment of its own, without the network."
    import anndata as ad
    import pandas as pd
    import torch
    import torch_geometric.data
    import torch_geometric.loader
    pd.Series.nonzero = lambda self: self.to_numpy().nonzero()  # gone from pandas
    torch_geometric.data.DataLoader = torch_geometric.loader.DataLoader
    sys.path.remove(str(Path(__file__).resolve().parent))  # this file is called gears, too
    from gears import GEARS, PertData
    from gears.utils import create_cell_graph_dataset_for_prediction
    told = json.loads((folder/'splits.json').read_text())
    (folder/'data').mkdir(exist_ok=True)
    os.chdir(folder)
    (folder/'data'/'go_essential_k562.csv').write_text((folder/'graph.csv').read_text())
    with open(folder/'data'/'gene2go_all.pkl', 'wb') as f: pickle.dump({g: {'x'} for g in told['genes']}, f)
    cells = ad.read_h5ad(folder/'cells.h5ad')
    np.random.seed(seed), torch.manual_seed(seed)
    data = PertData(str(folder/'data'), default_pert_graph=False)
    if not (folder/'data'/'k562'/'perturb_processed.h5ad').exists(): data.new_data_process('k562', adata=cells)
    data.load(data_path=str(folder/'data'/'k562'))
    with open(folder/f'split{seed}.pkl', 'wb') as f: pickle.dump(dict(told['splits'][str(seed)], train=['ctrl', *told['splits'][str(seed)]['train']]), f)
    data.prepare_split('custom', seed=seed, split_dict_path=str(folder/f'split{seed}.pkl'))
    data.train_gene_set_size = seed  # names the file of the co-expression graph, one a split
    data.get_dataloader(batch_size=32, test_batch_size=128)
    model = GEARS(data, device='cpu')
    model.model_initialize(hidden_size=64)
    began = time.perf_counter()
    model.train(epochs=epochs, lr=1e-3)
    seconds = time.perf_counter() - began
    asked = told['splits'][str(seed)]['test']
    model.best_model.eval()
    X = []
    for c in asked:  # as GEARS.predict, less the very control cells that went in: drawn at random, they would add their own noise to the effect
        graphs = create_cell_graph_dataset_for_prediction([p for p in c.split('+') if p != 'ctrl'], model.ctrl_adata, model.pert_list, 'cpu', num_samples=100)
        batch = next(iter(torch_geometric.loader.DataLoader(graphs, 100)))
        with torch.no_grad(): X.append((model.best_model(batch) - batch.x.reshape(len(graphs), -1)).mean(0).numpy())
    np.savez(folder/f'theirs.{seed}.npz', X=np.array(X), seconds=seconds, peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def ours(seed):
    "`(error of our test effects, seconds, errors of the training mean and of the additive profile)`: mean L2 over the held-out conditions of split `seed`."
    from perturb_research.core import generator
    from perturb_research.models.baselines import MODELS
    from perturb_research.models.gears import Gears
    cells, effects, priors = k562()
    split = drawn(effects, seed)
    train, val, test = split.train(effects), split.val(effects), split.test(effects)
    began = time.perf_counter()
    model = Gears().fit(train, val=val, cells=split.train_cells(cells, effects), priors=priors, rng=generator(seed, 'gears'))
    seconds = time.perf_counter() - began
    error = lambda X: float(np.linalg.norm(X - test.X, axis=1).mean())
    return error(model.predict(test.obs)), seconds, error(MODELS['mean']().fit(train).predict(test.obs)), error(MODELS['additive']().fit(train).predict(test.obs))


def peers(folder, python, epochs=6):
    "Six epochs hold 98 % of all steps that cell-gears takes: its learning rate is halved after each."
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    hand_over(folder)
    _, effects, _ = k562()
    for seed in range(SPLITS):
        if not (folder/f'theirs.{seed}.npz').exists():
            subprocess.run([python, '-W', 'ignore', __file__, 'cell_gears', str(folder), str(seed), str(epochs)], check=True)
        theirs = np.load(folder/f'theirs.{seed}.npz')
        test = drawn(effects, seed).test(effects)
        error = np.linalg.norm(theirs['X'] - test.X, axis=1).mean()
        mine, seconds, average, additive = ours(seed)
        print(f"split {seed} ({test.n_obs} held-out conditions), mean L2: cell-gears {error:.3f} ({theirs['seconds']:.0f} s, {theirs['peak_gb']:.1f} GB), ours {mine:.3f} ({seconds:.0f} s), "
              f"training mean {average:.3f}, additive {additive:.3f}", flush=True)


if __name__ == '__main__':
    command, *rest = sys.argv[1:] or ['small', 'full']
    if command == 'measure': measure(rest[0], Path(rest[1]))
    elif command == 'cell_gears': cell_gears(Path(rest[0]), int(rest[1]), int(rest[2]))
    elif command == 'peers': peers(*rest)
    else: sizes([command, *rest])
