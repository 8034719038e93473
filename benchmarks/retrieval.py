"""Reverse retrieval: seconds at the size of Norman's full grid, and what is named on real screens.

    python benchmarks/retrieval.py [sizes] [doubles] [variants] [inverse] [papalexi]        default: sizes, and the others where their files are beside the project

`sizes`: 5,565 candidates x 130 queries x 2,000 genes under 3 masks by 4 distances, and 20,000 cells against 8,400 profiles; seconds and peak memory.
`doubles`: the Norman and CaRPool effects, 4 random halves of the doubles held out (as in benchmarks/doubles.py), all singles and pairs of the screen's
genes as candidates, and the 20 genes with most measured pairs; galleries of the additive model and of the Gaussian processes, by cosine and whitened by
what each leaves unexplained of the training doubles. `half -> half`: trained on one half of the experiment, asked with the other.
`variants`: what might name more, on 6 further halves of Norman: residuals of doubles left out, the length of the whitened difference in place of its angle,
the mean of three galleries, and distances joined with the order of an inverse model.
`inverse`: the same question, 2 halves, put to inverse models, which read the genes off the effect and predict none.
`papalexi`: trained on two replicates, asked with the third; pseudobulk, cell vote and single cells by logistic regression.
Differences to the additive gallery by cosine are paired; intervals: 95 % bootstrap over conditions, each averaged over its repeats.
"""
import resource
import sys
import time

import anndata as ad
import numpy as np
import pandas as pd
from doubles import DATA, DEFAULT, halves, read
from sklearn.linear_model import LogisticRegression

from perturb_research.core import generator
from perturb_research.data.preprocess import log_normalise
from perturb_research.drugs.candidate import FOR_GENES, INVERSE
from perturb_research.evaluate.causes import densest
from perturb_research.evaluate.retrieval import (MASKS, ask, candidate_genes, cell_votes, chance_scores, de_overlap, hidden_genes,
                                                 leading_axes, leftover, pose, retrieval_scores, whitened)
from perturb_research.models.baselines import MODELS, candidates as grid
from perturb_research.models.gaussian import FAMILY

MODELS |= {m.name: m for m in FAMILY}
SHOWN = ['exact@1', 'exact@8', 'relevant@1', 'mrr']


def table(names): return pd.DataFrame({'perturbation': names, 'perturbation_type': 'CRISPRa', 'context': 'x', 'dose': np.nan}, index=list(names))


def intervals(rows, by, reference, draws=2000):
    "Means of SHOWN by the columns `by`, exact@1 and mrr less those of the rows `reference` on the same queries with intervals."
    found = []
    each = rows.groupby([*by, 'query'])[SHOWN].mean()
    for key in dict.fromkeys(zip(*(rows[b] for b in by))):
        mine, base = each.loc[key], each.loc[reference(key)]
        gain = (mine - base).to_numpy()
        drawn = gain[generator(0, 'bootstrap').integers(len(gain), size=(draws, len(gain)))].mean(1)
        low, high = np.quantile(drawn, [.025, .975], axis=0)
        found.append(dict(zip(by, key)) | mine.mean().to_dict() | {f'{m} less additive': f'{gain[:, i].mean():+.3f} [{low[i]:+.3f}, {high[i]:+.3f}]' for i, m in enumerate(SHOWN) if m in ('exact@1', 'mrr')})
    return pd.DataFrame(found).set_index(list(by)).round(3)


def search(known, asked, candidates, galleries, **what):
    "Scores of each gallery, mask and distance, a row a query."
    question, found = pose(asked, candidates), []
    for model, gallery in galleries.items():
        metric = whitened(leftover(known, gallery), known.var_names)
        for mask in MASKS:
            for by, distance in (('cosine', 'cosine'), ('whitened', metric)):
                scores = retrieval_scores(ask(question, gallery, distance, mask), question.exact, question.relevant)
                found.append(scores.assign(model=model, by=by, mask=mask, query=asked.obs_names.to_numpy(), **what))
    return found


def doubles(path, names=('additive', 'kernel', 'gp_average'), repeats=4):
    effects, found = read(path), []
    conditions, pairs = grid(effects.obs), [p.split('+') for p in effects.obs['perturbation'] if '+' in p]
    whole, few = candidate_genes(effects.obs, pairs=True), set(densest(pairs))
    small = {p: genes for p, genes in whole.items() if set(genes) <= few}
    modes = ['all cells', *(['half -> half'] if 'half1' in effects.layers else [])]
    for mode in modes:
        for train, held in halves(effects, repeats):
            known, asked = effects[train].copy(), effects[held].copy()
            if mode != 'all cells':
                measured = np.isfinite(known.layers['half1']).all(1)
                known.X, asked.X = np.where(measured[:, None], known.layers['half1'], known.X), asked.layers['half2']
                asked = asked[np.isfinite(asked.X).all(1)].copy()
            known.layers.clear()
            galleries = {m: ad.AnnData(MODELS[m]().fit(known).predict(conditions), conditions, effects.var[[]]) for m in names}
            found += search(known, asked, whole, galleries, grid=f'{len(whole)}', mode=mode)
            inside = asked[asked.obs['perturbation'].isin(small).to_numpy()].copy()
            near = {m: g[g.obs['perturbation'].isin(small).to_numpy()].copy() for m, g in galleries.items()}
            if mode == 'all cells': found += search(known, inside, small, near, grid=f'{len(small)}', mode=mode)
    rows = pd.concat(found, ignore_index=True)
    print(f"\n{path.name}: {repeats} random halves of {len(pairs)} doubles; queries: {', '.join(f'{n} of {g} candidates' for g, n in rows.groupby('grid')['query'].nunique().items())}")
    print(intervals(rows, ['mode', 'grid', 'mask', 'model', 'by'], lambda key: (*key[:3], 'additive', 'cosine')).to_string())


def mahalanobis(query, gallery, metric, hidden):
    "Squared length of the whitened difference; hidden genes ((genes,)) count as unchanged."
    query, gallery = np.where(hidden, 0, query), np.where(hidden, 0, gallery)
    inner = lambda a, b: metric.rest * a @ b.T + (a @ metric.V * metric.weight) @ (b @ metric.V).T
    square = lambda a: metric.rest * (a**2).sum(1) + (a @ metric.V)**2 @ metric.weight
    return square(query)[:, None] + square(gallery) - 2 * inner(query, gallery)


def left_out(known, name, rng, folds=5):
    "What the model `name` leaves unexplained of the doubles of `known` that it was not trained on."
    doubles, found = rng.permutation(np.flatnonzero(known.obs['perturbation'].str.contains('+', regex=False))), []
    for fold in range(folds):
        held = np.isin(np.arange(known.n_obs), doubles[fold::folds])
        found.append(np.asarray(known[held].X) - MODELS[name]().fit(known[~held].copy()).predict(known.obs[held]))
    return np.vstack(found)


def variants(path, names=('kernel', 'gp_average', 'gp_joint'), first=4, repeats=10):
    effects, rows = read(path), []
    conditions, candidates = grid(effects.obs), candidate_genes(effects.obs, pairs=True)
    listed = pd.DataFrame({'targets': [';'.join(genes) for genes in candidates.values()], 'smiles': ''}, index=list(candidates))
    even = lambda d: (d - d.mean(1, keepdims=True)) / d.std(1, keepdims=True)
    for repeat, (train, held) in list(enumerate(halves(effects, repeats)))[first:]:  # not those that the table of `doubles` is made of
        known, question = effects[train].copy(), pose(effects[held], candidates)
        known.layers.clear()
        predicted = {m: np.asarray(MODELS[m]().fit(known).predict(conditions), dtype=float) for m in names}
        predicted['mean of the three'] = np.mean(list(predicted.values()), axis=0)
        galleries = {m: ad.AnnData(X, conditions, effects.var[[]]) for m, X in predicted.items()}
        direct = np.asarray(INVERSE['ridge']().fit(known, rng=generator(repeat, 'ridge')).rank(np.asarray(question.asked.X), listed))
        for mask in ('none', 'all'):
            ways = {}
            for m, gallery in galleries.items():
                metric = whitened(leftover(known, gallery), known.var_names)
                ways[m] = ask(question, gallery, metric, mask)
                ways[f'{m}, length'] = ask(question, gallery, metric, mask, measure=mahalanobis)
            for m in names[:2]: ways[f'{m}, residuals of doubles left out'] = ask(question, galleries[m], whitened(left_out(known, m, generator(repeat, 'folds')), known.var_names), mask)
            ways |= {f'gp_average and {share:g} ridge': even(ways['gp_average']) + share * even(direct) for share in (.1, .3, 1) if mask == 'none'}
            rows += [retrieval_scores(d, question.exact, question.relevant).assign(way=way, mask=mask) for way, d in ways.items()]
    print(f'\n{path.name}: variants of the whitened search, halves {first} to {repeats - 1}, {len(candidates)} candidates')
    print(pd.concat(rows).groupby(['mask', 'way'], sort=False)[SHOWN].mean().round(3).to_string())


def inverse(path, names=('popularity', 'ridge', 'logistic', 'forest', 'boosting', 'dc'), repeats=2):
    effects, rows = read(path), []
    candidates = candidate_genes(effects.obs, pairs=True)
    listed = pd.DataFrame({'targets': [';'.join(genes) for genes in candidates.values()], 'smiles': ''}, index=list(candidates))
    for repeat, (train, held) in enumerate(halves(effects, repeats)):
        known, question = effects[train].copy(), pose(effects[held], candidates)
        for name in names:
            start = time.process_time()
            model = INVERSE[name](**FOR_GENES if name == 'dc' else {}).fit(known, rng=generator(repeat, name))
            scores = retrieval_scores(model.rank(np.asarray(question.asked.X), listed), question.exact, question.relevant)
            rows.append(scores.assign(model=name, seconds=time.process_time() - start))
    print(f"\n{path.name}: inverse models, {repeats} random halves of the doubles, {len(candidates)} candidates; seconds of processor time")
    print(pd.concat(rows).groupby('model', sort=False)[[*SHOWN, 'seconds']].mean().round(3).to_string())


def papalexi(path):
    "Train on two replicates, ask with the third."
    screen = ad.read_h5ad(path)
    target, rep = screen.obs['target'].astype(str).to_numpy(), screen.obs['bio_rep'].astype(str).to_numpy()
    X = log_normalise(screen.X, 'counts')
    X = np.asarray(X.toarray() if hasattr(X, 'toarray') else X, dtype=np.float32)
    untreated = next(t for t in set(target) if t.lower().startswith(('nt', 'non', 'control')))
    targets = sorted(set(target) - {untreated})
    genes, rows, cells_rows = screen.var_names, [], []
    for asked in sorted(set(rep)):
        old, new = rep != asked, rep == asked
        mean = lambda mine, part: X[part & (target == mine)].mean(0)
        known = ad.AnnData(np.array([mean(t, old) - mean(untreated, old) for t in targets]), table(targets), pd.DataFrame(index=genes))
        query = ad.AnnData(np.array([mean(t, new) - mean(untreated, new) for t in targets]), table(targets), pd.DataFrame(index=genes))
        candidates = candidate_genes(known.obs)
        question = pose(query, candidates)
        one, other = (np.array([mean(t, rep == r) - mean(untreated, rep == r) for t in targets]) for r in sorted(set(rep) - {asked}))
        noise = (one - other) / np.sqrt(2)
        cells = X[new] - mean(untreated, new)
        centre = mean(untreated, old)
        for mask in MASKS:
            hidden = hidden_genes(mask, question.query_genes, list(candidates.values()), genes)
            ways = {'pseudobulk cosine': ask(question, known, 'cosine', mask), 'pseudobulk whitened': ask(question, known, whitened(noise, genes), mask),
                    'overlap of strong genes': ask(question, known, mask=mask, measure=lambda q, g, _, h: de_overlap(q, g, 50, h))}
            votes = np.array([cell_votes(cells[target[new] == t], known.X, 5, hidden if hidden.ndim == 1 else hidden[i]) for i, t in enumerate(query.obs['perturbation'])])
            ways['cell vote'] = -votes
            rows += [retrieval_scores(d, question.exact, question.relevant).assign(way=way, mask=mask, query=f'{asked}', target=query.obs['perturbation'].to_numpy()) for way, d in ways.items()]
            if mask == 'own': continue
            shown, fitted = ~hidden, old & (target != untreated)
            model = LogisticRegression(C=.01, max_iter=300).fit((X[fitted] - centre)[:, shown], target[fitted])
            of_cell = cells[(target[new] != untreated)][:, shown]
            truth = target[new][target[new] != untreated]
            place = np.searchsorted(model.classes_, truth)
            exact = np.zeros((len(truth), len(targets)), dtype=bool)
            exact[np.arange(len(truth)), place] = True
            scores = model.decision_function(of_cell)
            chance = np.log(pd.Series(target[fitted]).value_counts().reindex(model.classes_).to_numpy(dtype=float))
            for way, s in (('cells, logistic', scores), ('cells, most frequent first', np.broadcast_to(chance, scores.shape))):
                cells_rows.append(retrieval_scores(-s, exact, exact).mean().to_frame().T.assign(way=way, mask=mask, replicate=asked))
            pooled = np.array([scores[truth == t].mean(0) for t in model.classes_])
            rows.append(retrieval_scores(-pooled, np.eye(len(targets), dtype=bool), np.eye(len(targets), dtype=bool)).assign(way='logistic, mean over cells', mask=mask, query=asked, target=model.classes_))
    rows, metrics = pd.concat(rows, ignore_index=True), ['exact@1', 'exact@5', 'mrr']
    print(f'\n{path.name}: {len(targets)} targets, each replicate asked in turn; chance {1 / len(targets):.3f} / {5 / len(targets):.3f} / {chance_scores(len(targets), [1])["mrr"][0]:.3f}')
    each = rows.groupby(['mask', 'way', 'target'], sort=False)[metrics].mean()
    for key, part in each.groupby(level=['mask', 'way'], sort=False):
        drawn = part.to_numpy()[generator(0, 'bootstrap').integers(len(part), size=(2000, len(part)))].mean(1)
        low, high = np.quantile(drawn, [.025, .975], axis=0)
        third = rows[(rows['query'] == 'rep_3') & (rows['mask'] == key[0]) & (rows['way'] == key[1])][metrics].mean()
        print(f'{key[0]:5} {key[1]:26}', *(f'{m} {v:.3f} [{a:.2f}, {b:.2f}]' for m, v, a, b in zip(metrics, part.mean(), low, high)), ' replicate 3 alone:', *(f'{v:.3f}' for v in third))
    print(pd.concat(cells_rows).groupby(['mask', 'way', 'replicate'], sort=False)[metrics].mean().astype(float).round(3).to_string())


def timed(label, function, *arguments, **named):
    start = time.perf_counter()
    result = function(*arguments, **named)
    print(f'{label:44} {time.perf_counter() - start:6.2f} s', flush=True)
    return result


def sizes(n_genes=2000, n_queries=130, n_cells=20000, n_profiles=8400):
    rng = np.random.default_rng(0)
    perturbed = [f'g{i:04}' for i in range(105)]
    candidates = candidate_genes(table(perturbed), pairs=True)
    genes = pd.DataFrame(index=[f'g{i:04}' for i in range(n_genes)])
    gallery = ad.AnnData(rng.normal(size=(len(candidates), n_genes)).astype(np.float32), table(list(candidates)), genes)
    pairs = np.flatnonzero(gallery.obs['perturbation'].str.contains('+', regex=False))
    asked = gallery[np.sort(rng.choice(pairs, n_queries, replace=False))].copy()
    asked.X = asked.X + rng.normal(size=asked.shape).astype(np.float32)
    known = gallery[pairs[:60]].copy()
    known.X = known.X + rng.normal(size=known.shape).astype(np.float32)
    print(f'{len(candidates)} candidates x {n_queries} queries x {n_genes} genes')
    question = timed('pose the question', pose, asked, candidates)
    start = time.perf_counter()
    for mask in MASKS:
        for name, distance in (('cosine', 'cosine'), ('pearson', 'pearson'), ('euclidean', 'euclidean'), ('whitened', whitened(leftover(known, gallery), known.var_names))):
            found = timed(f'{name}, mask {mask}', ask, question, gallery, distance, mask)
    print(f"{'all twelve together':44} {time.perf_counter() - start:6.2f} s")
    timed('cosine on 20 axes, mask own', ask, question, gallery, leading_axes(known.X, genes=known.var_names), 'own')
    timed('spearman, mask none', ask, question, gallery, 'spearman')
    timed('metrics with ties', retrieval_scores, found, question.exact, question.relevant)
    timed('overlap of 50 strongest, mask own', ask, question, gallery, mask='own', measure=lambda q, g, _, hidden: de_overlap(q, g, 50, hidden))
    del gallery, asked, question, found
    cells, profiles = (rng.normal(size=(n, n_genes)).astype(np.float32) for n in (n_cells, n_profiles))
    timed(f'votes of {n_cells} cells among {n_profiles} profiles', cell_votes, cells, profiles)
    print(f'peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB')


if __name__ == '__main__':
    what = sys.argv[1:] or ['sizes', *(['doubles', 'variants', 'inverse', 'papalexi'] if DATA.exists() else [])]
    if 'sizes' in what: sizes()
    if 'doubles' in what:
        for path in DEFAULT: doubles(path)
    if 'variants' in what: variants(DEFAULT[0])
    if 'inverse' in what:
        for path in DEFAULT: inverse(path)
    if 'papalexi' in what: papalexi(DATA/'papalexi'/'papalexi_lowmoi.h5ad')
