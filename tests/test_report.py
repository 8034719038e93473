"""The leaderboard: seeds are one row, strangers appear, differences are in the unit of their column, and nothing is read into chance; which metric foretells the reverse task; the page in a browser."""
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_here
from scipy.stats import spearmanr

from perturb_research.core import Problem
from perturb_research.models.baselines import MODELS
from perturb_research.page import SCRIPT, card, page
from perturb_research.report import (
    COMPARED, FEW, against, agreement_table, both_ways, difference_table, extremes, few_words, forward_table, headline, marked, model_facts, models_behind, of_split, one_ranking, one_truth, p_text, paired,
    rank_agreement, ranked, reference_table, said, split_words, stratum_words, with_panel)


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
    run_here('15_report', tmp_path, dataset='toy', draws=50)
    board = pd.read_csv(folder/'leaderboard.csv').query("measure == 'relative L2'").set_index('model')
    assert set(board.index) == set(errors) and board.loc['zebra', 'seeds'] == 3 and board.loc['ant', 'p_adjusted'] < .01 and board['scaled'].isna().all()
    plotted = pd.read_csv(tmp_path/'figures'/'toy'/'model_differences.csv')
    assert set(plotted['model']) == {'kernel', 'zebra', 'ant'} and set(plotted['baseline']) == {'mean'}
    assert 'zebra' in (folder/'report.html').read_text() and (tmp_path/'figures'/'toy'/'forward_against_reverse.note.txt').exists()


def test_the_best_is_marked_and_who_cannot_be_told_from_it():
    table = pd.DataFrame(dict(split='s', stratum='x', truth='full', measure='relative L2', model=['a', 'b', 'c', 'd', 'ceiling'], value=[.7, .7 + 1e-9, .8, .9, .5], low=[.6, .6, .65, .85, .4], high=1., n=9))
    assert marked(table).tolist() == ['best', 'best', 'close', '', '']
    assert marked(table.assign(measure='mrr', low=.89)).tolist() == ['close'] * 3 + ['best', '']
    assert marked(table.assign(n=1)).tolist() == [''] * 5 and marked(table.assign(value=np.nan)).tolist() == [''] * 5
    assert marked(table.assign(measure='pearson centred', value=[-.7, -.7, -.8, -.9, 0], low=-.9, high=-.65)).tolist() == ['best', 'best', 'close', 'close', '']


def screen(n=40, models='abcdef', seed=0, metrics=('l2', 'pearson'), noise=1.):
    "Forward, reverse and references in which model f is best; `l2` orders the models as the reverse task does, `pearson` the other way round."
    rng, rows = np.random.default_rng(seed), [f'P{i:02d}|x' for i in range(n)]
    quality = np.arange(len(models))
    side = lambda sign: pd.DataFrame(sign * quality + noise * rng.normal(size=(n, len(models))), rows, list(models))
    forward = pd.concat({m: side(-1) for m in metrics} | {'l2@half2': side(-1)}, axis=1)
    references = pd.concat({'l2': pd.DataFrame(dict(mean=1., replicate=-8.), rows)}, axis=1)
    return forward, pd.concat({'none': side(1), 'all': side(1)}, axis=1), references


def test_rank_agreement_is_spearman_whatever_the_last_digits():
    rng = np.random.default_rng(0)
    f, r = rng.normal(size=(2, 1, 20))
    r[0, :4] = r[0, 0]
    assert rank_agreement([(ranked(f), ranked(r))])[0] == pytest.approx(spearmanr(f[0], r[0]).statistic)
    shaken = lambda x: x * (1 + 1e-12 * rng.normal(size=x.shape))
    assert rank_agreement([(ranked(shaken(f)), ranked(shaken(r)))])[0] == rank_agreement([(ranked(f), ranked(r))])[0]
    assert rank_agreement([(ranked(f), ranked(r)), (ranked(f), ranked(-r))])[0] == pytest.approx(0, abs=1e-12)  # ranks of two splits put together
    assert np.isnan(rank_agreement([(ranked(f[:, :2]), ranked(r[:, :2]))])).all() and np.isnan(rank_agreement([(ranked(f), ranked(0 * r))])).all()


def test_agreement_of_metrics_with_the_reverse_task():
    own, other = screen(), screen(seed=1)
    table = agreement_table({('toy', 'doubles.s0'): own, ('other', 'doubles.s0'): other}, ['none', 'all'], draws=200)
    one = table[(table['models'] == 'all') & (table['mask'] == 'none')].set_index(['dataset', 'metric'])
    assert (one['rho'].xs('l2', level='metric') > .9).all() and (one['rho'].xs('pearson', level='metric') < -.9).all() and set(one.index.get_level_values('dataset')) == {'toy', 'other', 'all'}
    row = one.loc[('toy', 'l2')]
    assert row['low'] <= row['rho'] <= row['high'] and row['n_models'] == 6 and row['n'] == 40 and row['drf'] == 1 and .8 < row['steadiness'] <= 1 and one.loc[('all', 'l2'), 'n'] == 80
    again = agreement_table({('toy', 'doubles.s0'): own}, ['none'], draws=200).set_index(['models', 'metric'])
    assert again.loc[('all', 'l2'), ['rho', 'low', 'high']].tolist() == row[['rho', 'low', 'high']].tolist()  # whatever stands beside it


def test_models_that_know_nothing_can_make_the_agreement():
    "Two naive rows far below the rest: a correlation over all models, none among those that are asked anything."
    models, index = ['no_change', 'mean', 'u', 'v', 'w', 'x'], [f'P{i}|x' for i in range(200)]
    rng = np.random.default_rng(1)
    forward = pd.concat({'l2': pd.DataFrame(rng.normal(size=(200, 6)) + [9, 9, 0, 1, 2, 3], index, models)}, axis=1)
    reverse = pd.concat({'none': pd.DataFrame(rng.normal(size=(200, 6)) + [-9, -9, 2, 0, 3, 1], index, models)}, axis=1)
    got = agreement_table({('toy', 's'): (forward, reverse, None)}, ['none'], draws=50).set_index('models')['rho']
    assert got['all'] > .5 and abs(got['informed']) < .5


def test_who_counts_in_forward_against_reverse(tmp_path):
    "The replicate, a permuted prior and a model that skipped conditions do not; doubles come first; what is not there is no error here."
    folder = tmp_path/'toy'
    assert both_ways(folder) == {}
    write_toy(folder, replicate=True)
    found = both_ways(folder)
    assert list(found) == ['doubles.s0', 'replicate.s0'] and set(found['doubles.s0'][0]['l2']) == {'mean', 'additive', 'one', 'two', 'lazy'}
    f, r = paired(*found['doubles.s0'][:2], 'l2', 'none')
    assert set(f) == set(r) == {'mean', 'additive', 'one', 'two'} and len(f) == 20 and (f.to_numpy() < 0).all()
    assert paired(*found['doubles.s0'][:2], 'l2', 'own') is None and paired(*found['doubles.s0'][:2], 'mae', 'none') is None


def test_scaling_brings_splits_into_one_ranking():
    f, r, references = screen()
    other = pd.concat({'l2@half2': f['l2@half2'] + 50}, axis=1), r, references + 50
    got = one_ranking({('toy', 's'): (f, r, references), ('toy', 't'): other}, ['none'], draws=50).set_index('scale')['rho']
    assert got['scaled'] > .9 and got['raw'] < .6
    worse = pd.concat({'l2': pd.DataFrame(dict(mean=1., replicate=2.), f.index)}, axis=1)
    assert one_ranking({('toy', 's'): (f, r, worse), ('toy', 't'): (f, r, worse)}, ['none'], draws=10).empty and one_ranking({('toy', 's'): (f, r, references)}, ['none']).empty


def test_readme_says_what_the_notebook_printed():
    table = pd.read_csv(ROOT/'figures'/'sim'/'forward_metrics_predict_reverse.csv')
    expected = headline(table, 'sim', 'doubles.s0')
    assert expected in ' '.join((ROOT/'README.md').read_text(encoding='utf-8').split()), f'README.md: its first screen should say: {expected}'


def test_what_the_headline_names_has_a_panel():
    "README's caption stands under the figure: its two metrics are among the twelve panels, whichever they are, and in the order of rho."
    committed = of_split(pd.read_csv(ROOT/'figures'/'sim'/'forward_metrics_predict_reverse.csv'), 'sim', 'doubles.s0', 'none')
    ordered, named = list(committed.sort_values('rho', ascending=False)['metric']), [row['metric'] for row in extremes(committed)]
    shown = with_panel(ordered, named)
    assert len(shown) == 12 and shown[0] == named[0] and shown[-1] == named[1] and shown == sorted(shown, key=ordered.index) and 'l2' in shown
    for pair in (('l2_top20', 'pearson_top50'), ('cosine_centred', 'direction_centred'), ('l2', 'mae_top20')):
        assert set(pair) <= set(with_panel(list(COMPARED), pair)) and len(with_panel(list(COMPARED), pair)) == 12
    assert with_panel(['cosine_top50', 'l2_top20']) == ['cosine_top50', 'l2_top20']


def test_an_order_of_few_models_has_no_interval():
    few, many = (agreement_table({('toy', s): screen(models=m, seed=i) for i, s in enumerate('st')}, ['none', 'all'], draws=50) for m in ('abcd', 'abcdefgh'))
    assert set(models_behind(few)[few['models'] == 'all']) == {4} and set(few.query("split == 'all' and models == 'all'")['n_models']) == {8}
    assert set(models_behind(many)[many['models'] == 'all']) == {8} == {FEW}
    words = headline(few, 'toy', 's')
    assert '[' not in words and words.endswith(' An order of 4 models says little.')
    assert headline(many, 'toy', 's').count('[') == 4 and 'little' not in headline(many, 'toy', 's')
    row = dict(rho=.74, low=.74, high=.95)
    assert [said(row | {'n_models': n}) for n in (7, 8)] == ['0.74', '0.74 [0.74, 0.95]']
    assert few_words({'replicates': 4, 'mine': 7, 'doubles': 8}).startswith('Only 4 models in replicates, 7 models in mine: ') and few_words({'doubles': 8}) == ''


def test_one_truth_a_row():
    full = pd.DataFrame(dict(split=['r', 'r', 'd'], model=['a', 'b', 'a'], p=[1, 2, 3]))
    both = one_truth(full, full[['split', 'model']].iloc[[0, 2]].assign(p=[4, 5]), full[:1].assign(model='back'), by=['split', 'model'], halves={'r'})
    assert sorted(both[['split', 'model', 'truth', 'p']].itertuples(index=False, name=None)) == [
        ('d', 'a', 'full effect', 3), ('d', 'a', 'half 2', 5), ('r', 'a', 'half 2', 4), ('r', 'b', 'half 2', 2), ('r', 'back', 'half 2', 1)]
    assert set(one_truth(full, full[:0], by=['split', 'model'])['truth']) == {'full effect'}


def strange_table():
    names = ['<b>', '"x"', "a&b'", '</script><script>alert(1)</script>', 'gp_one', 'gp two']
    return pd.DataFrame(dict(model=names * 2, split=['s'] * 6 + ['t<i>'] * 6, stratum='x', measure='mrr', value=[.5, .25, 1., np.nan, -.5, .125] * 2, interval=['[0.400, 0.600]', '', '[0.900, 1.000]', '', '[-0.600, -0.400]', '[0.050, 0.200]'] * 2,
                             best=['', '', 'best', '', '', 'close'] * 2, p=['0.012', '< 0.001', '1.000', '', '0.500', '0.040'] * 2, n=pd.array([9] * 11 + [None], dtype='Int64')))


def test_page_escapes_and_stands_alone():
    text = page('a <b> & "c"', [], strange_table(), notes=['<u>'] * 9, cards=[card('<b>', dict(kind='<i>', settings={'"k"': '<v>'}))])
    for raw in ('<b> &', '<u>', '<v>', '<i>', 'alert(1)</script>'): assert raw not in text
    assert not re.search(r'(src|href)="(?!#|data:)', text) and 'http' not in text and text.count('<tr class="best">') == 2 and '<summary>1 more</summary>' in text
    rows = re.findall(r'<tr class="[a-z]*">(.*?)</tr>', text)
    assert len(rows) == 12 and '<td></td>' in rows[3] and '<td>9</td>' in rows[0]  # a plain table without the script
    assert len(SCRIPT.strip().splitlines()) <= 60


BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason='no Chromium here; apt install chromium')


def in_browser(text, folder, probe='', view=''):
    "The document after its script and `probe` ran, with `view` behind the #; what `probe` gives stands in #probe."
    file = folder/'page.html'
    file.write_text(text.replace('</html>', f'<pre id="probe"></pre><script>document.querySelector("#probe").textContent = JSON.stringify((() => {{ {probe} }})() ?? null)</script></html>'), encoding='utf-8')
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', f'--user-data-dir={folder/"profile"}']
    done = subprocess.run([BROWSER, *flags, '--dump-dom', file.as_uri() + view], capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S).group(1)))


LOOK = """
const column = name => [...document.querySelectorAll('#leaderboard thead th')].findIndex(h => h.textContent === name);
const shown = name => [...document.querySelectorAll('#leaderboard tbody tr')].map(r => r.cells[column(name)].textContent);
const press = name => document.querySelectorAll('#leaderboard thead button')[column(name)].click();
const said = () => document.querySelector('#filters output').textContent, sorts = name => document.querySelectorAll('#leaderboard thead th')[column(name)].getAttribute('aria-sort');
const box = name => [...document.querySelectorAll('#filters label')].find(l => l.firstChild.textContent.trim() === name).lastChild;
const choose = (name, value) => { box(name).value = value; box(name).dispatchEvent(new Event('input')); };
"""


@needs_browser
def test_leaderboard_sorts_and_filters_in_a_browser(tmp_path):
    text = page('toy', [], strange_table(), start='split=s&sort=value&down=1')
    got = in_browser(text, tmp_path, LOOK + """
      const found = {first: [shown('model'), said(), sorts('value')]};
      press('value'); found.ascending = [shown('value'), sorts('value'), sorts('model')];
      press('value'); found.descending = shown('value');
      press('interval'); found.interval = shown('interval');
      press('p'); found.p = shown('p');
      press('model'); found.model = shown('model');
      choose('model', 'GP nothing'); found.filtered = [shown('model'), said(), location.hash];
      choose('model', ''); choose('split', 't<i>'); found.split = [shown('split'), said()];
      choose('split', ''); found.all = said();
      const button = document.querySelector('#leaderboard thead button'); button.focus(); found.focus = document.activeElement === button;
      found.injected = document.querySelectorAll('#leaderboard b, #leaderboard i, #filters i').length;
      return found;""")
    assert got['first'] == [["a&b'", '<b>', '"x"', 'gp two', 'gp_one', '</script><script>alert(1)</script>'], '6 of 12 rows; a heading sorts', 'descending']
    assert got['ascending'] == [['-0.500', '0.125', '0.250', '0.500', '1.000', ''], 'ascending', 'none'] and got['descending'] == ['1.000', '0.500', '0.250', '0.125', '-0.500', '']
    assert got['interval'] == ['[-0.600, -0.400]', '[0.050, 0.200]', '[0.400, 0.600]', '[0.900, 1.000]', '', ''] and got['p'] == ['< 0.001', '0.012', '0.040', '0.500', '1.000', '']
    assert sorted(got['model']) == sorted(strange_table()['model'][:6]) and got['model'].index('gp two') + got['model'].index('gp_one') > 5
    assert sorted(got['filtered'][0]) == ['gp two', 'gp_one'] and got['filtered'][1].startswith('2 of 12') and 'model=GP+nothing' in got['filtered'][2]
    assert got['split'] == [['t<i>'] * 6, '6 of 12 rows; a heading sorts'] and got['all'].startswith('12 of 12') and got['focus'] and got['injected'] == 0


@needs_browser
@pytest.mark.parametrize('view, expected', [('#model=gp&sort=value', ['-0.500', '-0.500', '0.125', '0.125']), ('#split=nowhere&sort=n', 12), ('#leaderboard', 6)])
def test_address_says_what_is_shown(tmp_path, view, expected):
    got = in_browser(page('toy', [], strange_table(), start='split=s'), tmp_path, LOOK + "return shown('value');", view)
    assert got == expected if isinstance(expected, list) else len(got) == expected


@needs_browser
def test_empty_leaderboard_in_a_browser(tmp_path):
    assert in_browser(page('toy', [], pd.DataFrame()), tmp_path, LOOK + 'return said();') == '0 of 0 rows; a heading sorts'


def test_cards():
    facts = model_facts('gears', MODELS['additive'], {'lr': 1 / 3}, pd.DataFrame(columns=['split', 'stratum', 'measure', 'value', 'low', 'high', 'n', 'seeds', 'baseline', 'difference', 'difference_low', 'difference_high', 'p_adjusted']))
    text = card('gears', facts)
    assert 'graphs' in text and 'Ahlmann-Eltze' in text and 'lr=0.3333' in text and '<dt>best</dt>' not in text
    assert model_facts('mine_permuted', None, {}, pd.DataFrame(columns=['measure', 'difference', 'seeds']))['prior'].startswith('with its genes exchanged')


def write_toy(folder, replicate=False, n=20, halves=False, kinds=()):
    "Results of a screen with a reverse task, as notebooks 05, 07, 08 and 14 leave them; with `halves`, scores against half 2 as well, the same in a split of replicates."
    kinds = list(kinds) or (['replicate', 'doubles'] if replicate else ['doubles'])
    (folder/'done').mkdir(parents=True)
    (folder/'splits.json').write_text(json.dumps([dict(name=f'{kind}.s0', kind=kind, seed=0, hash='0', path='0.json') for kind in kinds]))
    tables, factors = [], dict(mean=1, additive=.8, one=.6, two=.5, lazy=.7, two_permuted=.55, ceiling=.3)
    for kind in kinds:
        (folder/f'{kind}.s0').mkdir()
        errors = panel(n, **factors)
        for model in errors:
            kept = errors[[model]].iloc[:n // 2 if model == 'lazy' else n]
            parts = [scores(f, m, split=f'{kind}.s0') for m, f in (('l2', kept), ('pearson', 1 - kept / 20), ('pearson_centred', 1 - kept / 15), ('centroid_accuracy', 1 - kept / 40))]
            whole = pd.concat(parts)
            half2 = [whole.assign(metric=whole['metric'] + '@half2', value=whole['value'] * (1 if kind == 'replicate' else 1.1))] * halves
            pd.concat([whole] * (model != 'ceiling' or not halves) + half2).to_parquet(folder/f'{kind}.s0'/f'{model}.s0.metrics.parquet')
            if model == 'ceiling': continue
            for mask, metric in ((mask, metric) for mask in ('none', 'all') for metric in ('mrr', 'exact@1')):
                tables.append(pd.DataFrame(dict(dataset='toy', split=f'{kind}.s0', route='predicted', model=model, mask=mask, distance='cosine', query=errors.index, n_candidates=99, metric=metric, value=1 / (1 + 20 * errors[model].to_numpy()))))
    pd.concat(tables).to_parquet(folder/'retrieval.parquet')


def test_report_with_a_reverse_task_and_another_data_set_beside(tmp_path):
    results = tmp_path/'data'/'results'
    write_toy(results/'toy', replicate=True)
    write_toy(results/'other')
    run_here('15_report', tmp_path, dataset='toy', draws=50, beside='other', hidden='all')
    points, table = (pd.read_csv(tmp_path/'figures'/'toy'/f'{slug}.csv') for slug in ('forward_against_reverse', 'forward_metrics_predict_reverse'))
    assert set(points['model']) == {'mean', 'additive', 'one', 'two'} and set(points['mask']) == {'all'} and set(points['dataset']) == {'toy', 'other'}
    assert points.query("dataset == 'toy' and metric == 'l2' and model == 'mean'")['forward'].tolist() == [1, 1]
    assert set(zip(table['dataset'], table['split'])) == {('toy', 'doubles.s0'), ('toy', 'replicate.s0'), ('other', 'doubles.s0'), ('all', 'all')} and (table.query("models == 'all' and metric == 'l2'")['rho'] > .99).all()
    report = (results/'toy'/'report.html').read_text()
    assert report.count('class="card"') == 6 and 'Sum of the constituents' in report and 'Predictions from elsewhere' in report and 'data-start="split=doubles.s0&amp;stratum=reverse, mask none' in report
    assert pd.read_csv(results/'toy'/'leaderboard.csv')['best'].isin(['best', 'close']).any()


@pytest.mark.parametrize('kinds', [('replicate', 'doubles'), ('replicate',)])
def test_truth_in_a_split_of_replicates_is_half_2(tmp_path, kinds):
    "Every comparison stands once there, with the replicate beside it; elsewhere once for each truth. Four models: the figures say so and draw no interval."
    write_toy(tmp_path/'data'/'results'/'toy', halves=True, kinds=kinds)
    run_here('15_report', tmp_path, dataset='toy', draws=50)
    board = pd.read_csv(tmp_path/'data'/'results'/'toy'/'leaderboard.csv')
    replicates, doubles = (board[board['split'] == f'{kind}.s0'] for kind in ('replicate', 'doubles'))
    assert set(replicates['truth']) == {'half 2'} and not replicates.duplicated(['stratum', 'measure', 'model']).any() and set(replicates['model']) >= {'ceiling', 'mean', 'two'}
    assert replicates.query("stratum == 'combo_seen2' and model == 'two' and measure == 'relative L2'")['p'].notna().all()
    if 'doubles' in kinds: assert set(doubles.loc[doubles['measure'] == 'relative L2', 'truth']) == {'full effect', 'half 2'} and set(doubles.loc[doubles['measure'] == 'mrr', 'truth']) == {'full effect'}
    else: assert (board['measure'] == 'mrr').any()
    said = {slug: json.loads((tmp_path/'figures'/'toy'/f'{slug}.json').read_text())['caption'] for slug in ('leaderboard', 'forward_against_reverse', 'forward_metrics_predict_reverse')}
    assert 'retrieval_by_route' in said['leaderboard'] and 'its row is empty there' in said['leaderboard']
    for slug in list(said)[1:]: assert f'Only 4 models in {split_words(kinds[-1] + ".s0")}' in said[slug] and '95 %' not in said[slug]


def test_a_data_set_beside_that_is_not_there_is_one_line(tmp_path):
    write_toy(tmp_path/'data'/'results'/'toy')
    with pytest.raises(Problem, match='beside=nowhere: no results of a reverse task by cosine distance'): run_here('15_report', tmp_path, dataset='toy', draws=50, beside='nowhere')
