"""The leaderboard: seeds are one row, strangers appear, differences are in the unit of their column, and nothing is read into chance."""
import json

import numpy as np
import pandas as pd
import pytest
from conftest import run_notebook

from perturb_research.report import against, difference_table, forward_table, p_text, page, reference_table, split_words, stratum_words


def scores(errors, metric='l2', split='doubles.s0', stratum='combo_seen2', seed=0):
    "Long table of a DataFrame conditions x models."
    table = errors.rename_axis('condition').melt(var_name='model', ignore_index=False).reset_index()
    return table.assign(dataset='toy', split=split, stratum=stratum, seed=seed, metric=metric)


def panel(n=30, seed=0, **factors):
    "Errors of models that are a multiple of what the mean leaves, with a little of their own."
    rng = np.random.default_rng(seed)
    hard = rng.gamma(4, 1, size=n)
    return pd.DataFrame({model: hard * f * (1 + .03 * rng.normal(size=n)) for model, f in factors.items()}, index=[f'P{i:02d}' for i in range(n)])


def test_forward_table_is_relative_and_keeps_every_name():
    errors = panel(mean=1, my_model=.8)
    table = forward_table(pd.concat([scores(errors), scores(1 - errors / 10, 'pearson_centred')]), np.random.default_rng(0), 200).set_index(['model', 'measure'])
    one = table.loc[('my_model', 'relative L2')]
    assert one['value'] == pytest.approx(errors['my_model'].mean() / errors['mean'].mean()) and one['low'] < one['value'] < one['high'] < .85 and one['n'] == 30
    assert table.loc[('mean', 'relative L2'), ['value', 'low', 'high']].tolist() == [1, 1, 1]
    assert table.loc[('my_model', 'pearson centred'), 'value'] == pytest.approx(1 - errors['my_model'].mean() / 10)


def test_seeds_are_one_row_and_widen_the_interval():
    first = panel(mean=1, kernel=.8)
    runs = [scores(first)] + [scores(first[['kernel']] * f, seed=k) for k, f in enumerate((.8, 1.2, .9, 1.1), 1)]
    one, five = (forward_table(t, np.random.default_rng(0), 400).set_index('model').loc['kernel'] for t in (runs[0], pd.concat(runs)))
    assert five['seeds'] == 5 and one['seeds'] == 1 and five['n'] == one['n'] == 30
    assert five['value'] == pytest.approx(one['value']) and five['high'] - five['low'] > 5 * (one['high'] - one['low'])


def test_against_takes_one_truth():
    table = pd.concat([scores(panel(mean=1), m) for m in ('l2', 'l2@half2', 'rmse', 'pearson_centred@half2')])
    assert set(against(table)['metric']) == {'l2'} and set(against(table, '@half2')['metric']) == {'l2', 'pearson_centred'}
    assert forward_table(table[table['metric'] == 'l2'], np.random.default_rng(0), 10, suffix='@half2').empty


def test_differences_are_in_the_unit_of_the_leaderboard():
    errors = panel(n=40, mean=1, additive=.9, good=.7, bad=1.2, ceiling=.1)
    table = pd.concat([scores(errors), scores(1 - errors / 10, 'pearson_centred'), scores(panel(n=40, seed=1, good=1), stratum='without a naive row')])
    got = difference_table(table, np.random.default_rng(0), 200).set_index(['measure', 'model'])
    assert set(got['stratum']) == {'combo_seen2'} and set(got['baseline']) == {'additive'} and set(got.index.get_level_values('model')) == {'good', 'bad'}
    gain = (errors['additive'] - errors['good']).mean()
    one = got.loc[('relative L2', 'good')]
    assert one['difference'] == pytest.approx(gain / errors['mean'].mean()) and one['difference_low'] < one['difference'] < one['difference_high']
    assert got.loc[('pearson centred', 'good'), 'difference'] == pytest.approx(gain / 10)
    assert (got['p_adjusted'] < .01).all() and (got['difference'].xs('bad', level='model') < 0).all() and 0 < one['detectable'] < .1


def test_differences_of_nothing_are_nothing():
    assert difference_table(scores(panel(mean=1, no_change=1.1)), np.random.default_rng(0)).empty
    few = difference_table(scores(panel(n=3, mean=1, good=.5)), np.random.default_rng(0), 10).iloc[0]
    assert np.isinf(few['detectable']) and few['p'] == .25


def test_reference_table():
    errors = panel(mean=1, half=.5, model=.75)
    references = pd.concat([scores(errors[[m]]).assign(row=row) for m, row in (('mean', 'mean'), ('half', 'replicate'))])
    got = reference_table(scores(errors), references).set_index('model')
    left = errors['half'].mean() / errors['mean'].mean()
    np.testing.assert_allclose(got[['null', 'ceiling', 'drf', 'bds']].astype(float), np.tile([1, left, 1 - left, 1], (3, 1)))
    assert got.loc['mean', 'scaled'] == 0 and got.loc['half', 'scaled'] == 1
    assert got.loc['model', 'scaled'] == pytest.approx((errors['model'] - errors['mean']).mean() / (errors['half'] - errors['mean']).mean())
    worse = reference_table(scores(errors), references.assign(value=references['value'] * np.where(references['row'] == 'mean', 1, 3)))
    assert worse['scaled'].isna().all() and (worse['drf'] < 0).all()


def test_words():
    assert split_words('context.s0') == 'contexts' and split_words('kfold.s3', ['kfold.s0', 'kfold.s3']) == 'kfold, seed 3' and split_words('stranger') == 'stranger'
    assert stratum_words('combo_seen0') == 'neither seen' and stratum_words('dose_unseen') == 'dose unseen' and stratum_words('reverse, mask own') == 'reverse, own'
    assert [p_text(p) for p in (1e-5, .0123, 1., np.nan)] == ['< 0.001', '0.012', '1.000', '']
    assert '&lt; 0.001' in page('t', [], pd.DataFrame({'p': [p_text(1e-4)]}))


def test_report_of_strangers(tmp_path):
    "Names that no registry knows, several seeds, no retrieval and no references: all are shown, and the page is made."
    folder = tmp_path/'data'/'results'/'toy'
    (folder/'combination.s0').mkdir(parents=True)
    (folder/'splits.json').write_text(json.dumps([dict(name='combination.s0', kind='combination', seed=0, hash='0', path='0.json')]))
    errors = panel(mean=1, no_change=1.1, kernel=.9, zebra=.8, ant=.5)
    for model in errors:
        for seed in range(3 if model == 'zebra' else 1):
            parts = [scores(errors[[model]] * (1 + .05 * seed), seed=seed), scores(1 - errors[[model]] / 20, 'pearson_centred', seed=seed), scores(1 - errors[[model]] / 20, 'centroid_accuracy', seed=seed)]
            pd.concat(parts).assign(split='combination.s0').to_parquet(folder/'combination.s0'/f'{model}.s{seed}.metrics.parquet')
    done = run_notebook('15_report', tmp_path, dataset='toy', draws=50)
    assert done.returncode == 0, done.stderr[-3000:]
    board = pd.read_csv(folder/'leaderboard.csv').query("measure == 'relative L2'").set_index('model')
    assert set(board.index) == set(errors) and board.loc['zebra', 'seeds'] == 3 and board.loc['ant', 'p_adjusted'] < .01 and board['scaled'].isna().all()
    plotted = pd.read_csv(tmp_path/'figures'/'toy'/'model_differences.csv')
    assert set(plotted['model']) == {'kernel', 'zebra', 'ant'} and set(plotted['baseline']) == {'mean'}
    assert 'zebra' in (folder/'report.html').read_text() and (tmp_path/'figures'/'toy'/'forward_against_reverse.note.txt').exists()
