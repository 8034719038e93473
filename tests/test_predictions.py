"Predictions of other programs: aligned with a report, refused in one line, scored like the models of this compendium."
import json
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import cells, launch, run_notebook

from perturb_research.core import Problem
from perturb_research.data.labels import condition_ids
from perturb_research.data.splits import make_split
from perturb_research.evaluate.foreign import refuse_repeats
from perturb_research.evaluate.metrics import perturbation_mean, score
from perturb_research.evaluate.predictions import _both_cells, align, evaluate, match_conditions, mean_of_groups

G = 120
GENES = pd.DataFrame(index=[f"G{i}" for i in range(G)])


def conditions(names, kind="CRISPRi", contexts=("K562",), doses=(np.nan,)):
    rows = [dict(perturbation=n, perturbation_type=kind, context=c, dose=d, time_h=np.nan) for n in names for c in contexts for d in doses]
    obs = pd.DataFrame(rows)
    return obs.set_index(condition_ids(obs))


def screen(names=tuple(f"G{i}" for i in range(12)), seed=0, **kwargs):
    "Effects with control profiles, as notebook 04 writes them."
    rng, obs = np.random.default_rng(seed), conditions(names, **kwargs)
    contexts = np.array(sorted(set(obs["context"])))
    control = rng.gamma(1, 1, size=(len(contexts), G)).astype("float32")
    uns = dict(effect_scale="mean_log1p", control_contexts=contexts, control_mean=control, dataset_id="d")
    return ad.AnnData(rng.normal(scale=.3, size=(len(obs), G)).astype("float32"), obs.assign(n_cells=50), GENES.copy(), uns=uns)


def profiles(effects, names=None):
    "The exact expression profiles of `effects`, named by perturbation."
    place = np.searchsorted(effects.uns["control_contexts"], effects.obs["context"].astype(str))
    return ad.AnnData(effects.X + effects.uns["control_mean"][place], pd.DataFrame(index=names or effects.obs["perturbation"].astype(str).tolist()), effects.var.copy())


def aligned(given, effects, fill=None):
    return align(given, effects, effects.obs, np.zeros(G) if fill is None else fill)


def test_effects_and_profiles_come_out_the_same():
    truth = screen()
    mine = profiles(truth)
    effects = ad.AnnData(truth.X, mine.obs, truth.var)
    for given, word in ((mine, "taken as expression"), (effects, "taken as effects")):
        found, said = aligned(given, truth)
        np.testing.assert_allclose(found.X, truth.X, atol=1e-5)
        assert word in said[0] and len(said) == 1


def test_permuted_extra_and_missing_genes_and_conditions():
    truth = screen()
    given = profiles(truth)[::-1, ::-1].copy()
    given = ad.concat([given[:-2, 10:], ad.AnnData(np.ones((10, 1), "float32"), given.obs[:-2], pd.DataFrame(index=["foreign"]))], axis=1, merge="first")
    fill = np.full(G, 7.)
    found, said = aligned(given, truth, fill)
    gone = np.array([g in given.var_names for g in truth.var_names])
    np.testing.assert_allclose(found.X[2:][:, gone], truth.X[2:][:, gone], atol=1e-5)
    assert (found.X[:2] == 7).all() and (found.X[:, ~gone] == 7).all() and found.obs["predicted"].sum() == 10
    text = " | ".join(said)
    for words in ("2 of 12 asked conditions are missing", "10 of 120 genes are missing", "1 genes that the screen does not have", "another order"): assert words in text, text


def test_cells_are_averaged_against_the_measured_controls():
    truth = screen()
    rng = np.random.default_rng(1)
    exact = profiles(truth)
    labels = np.repeat([*exact.obs_names, "ctrl"], 5)
    X = np.repeat(np.vstack([exact.X, 3 + 0 * exact.X[:1]]), 5, axis=0)  # their own controls are nonsense
    given = ad.AnnData(sp.csr_matrix(X), pd.DataFrame({"gene": labels}, index=[f"c{i}" for i in range(len(labels))]), truth.var)[rng.permutation(len(labels))].copy()
    found, said = aligned(given, truth)
    np.testing.assert_allclose(found.X, truth.X, atol=1e-4)
    assert "5 controls of their own serve" in said[0]


def test_counts_of_cells_are_normalised():
    truth = screen()
    truth.uns["control_mean"] = np.log1p(truth.uns["control_mean"] / truth.uns["control_mean"].sum() * 1e4)
    counts = np.random.default_rng(0).poisson(4, size=(24, G)).astype("float32")
    given = ad.AnnData(sp.csr_matrix(counts), pd.DataFrame({"gene": np.repeat(truth.obs["perturbation"].astype(str).to_numpy(), 2)}, index=[f"c{i}" for i in range(24)]), truth.var)
    found, said = aligned(given, truth)
    logged = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).reshape(12, 2, G).mean(1)
    np.testing.assert_allclose(found.X, logged - truth.uns["control_mean"], atol=1e-4)
    assert any("counts: scaled to 10,000" in line for line in said)


def test_variances_come_along():
    truth = screen()
    given = profiles(truth)
    given.layers["var"] = np.full(given.shape, .5)
    assert (aligned(given[:, ::-1].copy(), truth)[0].layers["var"] == .5).all()
    given.layers["var"][0, 0] = -1
    with pytest.raises(Problem, match="negative or non-finite"): aligned(given, truth)


@pytest.mark.parametrize("spoil, message", [
    (lambda p: _set(p, 3, 4, np.nan), r"1 values are NaN or infinite, the first in row 'G3'"),
    (lambda p: _set(p, 0, 0, np.inf), "NaN or infinite"),
    (lambda p: _named(p, var=[f"ENSG{i}" for i in range(G)]), "theirs are named like ENSG0"),
    (lambda p: ad.AnnData(p.X.T, p.var, p.obs), "transposed"),
    (lambda p: p[:0].copy(), "the matrix X is empty"),
    (lambda p: _named(p, obs=["G0", "G0", *(f"G{i}" for i in range(2, 12))]), "occurs 2 times"),
    (lambda p: _named(p, var=["G0", "G0", *(f"G{i}" for i in range(2, G))]), "gene 'G0' occurs twice"),
    (lambda p: ad.AnnData(np.expm1(p.X) * 50, p.obs, p.var), "too large for log1p"),
    (lambda p: ad.AnnData(p.X / 12, p.obs, p.var), "times the controls"),
    (lambda p: _named(p, obs=[f"NOT{i}" for i in range(12)]), "none of the 12 asked conditions"),
    (lambda p: ad.AnnData(np.full(p.shape, "a", dtype=object), p.obs, p.var), "expected numbers"),
])
def test_bad_predictions_are_refused_in_one_line(spoil, message):
    truth = screen()
    with pytest.raises(Problem, match=message) as e: aligned(spoil(profiles(truth)), truth)
    assert "\n" not in str(e.value)


def _set(p, i, j, value):
    p.X[i, j] = value
    return p


def _named(p, obs=None, var=None):
    return ad.AnnData(p.X, pd.DataFrame(index=obs or p.obs_names), pd.DataFrame(index=var or p.var_names))


def test_one_condition_and_constant_predictions_are_said():
    truth = screen()
    said = aligned(profiles(truth)[:1].copy(), truth)[1]
    assert any("one condition only" in line for line in said)
    same = ad.AnnData(np.ones(truth.shape, "float32") * truth.X[0], profiles(truth).obs, truth.var)
    assert any("every condition has the same prediction" in line for line in aligned(same, truth)[1])
    same.X[0, 0] += 1
    assert any("119 genes that differ" in line for line in aligned(same, truth)[1])


def test_cells_for_a_screen_of_effects_alone_are_refused():
    truth = screen()
    given = ad.concat([profiles(truth), profiles(truth)], index_unique="-")
    del truth.uns["control_mean"]
    given.obs["perturbation"] = [n.split("-")[0] for n in given.obs_names]
    with pytest.raises(Problem, match="known by its effects alone"): aligned(given, truth)


def test_names_of_combinations_contexts_and_doses():
    known = conditions(["A+B", "A", "B"], contexts=("K562", "RPE1"))
    obs = pd.DataFrame({"condition": ["B+A", "A+ctrl", "ctrl+B", "ctrl"], "cell_type": ["K562", "RPE1", "K562", "K562"]}, index=list("wxyz"))
    ids, controls, foreign = match_conditions(obs, known, ["A", "B"])
    assert [i.replace("|CRISPRi||", "") for i in ids] == ["A+B|K562", "A|RPE1", "B|K562", ""] and controls.tolist() == [False] * 3 + [True] and not foreign
    with pytest.raises(Problem, match="'context'"): match_conditions(obs[["condition"]], known, ["A", "B"])
    drugs = conditions(["aspirin", "dmso2"], kind="drug", doses=(.1, 1.))
    ids, _, _ = match_conditions(pd.DataFrame({"drug": ["aspirin", "Aspirin"], "dose": ["100 nM", "1 uM"]}, index=["a", "b"]), drugs, ["A"])
    assert [i.split("|")[2] for i in ids] == ["0.1", "1"]
    with pytest.raises(Problem, match="'dose'"): match_conditions(pd.DataFrame({"drug": ["aspirin"]}, index=["a"]), drugs, ["A"])


def test_means_of_groups():
    X, group = np.arange(12.).reshape(6, 2), np.array([1, 0, -1, 1, 1, 0])
    expected = [X[group == g].mean(0) for g in (0, 1)]
    for form in (X, sp.csr_matrix(X)): np.testing.assert_allclose(mean_of_groups(form, group, 2), expected)


def test_evaluate_effects_with_a_split():
    truth = screen(tuple(f"G{i}" for i in range(40)))
    split = make_split(truth, "perturbation")
    given = profiles(truth)
    given.X += np.random.default_rng(0).normal(scale=.1, size=given.shape).astype("float32")
    table = evaluate(given, truth, split=split)
    test = split.test(truth)
    mine = table[(table["model"] == "predictions") & (table["metric"] == "l2")].set_index("condition")["value"]
    expected = score(given[test.obs["perturbation"].astype(str)].X - truth.uns["control_mean"][0], test.X, train_mean=perturbation_mean(split.train(truth)), conditions=test.obs_names, names=["l2"])
    np.testing.assert_allclose(mine.loc[expected["condition"]], expected["value"], rtol=1e-5)
    assert set(table["stratum"][~table["condition"].str.startswith("*")]) == {"single_unseen"}
    mean = table[(table["model"] == "mean") & (table["metric"] == "pearson_centred")]["value"]
    assert (mean == 0).all() and len(mean) == test.n_obs
    assert any(name.startswith("systema.") for name in table["metric"])
    assert any("conditions beyond those asked for here" in line for line in table.attrs["said"])


def test_a_split_of_few_genes_takes_the_controls_of_those_genes():
    truth = screen(tuple(f"G{i}" for i in range(40)))
    split = make_split(truth, "perturbation", n_genes=30)
    table = evaluate(profiles(truth), truth, split=split)
    assert table[(table["model"] == "predictions") & (table["metric"] == "l2")]["value"].max() < 1e-4


def test_evaluate_cells_and_separate_controls():
    names = [f"G{i}" for i in range(6)]
    whole = cells(n=420, genes=G, targets=("control", *names))
    half = np.arange(420) % 2 == 0
    table = evaluate(whole[half].copy(), whole[~half].copy())
    assert {"predictions", "mean", "no_change", "replicate"} == set(table["model"])
    assert {"cell_eval.overlap_at_N", "cell_eval.pds_l1", "l2"} <= set(table[table["model"] == "predictions"]["metric"])
    is_control = (whole.obs["perturbation"] == "control").to_numpy()
    treated = whole[~half & ~is_control].copy()
    apart = evaluate(whole[half].copy(), treated, control=whole[~half & is_control].copy(), families=False)
    assert set(apart["condition"]) == {c for c in table["condition"] if not c.startswith("*")}
    with pytest.raises(Problem, match="no control cells"): evaluate(whole[half].copy(), treated)
    without = evaluate(whole[half & ~is_control].copy(), whole[~half].copy())  # the real controls stand in
    scores = [t[(t["model"] == "predictions") & (t["metric"] == "l2")]["value"].to_numpy() for t in (table, without)]
    np.testing.assert_array_equal(*scores)
    assert "cell_eval.overlap_at_N" in set(without["metric"])


def of_cells(effects, n=6, seed=0, spread=.3):
    "Cells whose means are the profiles of `effects`, and controls, in every context."
    rng, parts = np.random.default_rng(seed), []
    for i, context in enumerate(effects.uns["control_contexts"]):
        mine = effects[effects.obs["context"] == context]
        X = np.vstack([mine.X + effects.uns["control_mean"][i], effects.uns["control_mean"][[i]]])
        noise = rng.normal(scale=spread, size=(len(X), n, G))
        X = X[:, None] + noise - noise.mean(1, keepdims=True)
        labels = np.repeat([*mine.obs["perturbation"].astype(str), "control"], n)
        parts.append(ad.AnnData(X.reshape(-1, G).astype("float32"), pd.DataFrame({"perturbation": labels, "cell_line": context}, index=[f"{context}{j}" for j in range(len(labels))]), effects.var))
    return ad.concat(parts)


def test_own_controls_are_those_of_the_context():
    truth = screen(contexts=("A", "B"))
    truth.uns["control_mean"][1] += 1  # the contexts differ
    given = of_cells(truth)
    cells_of_truth = ad.AnnData(np.maximum(given.X, 0), given.obs.assign(condition="x"), given.var)
    for context in ("A", "B"):
        part = truth[(truth.obs["context"] == context).to_numpy()].copy()
        real = cells_of_truth.copy()
        ids = {f"{p}|{c}": i for p, c, i in zip(truth.obs["perturbation"], truth.obs["context"], truth.obs_names)}
        real.obs = pd.DataFrame({"context": given.obs["cell_line"], "is_control": given.obs["perturbation"] == "control",
                                 "condition": [ids.get(f"{p}|{c}", "") for p, c in zip(given.obs["perturbation"], given.obs["cell_line"])]})
        _, predicted = _both_cells(given, part, real, [])
        own = predicted.means(list(part.obs_names), "predicted")[1]
        np.testing.assert_allclose(own, truth.uns["control_mean"][0 if context == "A" else 1], atol=1e-4)


def test_profiles_of_a_screen_of_many_zeros_are_told_from_effects():
    "Ranks of mostly silent genes agree with nothing; the direction of the profile does."
    truth, rng = screen(), np.random.default_rng(3)
    silent = rng.random(G) < .7
    truth.uns["control_mean"] = np.where(silent, rng.gamma(.2, .02, G), truth.uns["control_mean"]).astype("float32")
    truth.X = (truth.X * np.where(silent, .05, 1)).astype("float32")
    found, said = aligned(profiles(truth), truth)
    assert "taken as expression" in said[0]
    np.testing.assert_allclose(found.X, truth.X, atol=1e-5)
    assert "taken as effects" in aligned(ad.AnnData(truth.X, profiles(truth).obs, truth.var), truth)[1][0]


def test_effects_of_another_size_are_pointed_out():
    truth = screen()
    said = aligned(ad.AnnData(truth.X * 10, profiles(truth).obs, truth.var), truth)[1]
    assert any("10 times as large as the measured ones" in line for line in said)


def test_a_prediction_is_measured_from_the_controls_of_the_truth():
    "Effects against the controls of their batch: the exact profiles come out as the exact effects."
    truth = screen()
    matched = truth.uns["control_mean"] + np.random.default_rng(0).normal(scale=.2, size=truth.shape)
    truth.layers["mean"] = (truth.X + matched).astype("float32")
    given = ad.AnnData(truth.layers["mean"], profiles(truth).obs, truth.var)
    np.testing.assert_allclose(aligned(given, truth)[0].X, truth.X, atol=1e-5)


def test_the_truth_may_be_a_table_of_effects_by_name():
    rng, names = np.random.default_rng(0), [f"G{i}" for i in range(12)]
    truth = ad.AnnData(sp.csr_matrix(rng.normal(size=(12, G)).astype("float32")), pd.DataFrame(index=names), GENES.copy())
    table = evaluate(truth, truth, families=False)
    assert table[(table["model"] == "predictions") & (table["metric"] == "l2")]["value"].max() < 1e-4
    halved = truth.copy()
    halved.layers["half1"], halved.layers["half2"] = truth.X, truth.X
    assert "replicate" in set(evaluate(truth, halved, families=False)["model"])
    truth.X[0, 0] = np.nan
    with pytest.raises(Problem, match="effects are NaN or infinite"): evaluate(halved, truth)
    with pytest.raises(Problem, match="expected an AnnData"): evaluate(pd.DataFrame(), truth)


def test_cells_of_another_scale_are_refused():
    truth = screen()
    given = of_cells(truth)
    assert np.abs(aligned(given, truth)[0].X - truth.X).max() < 1e-3
    for spoil in (lambda X: X / np.log(2) * 2, lambda X: X - X.mean(0)):
        wrong = ad.AnnData(spoil(np.asarray(given.X)), given.obs, given.var)
        with pytest.raises(Problem, match="rescale them, or give effects"): aligned(wrong, truth)
    twice = ad.AnnData(np.vstack([truth.X, truth.X]), pd.DataFrame({"perturbation": np.tile(truth.obs["perturbation"].astype(str), 2)}, index=[f"r{i}" for i in range(24)]), truth.var)
    with pytest.raises(Problem, match="rescale them, or give effects"): aligned(twice, truth)  # effects of two seeds are no cells


def test_a_file_with_each_condition_twice_is_refused_as_that():
    "Test and gallery rows of asked.csv written both; a file of cells has more rows a condition."
    truth = screen()
    for order in ([*range(12), *range(12)], [*range(12), 3]):
        with pytest.raises(Problem, match=f"{len(order) - 12} of 12 conditions stand more than once, the first '{truth.obs_names[0 if len(order) == 24 else 3]}', 2 times; .*drop_duplicates".replace("|", r"\|")) as e:
            refuse_repeats(truth[order], truth.obs, truth.var_names)
        assert "\n" not in str(e.value)
    refuse_repeats(truth, truth.obs, truth.var_names)
    refuse_repeats(of_cells(truth), truth.obs, truth.var_names)


def test_without_a_split_genes_left_out_bring_nothing():
    truth = screen()
    truth.X += np.where(np.arange(G) < 60, 2, 0)  # a large common effect
    guess = ad.AnnData(np.random.default_rng(0).normal(scale=.01, size=truth.shape).astype("float32"), profiles(truth).obs, truth.var)
    all_genes, fewer = (evaluate(g, truth, families=False).query("model == 'predictions' and metric == 'pearson'")["value"].mean() for g in (guess, guess[:, 50:].copy()))
    assert abs(all_genes) < .1 and abs(fewer) < .2
    assert any("nothing is scored on them" in line for line in evaluate(guess[:, 50:].copy(), truth, families=False).attrs["said"])


def test_the_replicate_and_the_models_have_one_truth():
    names = [f"G{i}" for i in range(6)]
    whole = cells(n=420, genes=G, targets=("control", *names))
    table = evaluate(whole, whole, families=False)
    of = {m: set(t["metric"]) for m, t in table.groupby("model")}
    assert of["replicate"] == {f"{m}@half2" for m in ("l2", "pearson", "pearson_centred", "centroid_accuracy")} and of["replicate"] <= of["predictions"]


def test_rows_named_by_ids_may_hold_more_than_is_known():
    truth = screen()
    given = ad.concat([ad.AnnData(truth.X, pd.DataFrame(index=truth.obs_names), truth.var), ad.AnnData(truth.X[:2], pd.DataFrame(index=["X+Y|CRISPRi||", "control"]), truth.var)])
    found, said = aligned(given, truth)
    np.testing.assert_allclose(found.X, truth.X)
    assert any("1 labels that the screen does not have" in line for line in said)
    odd = ad.AnnData(truth.X, truth.obs.assign(perturbation=truth.obs["perturbation"].to_numpy()[::-1]), truth.var)
    with pytest.raises(Problem, match="expected the same in both"): aligned(odd, truth)


def test_what_is_left_out_of_cells_is_said():
    names = [f"G{i}" for i in range(6)]
    whole = cells(n=420, genes=G, targets=("control", *names))
    one = whole[~((whole.obs["perturbation"] == "G0") & (np.arange(420) > 7)).to_numpy()].copy()
    assert any("fewer than 2 predicted cells" in line for line in evaluate(one, whole).attrs["said"])
    few = whole[~((whole.obs["perturbation"] == "G0") & (np.arange(420) > 50)).to_numpy()].copy()
    assert any("fewer than 10 cells" in line for line in evaluate(whole, few, families=False).attrs["said"])


def test_controls_beside_a_truth_with_counts():
    names = [f"G{i}" for i in range(6)]
    whole = cells(n=420, genes=G, targets=("control", *names))
    whole.layers["counts"] = whole.X.copy()
    is_control = (whole.obs["perturbation"] == "control").to_numpy()
    tables = [evaluate(whole, whole[~is_control].copy(), control=c, families=False) for c in (whole[is_control].copy(), ad.AnnData(whole[is_control].X, whole[is_control].obs, whole.var))]
    same = evaluate(whole, whole, families=False)
    for table in tables: assert set(table["condition"]) == set(same["condition"])


def test_counts_on_both_sides_give_the_metrics_of_counts():
    names = [f"G{i}" for i in range(6)]
    whole = cells(n=420, genes=G, targets=("control", *names))
    half = np.arange(420) % 2 == 0
    assert "vcc2026.pds_cosine" in set(evaluate(whole[half].copy(), whole[~half].copy())["metric"])


@pytest.mark.slow
def test_predictions_and_parameters_join_the_figures(small, tmp_path):
    "The whole main job with somebody's model in it, and one notebook by hand with another parameter; without, both are gone again."
    out = tmp_path / "out"
    shutil.copytree(small, out)
    split = next(s for s in json.loads((out / "data/results/sim/splits.json").read_text()) if s["kind"] == "doubles")
    asked = pd.read_csv(out / "data/results/sim" / split["name"] / "asked.csv")
    assert {"train", "test", "gallery"} <= set(asked["part"])
    theirs = [ad.read_h5ad(out / "data/results/sim" / split["name"] / f"kernel.s0.{part}.h5ad") for part in ("test", "gallery")]
    both = np.vstack([t.X for t in theirs]), [n for t in theirs for n in t.obs_names]
    once = ~pd.Index(both[1]).duplicated()
    file = tmp_path / "My Model.h5ad"
    ad.AnnData(both[0][once], pd.DataFrame(index=np.array(both[1])[once]), theirs[0].var, uns=dict(split=split["hash"])).write_h5ad(file)
    done = launch(out, "figures", "--profile", "small", "--dataset", "sim", "--predictions", f"'{file}'")
    assert done.returncode == 0, done.stderr
    board = pd.read_csv(out / "figures/sim/leaderboard.csv")
    for measure in ("relative L2", "mrr"):  # forward and reverse
        mine, kernel = (board[(board["model"] == m) & (board["split"] == split["name"]) & (board["measure"] == measure)] for m in ("my_model", "kernel"))
        assert len(mine) and np.allclose(mine["value"], kernel["value"], rtol=1e-4)
    assert "my_model" in set(pd.read_csv(out / "figures/sim/foreign_error.csv")["model"])
    figures = lambda base: {f.name: f.read_bytes() for f in (base / "figures/sim").iterdir()}
    steps = lambda base: {f.name: f.stat().st_mtime_ns for f in (base / "data/results/sim/done").iterdir()}
    assert {n[:2] for n, t in steps(out).items() if t != steps(small).get(n)} <= {"13", "14", "15"}, "no model is trained again for it"
    assert "my_model" in set(pd.read_csv(out / "figures/sim/retrieval_by_route.csv")["model"])
    by_hand = run_notebook("14_evaluate.retrieval", out, dataset="sim", profile="small", top_k=5)  # what the README shows: it reads what the main job made and changes only its own figures
    assert by_hand.returncode == 0, by_hand.stderr[-3000:]
    assert '"top_k": 5' in (out / "figures/sim/retrieval_at_k.json").read_text()
    assert {"14_evaluate.retrieval.json"} == set(steps(small)) - set(steps(out)), "the next call makes the standard figures again"
    assert launch(out, "figures", "--profile", "small", "--dataset", "sim").returncode == 0
    assert set(figures(out)) == set(figures(small)) and not [n for n, made in figures(out).items() if made != figures(small)[n]]


def test_predictions_are_refused_before_anything_runs(tmp_path):
    done = launch(tmp_path, "figures", "--dataset", "sim", "--predictions", "/nowhere/mine.h5ad")
    assert done.returncode == 1 and "no such file" in done.stderr and len(done.stderr.strip().splitlines()) == 1
