"""L1000: is a drug recognised on the other plate, can an unseen drug be predicted from its structure, and an unseen line from its untreated profile?

    python benchmarks/l1000.py [plates] [drugs] [lines] [--folder FOLDER] [--seed 0] [--folds 10]     all three by default; about a minute

plates   HT115, plate 1 asks plate 2: 305 compounds (pert_id; names merge distinct ones) with one well on each. Values are ranked within each plate, gene by
         gene, and made normal, or left as they are less the plate's mean; neither knows which wells belong together. Whitening is fitted on wells of no asked compound:
         DMSO, or DMSO and the wells whose compound stands on one plate only. Supervised whitening is fitted on pairs of other compounds (folds), and once,
         as a warning, on the pairs that are asked. Every pair lies in the same well on both plates, so a method may recognise the well. Two nulls tell:
         DMSO wells asked for their own position (where they are in the noise that is whitened away, this
         null is no test of it), and how near the neighbouring wells' compounds come (share of other compounds that are farther; .5 where wells do not matter).
drugs    the same compounds: kernel ridge on Morgan fingerprints, compound left out, mean length of the error over the mean's.
lines    14 drugs x 43 lines, line left out; a slope on the control profile, and the same with an independent control of that line: the effect is
         treated - control, so that the noise of the control itself predicts it.
Limits: LIMITS below. Intervals: 95 %, over compounds (plates, drugs) or lines.
"""
import argparse
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.stats import norm, rankdata

from perturb_research.core import generator
from perturb_research.data.whitening import noise_whitening, within
from perturb_research.evaluate.calibration import bootstrap_interval, bootstrap_ratio, sign_flip_p
from perturb_research.evaluate.retrieval import chance_scores, distances, retrieval_scores
from perturb_research.models.baselines import MODELS, shrunk_slopes

LIMITS = {'exact@1': .18, 'exact@10': .46}  # whitened cosine on normal ranks, noise of DMSO and other compounds' wells
FOLDER = Path(__file__).resolve().parents[2]/'shared'/'data'/'l1000'
ASKED = ('exact@1', 'exact@10', 'mrr')


# ---------------------------------------------------------------- plate 1 asks plate 2

class Plates:
    "The screen: values (wells, genes) as `forms`, and which wells are the pairs (2, compounds), DMSO, or neither compound's partner."
    def __init__(self, path):
        screen = ad.read_h5ad(path)
        obs, X = screen.obs, np.asarray(screen.X, dtype=float)
        plates, self.plate = np.unique(obs['rna_plate'].astype(str), return_inverse=True)
        self.control, compound, self.well = obs['control'].to_numpy() == 1, obs['pert_id'].astype(str).to_numpy(), obs['rna_well'].astype(str).to_numpy()
        place = [{c: i for i, c in reversed(list(enumerate(compound))) if self.plate[i] == p and not self.control[i]} for p in (0, 1)]  # the first well where there are two
        self.compounds = sorted(set(place[0]) & set(place[1]))
        self.pairs = np.array([[mine[c] for c in self.compounds] for mine in place])
        self.single = ~np.isin(compound, self.compounds)
        self.obs, ranks, centred = obs, np.empty_like(X), np.empty_like(X)
        for p in range(len(plates)):
            mine = self.plate == p
            ranks[mine] = norm.ppf((rankdata(X[mine], axis=0) - .5) / mine.sum())
            centred[mine] = X[mine] - X[mine & ~self.control].mean(0)
        self.effects = X - np.array([X[(self.plate == p) & self.control].mean(0) for p in (0, 1)])[self.plate]
        self.forms = {'less plate mean': centred, 'normal ranks': ranks}

    def noise(self, values, wells):
        "What `wells` (bool) differ in within their plate and kind."
        return within(values[wells], [f'{p} {c}' for p, c in zip(self.plate[wells], self.control[wells])])


class Pairs:
    "Two-covariance PLDA (Ioffe 2006): between compounds and within them, both from `first` and `second` (compounds, genes) of training compounds."
    def __init__(self, first, second):
        self.white = noise_whitening(within(np.vstack([first, second]), np.tile(np.arange(len(first)), 2)))
        a, b = self.white.apply(first), self.white.apply(second)
        cross = (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)  # noise of the two wells is independent: the covariance of what they share
        w, V = np.linalg.eigh((cross + cross.T) / 2)
        self.b, self.V = w[w > 0], V[:, w > 0]

    def cosine(self, query, gallery): return distances(self.white.apply(query), self.white.apply(gallery))

    def plda(self, query, gallery):
        "Minus the log likelihood ratio of one compound against two (q, c)."
        x, y, b = self.white.apply(query) @ self.V, self.white.apply(gallery) @ self.V, self.b
        own = b**2 / ((1 + b) * (1 + 2 * b)) / 2
        return (x**2 @ own)[:, None] + y**2 @ own - (x * (b / (1 + 2 * b))) @ y.T


def methods(screen, seed, folds):
    "`(form, method, distance of plate 1's compounds to plate 2's, the same measure for any two sets of wells)`."
    first, second = screen.pairs
    fold = generator(seed, 'l1000', 'folds').permutation(len(screen.compounds)) % folds
    for form, values in screen.forms.items():
        plain = {'cosine': distances, 'spearman': lambda q, g: distances(q, g, 'spearman')}
        for label, wells in (('DMSO', screen.control), ('other compounds', screen.single & ~screen.control), ('other compounds, DMSO', screen.single)):
            white = noise_whitening(screen.noise(values, wells))
            plain[f'whitened by {label}'] = lambda q, g, white=white: distances(white.apply(q), white.apply(g))
        for name, measure in plain.items(): yield form, name, measure(values[first], values[second]), measure
        fitted = {f: Pairs(values[first[fold != f]], values[second[fold != f]]) for f in range(folds)}
        every = Pairs(values[first], values[second])
        for kind in ('cosine', 'plda'):
            found = np.empty((len(first), len(first)))
            for f, model in fitted.items(): found[fold == f] = getattr(model, kind)(values[first[fold == f]], values[second])
            yield form, f'supervised {kind}, other pairs', found, getattr(every, kind)  # wells of DMSO are in no pair
            yield form, f'supervised {kind}, the asked pairs', getattr(every, kind)(values[first], values[second]), getattr(every, kind)


def neighbours(well):
    "Which wells touch, by row or column (n, n)."
    row, column = np.array([ord(w[0]) for w in well]), np.array([int(w[1:]) for w in well])
    return abs(row[:, None] - row) + abs(column[:, None] - column) == 1


def dmso_position(screen, values, measure):
    "Reciprocal rank and top-1 of each DMSO well's own position among the other plate's DMSO wells, both ways, and their expectation by chance."
    rows = []
    for p in (0, 1):
        mine, other = (np.flatnonzero(screen.control & (screen.plate == side)) for side in (p, 1 - p))
        mine = mine[np.isin(screen.well[mine], screen.well[other])]
        same = screen.well[mine][:, None] == screen.well[other]
        rows.append(retrieval_scores(measure(values[mine], values[other]), same, same)[['exact@1', 'mrr']].assign(
            **chance_scores(len(other), np.ones(len(mine), int))[['exact@1', 'mrr']].add_prefix('chance ')))
    return pd.concat(rows)


def ask_plates(args):
    screen = Plates(args.folder/'l1000_ht115_355drugs.h5ad')
    n, right = len(screen.compounds), np.eye(len(screen.compounds), dtype=bool)
    same_well = (screen.well[screen.pairs[0]] == screen.well[screen.pairs[1]]).mean()
    print(f"plates: {n} compounds on both, {same_well:.0%} of them in the same well; {screen.control.sum()} DMSO wells, {screen.single.sum() - screen.control.sum()} wells of other compounds")
    near = neighbours(screen.well[screen.pairs[0]])
    base, rows = {}, []
    chance = chance_scores(n, np.ones(n, int))
    rows.append(dict(form='', method='chance', **chance[list(ASKED)].mean()))
    for form, name, found, measure in methods(screen, args.seed, args.folds):
        scores = retrieval_scores(found, right, right)
        base.setdefault(form, scores)
        rng = generator(args.seed, 'l1000', form, name)
        row = dict(form=form, method=name)
        for metric in ASKED:
            low, high = bootstrap_interval(scores[metric], rng)
            row |= {metric: scores[metric].mean(), f'{metric}, 95 %': f'{low:.3f}-{high:.3f}'}
        gain = (scores['exact@10'] - base[form]['exact@10']).to_numpy()
        low, high = bootstrap_interval(gain, rng)
        row['@10 - cosine'] = f'{gain.mean():+.3f} [{low:+.3f}, {high:+.3f}]'
        farther = np.array([(found[i][~near[i] & ~right[i]][None] > found[i][near[i]][:, None]).mean() for i in np.flatnonzero(near.any(1))])
        low, high = bootstrap_interval(farther, rng)
        row['neighbours farther'] = f'{farther.mean():.3f} [{low:.3f}, {high:.3f}]'
        null = dmso_position(screen, screen.forms[form], measure)
        row |= {'DMSO @1': null['exact@1'].mean(), 'chance @1': null['chance exact@1'].mean(), 'DMSO mrr': null['mrr'].mean(), 'chance mrr': null['chance mrr'].mean(),
                'DMSO p': float(sign_flip_p((null['mrr'] - null['chance mrr']).to_numpy(), rng)[0])}
        rows.append(row)
    table = pd.DataFrame(rows)
    print(table.round(3).fillna('').to_string(index=False))
    white = table[(table['form'] == 'normal ranks') & (table['method'] == 'whitened by other compounds, DMSO')].iloc[0]
    met = all(white[k] >= limit for k, limit in LIMITS.items())
    print(f"limit: {white['exact@1']:.3f} / {white['exact@10']:.3f} of whitened cosine on normal ranks, expected at least {LIMITS['exact@1']} / {LIMITS['exact@10']}: {'met' if met else 'NOT met'}")
    return met


# ---------------------------------------------------------------- a drug never seen

def ask_drugs(args):
    screen = Plates(args.folder/'l1000_ht115_355drugs.h5ad')
    first, second = (screen.effects[rows] for rows in screen.pairs)
    obs = screen.obs.iloc[screen.pairs[0]]
    conditions = pd.DataFrame(dict(perturbation=screen.compounds, perturbation_type='drug', context='HT115', dose=obs['dose'].to_numpy(float), time_h=6., smiles=obs['SMILES'].astype(str).to_numpy()),
                              index=screen.compounds)
    effects = ad.AnnData(((first + second) / 2).astype('float32'), conditions, pd.DataFrame(index=[f'gene{i}' for i in range(first.shape[1])]))
    fold = generator(args.seed, 'l1000', 'drugs').permutation(len(conditions)) % args.folds
    error = pd.DataFrame(index=screen.compounds, columns=['no_change', 'mean', 'nearest', 'ridge', 'kernel'], dtype=float)
    for f in range(args.folds):
        train, asked = effects[fold != f], effects[fold == f]
        for name in error: error.loc[asked.obs_names, name] = np.linalg.norm(MODELS[name]().fit(train, rng=generator(args.seed, name)).predict(asked.obs) - asked.X, axis=1)
    error['noise alone'] = np.linalg.norm(first - second, axis=1) / 2
    print(f"drugs: {len(error)} compounds left out in {args.folds} folds; mean length of the error over the mean's")
    for name in error:
        low, high = bootstrap_ratio(error[name], error['mean'], generator(args.seed, 'l1000', 'drugs', name))
        print(f"  {name:12} {error[name].mean() / error['mean'].mean():.3f} [{low:.3f}, {high:.3f}]")
    return True


# ---------------------------------------------------------------- a line never seen

def partner_controls(line, control):
    "For each row, the mean of the other controls (rows, genes) measured in its line; NaN where there is none, or only copies of its own."
    found = np.full_like(control, np.nan)
    for i, c in enumerate(control):
        others = np.flatnonzero(line == line[i])
        others = others[abs(control[others] - c).max(1) > 1e-6]
        if len(others): found[i] = np.unique(control[others], axis=0).mean(0)
    return found


def with_slope(train, asked, effect, control):
    "Mean effect of the rows `train` plus a gene-wise slope on the control profile, its size chosen on left-out training rows."
    A, Y = control[train] - control[train].mean(0), effect[train] - effect[train].mean(0)
    return effect[train].mean(0) + shrunk_slopes(A, Y)[0] * (control[asked] - control[train].mean(0))


def ask_lines(args):
    screen = ad.read_h5ad(args.folder/'l1000_14drugs_43lines.h5ad')
    line, drug = (screen.obs[c].astype(str).to_numpy() for c in ('cell', 'smiles'))
    control, effect = np.asarray(screen.layers['control'], float), np.asarray(screen.layers['treated'] - screen.layers['control'], float)
    partner = partner_controls(line, control)
    known = np.isfinite(partner).all(1)
    names = ['no change', 'mean', 'drug mean', 'slope on its control', 'mean, same rows', 'slope on its control, same rows', 'slope on another control of the line']
    error = pd.DataFrame(index=range(len(line)), columns=names, dtype=float)
    for held in sorted(set(line)):
        asked, train = line == held, line != held
        mean = effect[train].mean(0)
        drugs = np.array([effect[train & (drug == d)].mean(0) if (train & (drug == d)).any() else mean for d in drug[asked]])
        guesses = [0 * drugs, np.tile(mean, (asked.sum(), 1)), drugs, with_slope(train, asked, effect, control)]
        for name, guess in zip(names, guesses): error.loc[asked, name] = np.linalg.norm(guess - effect[asked], axis=1)
        if (asked & known).any():
            error.loc[asked & known, names[4]] = np.linalg.norm(effect[train & known].mean(0) - effect[asked & known], axis=1)
            for name, profile in zip(names[5:], (control, partner)):
                error.loc[asked & known, name] = np.linalg.norm(with_slope(train & known, asked & known, effect, profile) - effect[asked & known], axis=1)
    print(f"lines: {len(line)} rows of {len(set(line))} lines, line left out; mean length of the error over the drug mean's; the last three: {known.sum()} rows of {len(set(line[known]))} lines with a second control")
    for name in names:
        rows = error[name].notna().to_numpy()
        mine, base = (error.loc[rows, column].groupby(line[rows]).sum() for column in (name, 'drug mean'))
        low, high = bootstrap_ratio(mine, base, generator(args.seed, 'l1000', 'lines', name))
        print(f"  {name:38} {mine.sum() / base.sum():.3f} [{low:.3f}, {high:.3f}]")
    return True


PARTS = {'plates': ask_plates, 'drugs': ask_drugs, 'lines': ask_lines}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', choices=[*PARTS, []], default=[], help='which questions; all by default')
    parser.add_argument('--folder', type=Path, default=FOLDER, help='where the two files are')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--folds', type=int, default=10)
    args = parser.parse_args()
    sys.exit(0 if all([PARTS[part](args) for part in args.parts or PARTS]) else 1)
