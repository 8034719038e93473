"""Gaussian-process family: held-out doubles, genes never perturbed, and the time of a gallery.

    python benchmarks/gaussian.py [doubles] [unseen] [sources] [gallery]        default: doubles unseen gallery

`doubles`: as in benchmarks/doubles.py, on the Norman and CaRPool effects beside the project, if they are there; `unseen`: Norman, 15 random splits by
gene, L2 relative to the training mean by what is new, with side information from Hallmark, CollecTRI and the genetic-interaction map on growth, and with
that information's genes exchanged; `sources`: the same source by source, 5 splits; `gallery`: seconds for all singles and pairs. Intervals: 95 % bootstrap
over conditions, each averaged over its splits. Hyper-parameters are chosen inside training; the family of models was chosen on these two files.
"""
import sys
import time

import numpy as np
import pandas as pd
from doubles import DATA, DEFAULT, halves, measure, read, table

from perturb_research.core import generator
from perturb_research.data.priors import gather, perturbed_genes
from perturb_research.data.splits import make_split, strata
from perturb_research.models.baselines import MODELS, candidates
from perturb_research.models.gaussian import FAMILY, Average

MODELS |= {m.name: m for m in FAMILY}
DOUBLES = 'additive', 'kernel', 'gp_slopes', 'gp_joint', 'multi_kernel', 'gp_average'
SOURCES = DATA/'graphs'/'hallmark.gmt', DATA/'graphs'/'collectri_signed.tsv', DATA/'norman'/'norman_fitness_gi_map.csv'


def unseen(effects, priors, models, seeds):
    "Long table of the errors of `models` (name -> class and options) on the test conditions of splits by gene."
    rows = []
    for seed in seeds:
        split = make_split(effects, 'combination', seed)
        train, test = split.train(effects), split.test(effects)
        stratum = strata(train.obs, test.obs)
        for name, (make, options) in models.items():
            start, known = time.perf_counter(), priors.permuted(generator(seed, name)) if make.permuted else priors
            predicted = make(**options).fit(train, priors=known, rng=generator(seed, name)).predict(test.obs)
            seconds, error = time.perf_counter() - start, np.linalg.norm(predicted - test.X, axis=1)
            rows += [dict(model=name, stratum=stratum[c], condition=c, error=e, r=np.corrcoef(p, t)[0, 1], seconds=seconds)
                     for c, e, p, t in zip(test.obs_names, error, predicted, test.X)]
    return pd.DataFrame(rows)


def against(rows, reference, draws=2000):
    "By stratum and model: mean error over that of `reference` on the same conditions, with its interval, and the mean correlation."
    found = []
    for stratum, part in rows.groupby('stratum', sort=False):
        error, r = (part.groupby(['condition', 'model'])[c].mean().unstack() for c in ('error', 'r'))
        drawn = generator(0, stratum).integers(len(error), size=(draws, len(error)))
        for model in part['model'].unique():
            means = error[[model, reference]].to_numpy()[drawn].mean(1)
            low, high = np.quantile(means[:, 0] / means[:, 1], [.025, .975])
            found.append(dict(stratum=stratum, model=model, ratio=error[model].mean() / error[reference].mean(), low=low, high=high, Pearson=r[model].mean(),
                              conditions=len(error), seconds=part.loc[part['model'] == model, 'seconds'].mean()))
    return pd.DataFrame(found).set_index(['stratum', 'model']).round(3)


def norman():
    "The Norman effects with what `make_split` asks for, and priors on its genes."
    effects = read(DEFAULT[0])
    effects.uns['dataset_id'] = 'norman'
    return effects, gather(SOURCES, effects.var_names, perturbed_genes(effects.obs))


if __name__ == '__main__':
    asked = sys.argv[1:] or ['doubles', 'unseen', 'gallery']
    if not DEFAULT[0].exists(): sys.exit(f'no effects files (looked for {DEFAULT[0]})')
    if 'doubles' in asked:
        for path in DEFAULT:
            print(f'\n{path.name}: 10 random halves of the doubles held out, L2 relative to additive\n{table(measure(read(path), DOUBLES)).to_string()}')
    if 'unseen' in asked:
        effects, priors = norman()
        rows = unseen(effects, priors, {name: (MODELS[name], {}) for name in ('mean', 'additive', 'gp_joint', 'gp_prior', 'gp_prior_permuted')}, range(15))
        print(f"\n15 random splits by gene, L2 relative to the training mean\n{against(rows, 'mean').to_string()}")
        print(f"\nrelative to permuted side information\n{against(rows[rows['model'].isin(['gp_prior', 'gp_prior_permuted'])], 'gp_prior_permuted').to_string()}")
    if 'sources' in asked:
        effects, priors = norman()
        one = {f'{word}{source}': (MODELS[name], dict(only=(source,))) for source in (*dict.fromkeys([*priors.graphs, *priors.similarity(['KLF1'])]), 'symbol family', 'co-response')
               for word, name in (('', 'gp_prior'), ('permuted ', 'gp_prior_permuted'))}
        print(f"\n5 random splits by gene, L2 relative to the training mean\n{against(unseen(effects, priors, dict(mean=(MODELS['mean'], {})) | one, range(5)), 'mean').to_string()}")
    if 'gallery' in asked:
        effects = read(DEFAULT[0])
        train = effects[next(halves(effects))[0]]
        model, gallery = Average().fit(train), candidates(train.obs)
        start, own = time.perf_counter(), time.process_time()
        model.predict(gallery)
        print(f'\ngallery: {len(gallery)} conditions, {effects.n_vars} genes, {time.perf_counter() - start:.2f} s, {time.process_time() - own:.2f} s of a processor')
