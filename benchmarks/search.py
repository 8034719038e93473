"""Seconds of one query from effect to list over 380 drugs, on the embedded screen of drugs or on your own.

    python benchmarks/search.py [EFFECTS.h5ad] [--drugs 380] [--k 50] [--epochs 2] [--repeats 5]

EFFECTS: effects of a screen of drugs, by default data/processed/sim_drugs/effects.h5ad, simulated into a temporary folder where missing. Models are trained for a
few epochs, which changes nothing in the time of a query. A screen with fewer drugs is filled up with unmeasured ones, whose structures are those of measured ones
with up to nine carbons more: every structure is new. `first` is the first query after loading, in which structures are read; `next` the median of further ones.
Limit: LIMIT seconds for the first.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from perturb_research.core import generator, output_root, project_root
from perturb_research.data.splits import make_split
from perturb_research.drugs.candidate import INVERSE, catalogue
from perturb_research.drugs.response import Response
from perturb_research.drugs.search import Informed, search, tried

LIMIT = 2.


def effects_of(path):
    "Effects in `path`, else of the embedded screen."
    path = Path(path) if path else output_root()/'data'/'processed'/'sim_drugs'/'effects.h5ad'
    if path.exists(): return ad.read_h5ad(path)
    with tempfile.TemporaryDirectory() as out:
        nbs = project_root()/'nbs'
        for name in ('01_data.simulate', '03_data.chembl', '04_data.preprocess'):
            command = [sys.executable, '-m', 'papermill', str(nbs/f'{name}.ipynb'), f'{out}/{name}.ipynb', '-k', 'python3', '--cwd', str(nbs), '--no-progress-bar', '-p', 'dataset', 'sim_drugs']
            subprocess.run(command, env=os.environ | {'PERTURB_OUT': out}, check=True, stderr=subprocess.DEVNULL)
        return ad.read_h5ad(f'{out}/data/processed/sim_drugs/effects.h5ad')


def filled_up(drugs, n):
    "`drugs` and unmeasured ones, `n` in all."
    more = [(f'{name} +{length}', 'C' * length + smiles, targets) for length in range(1, 10) for name, smiles, targets in drugs[drugs['smiles'] != ''].itertuples()]
    return pd.concat([drugs, pd.DataFrame(more, columns=['name', 'smiles', 'targets']).set_index('name')]).iloc[:max(n, len(drugs))]


def seconds(ask):
    "Seconds by the clock and of the processor."
    start, busy = time.perf_counter(), time.process_time()
    ask()
    return np.array([time.perf_counter() - start, time.process_time() - busy])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('effects', nargs='?', default='')
    parser.add_argument('--drugs', type=int, default=380)
    parser.add_argument('--k', type=int, default=50)
    parser.add_argument('--epochs', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    effects = effects_of(args.effects)
    split = make_split(effects, 'replicate')
    train, test = split.train(effects), split.test(effects)
    fitted = [make(epochs=args.epochs).fit(train, val=split.val(effects), rng=generator(0, make.name)) for make in (INVERSE['dc'], Response)]
    inverse, forward = fitted[0], Informed(fitted[1], train)
    known = catalogue(effects.obs)[0]
    drugs = filled_up(known, args.drugs)
    doses = sorted(set(effects.obs['dose']))[-5:]
    rows = np.argsort(-np.linalg.norm(test.X, axis=1), kind='stable')[:args.repeats + 1]
    asked = [(pd.Series(np.asarray(test.X[i], dtype=float), test.var_names), str(test.obs['context'].iloc[i])) for i in rows]
    queries = [lambda q=q, line=line: search(q, inverse, forward, drugs, line, doses, args.k) for q, line in asked]
    first, later = seconds(queries[0]), np.median([seconds(q) for q in queries[1:]], axis=0)
    q, line = asked[0]
    alone = {'DC alone': seconds(lambda: inverse.rank(q.to_numpy()[None], drugs)), 'RP alone': seconds(lambda: tried(q.to_numpy(), forward, drugs, line, doses))}
    print(f'{len(drugs)} drugs ({len(drugs) - len(known)} unmeasured), {len(doses)} doses, {train.n_vars} genes, k = {args.k}; seconds by the clock (of the processor)')
    for way, spent in ({'DC -> RP, first query': first, 'DC -> RP, next': later} | alone).items(): print(f'  {way:22} {spent[0]:.2f} ({spent[1]:.2f})')
    print(f"limit {LIMIT:g} s for the first: {'met' if first[0] <= LIMIT else 'NOT met'}")
    sys.exit(bool(first[0] > LIMIT))
