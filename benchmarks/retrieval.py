"""Seconds of the parts of reverse retrieval at the size of Norman's full grid; run by hand: `python benchmarks/retrieval.py`."""
import time

import anndata as ad
import numpy as np
import pandas as pd

from perturb_research.evaluate.retrieval import MASKS, ask, candidate_genes, cell_votes, de_overlap, pose, retrieval_scores

N_GENES, N_QUERIES, N_CELLS = 2000, 100, 2000


def timed(label, function, *arguments, **named):
    start = time.perf_counter()
    result = function(*arguments, **named)
    print(f'{label:34} {time.perf_counter() - start:6.2f} s', flush=True)
    return result


def table(names): return pd.DataFrame({'perturbation': names, 'perturbation_type': 'CRISPRa', 'context': 'x', 'dose': np.nan}, index=list(names))


rng = np.random.default_rng(0)
perturbed = [f'g{i:04}' for i in range(104)]
candidates = candidate_genes(table(perturbed), pairs=True)
genes = pd.DataFrame(index=[f'g{i:04}' for i in range(N_GENES)])
gallery = ad.AnnData(rng.normal(size=(len(candidates), N_GENES)).astype(np.float32), table(list(candidates)), genes)
doubles = np.flatnonzero(gallery.obs['perturbation'].str.contains('+', regex=False))
asked = gallery[np.sort(rng.choice(doubles, N_QUERIES, replace=False))].copy()
asked.X = asked.X + rng.normal(size=asked.shape).astype(np.float32)

print(f'{len(candidates)} candidates x {N_QUERIES} queries x {N_GENES} genes')
question = timed('pose the question', pose, asked, candidates)
start = time.perf_counter()
for mask in MASKS:
    for distance in ('cosine', 'pearson', 'euclidean'): found = timed(f'{distance}, mask {mask}', ask, question, gallery, distance, mask)
print(f"{'all nine together':34} {time.perf_counter() - start:6.2f} s")
timed('spearman, mask none', ask, question, gallery, 'spearman')
timed('metrics with ties', retrieval_scores, found, question.exact, question.relevant)
timed('overlap of 50 strongest, mask own', ask, question, gallery, mask='own', measure=lambda q, g, _, hidden: de_overlap(q, g, 50, hidden))
timed(f'votes of {N_CELLS} cells', cell_votes, rng.normal(size=(N_CELLS, N_GENES)).astype(np.float32), gallery.X)
