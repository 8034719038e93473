"Trials: what models are asked, that nothing held out reaches them, seeds and ensembles, what is left behind after a kill, and figures with or without models."
import importlib
import json
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from perturb_research.core import Run, effective
from perturb_research.data.labels import condition_ids
from perturb_research.data.splits import make_split
from perturb_research.evaluate import trials
from perturb_research.evaluate.trials import ORDER, gallery_of, hold_trial, save_error, save_predicted, save_training, score_table, summary, verdicts
from perturb_research.launch import ZOO
from perturb_research.models.baselines import Mean, Model, NoChange, candidates


def screen(seed=0):
    "Eight genes and all their pairs, twelve genes read out; pairs are .8 of the sum of their parts, with halves; and six cells a condition and half."
    rng = np.random.default_rng(seed)
    names = list("ABCDEFGH")
    effect = dict(zip(names, rng.normal(size=(8, 12))))
    labels = names + [f"{a}+{b}" for i, a in enumerate(names) for b in names[i + 1:]]
    X = np.array([effect[n] if "+" not in n else .8 * sum(effect[p] for p in n.split("+")) for n in labels], dtype=np.float32)
    obs = pd.DataFrame(dict(perturbation=labels, perturbation_type="CRISPRa", context="x", dose=np.nan, time_h=np.nan, n_cells=12.))
    obs.index = condition_ids(obs).to_numpy()
    var = pd.DataFrame(index=[f"G{i}" for i in range(12)])
    halves = {h: X + rng.normal(0, .1, X.shape).astype(np.float32) for h in ("half1", "half2")}
    effects = ad.AnnData(X, obs, var, uns=dict(dataset_id="toy", effect_scale="mean_log1p"), layers=halves)
    of = np.repeat(np.r_[-1, np.arange(len(obs))], 12)
    cell_obs = pd.DataFrame(dict(condition=np.array([*obs.index, ""], dtype=object)[of], is_control=of < 0, half=np.tile([1, 2], len(of) // 2)), index=[f"c{i}" for i in range(len(of))])
    base = np.vstack([X, np.zeros(12)])[of] + 5
    return effects, ad.AnnData(base.astype(np.float32), cell_obs.assign(condition=cell_obs["condition"].astype("category")), var)


class Careful(Model):
    "Remembers what it was handed; predicts a number drawn under its seed."
    name, stochastic, needs, seen = "careful", True, ("cells",), []

    def __init__(self, level=1.): self.level = level

    def learn(self, val):
        self.seen.append((set(self.train.index), set(val.obs_names), self.cells, self.val_cells))
        self.value, self.history = self.level + self.rng.normal(), pd.DataFrame(dict(epoch=[0, 1], what="train", value=[2., 1.]))
        self.checkpoint.write_bytes(b"state")

    def effects(self, conditions): return np.full((len(conditions), len(self.genes)), self.value)
    def var(self, conditions): return np.full((len(conditions), len(self.genes)), .5)


class Graphic(Mean): name, needs, permuted = "graphic", ("graph",), True


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURB_OUT", str(tmp_path))
    return Run("09_models.toy", effective(dict(dataset="toy", profile="small"), dataset=str, profile=str))


def test_a_model_meets_training_rows_and_cells_and_names(run):
    effects, cells = screen()
    split = make_split(effects, "combination")
    Careful.seen.clear()
    trial = hold_trial(run, effects, [split], [NoChange, Careful], candidates=candidates, cells=cells)
    (train, val, given, val_given), = Careful.seen
    assert train == set(split.ids["train"]) and val == set(split.ids["val"])
    assert set(given.obs["condition"].astype(str)) == {"", *split.ids["train"]} and set(val_given.obs["condition"].astype(str)) == set(split.ids["val"])
    assert not {c for part in trial.shown.values() for c in part[1].obs_names} & (set(given.obs["condition"].astype(str)) | train)
    assert list(trials.asked_of(split.test(effects))) == ["perturbation", "perturbation_type", "context", "dose", "time_h"]


def test_cells_of_a_replicate_split_are_those_of_the_first_half():
    effects, cells = screen()
    split = make_split(effects, "replicate")
    given = split.train_cells(cells, effects)
    assert set(given.obs["half"]) == {1} and given.obs["is_control"].sum() == 6 and given.n_obs == cells.n_obs // 2
    assert set(split.val_cells(cells, effects).obs_names) == set()


def test_files_seeds_and_ensemble(run):
    effects, cells = screen()
    split = make_split(effects, "doubles")
    trial = hold_trial(run, effects, [split], [NoChange, Careful], candidates=candidates, cells=cells, seeds=3, changes={})
    folder = run.results(split.name)
    assert all(f.exists() for f in trial.files)
    assert {f.name for f in folder.glob("careful*")} == {f"careful.s{s}.{kind}" for s in range(3) for kind in ("val.h5ad", "test.h5ad", "gallery.h5ad", "metrics.parquet", "weights.pt")} | {
        f"careful_ensemble.s0.{kind}" for kind in ("val.h5ad", "test.h5ad", "gallery.h5ad", "metrics.parquet")}
    assert {f.name for f in folder.glob("no_change*")} == {f"no_change.s0.{kind}" for kind in ("val.h5ad", "test.h5ad", "gallery.h5ad", "metrics.parquet")}
    members = [ad.read_h5ad(folder / f"careful.s{s}.test.h5ad") for s in range(3)]
    both = ad.read_h5ad(folder / "careful_ensemble.s0.test.h5ad")
    assert len({m.X[0, 0] for m in members}) == 3
    assert_allclose(both.X[0, 0], np.mean([m.X[0, 0] for m in members]), rtol=1e-6)
    assert_allclose(both.layers["var"][0, 0], np.var([m.X[0, 0] for m in members], ddof=1) + .5, rtol=1e-5)
    assert ad.read_h5ad(folder / "careful.s1.gallery.h5ad").n_obs == 8 + 28
    assert set(trial.history["seed"]) == {0, 1, 2} and (trial.history["split"] == split.name).all()
    assert set(trial.scores["model"]) == {"no_change", "careful", "careful_ensemble"} and sorted(trial.scores.query("model == 'careful'")["seed"].unique()) == [0, 1, 2]
    again = hold_trial(run, effects, [split], [Careful], cells=cells, seeds=1)  # what three seeds left goes
    assert {f.name for f in folder.glob("careful*.parquet")} == {"careful.s0.metrics.parquet"} and np.array_equal(again.shown[split.name][0]["careful"], members[0].X)


def test_changes_reach_the_model_and_a_checkpoint_survives_until_the_end(run):
    effects, cells = screen()
    split = make_split(effects, "doubles")
    one, two = (hold_trial(run, effects, [split], [Careful], cells=cells, changes=dict(level=v)).fitted[split.name, "careful", 0].value for v in (1., 4.))
    assert_allclose(two - one, 3)

    class Dies(Careful):
        name = "dies"
        def learn(self, val):
            found = self.checkpoint.exists()
            super().learn(val)
            if not found: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): hold_trial(run, effects, [split], [Dies], cells=cells)
    assert run.results(split.name, "dies.s0.checkpoint.pt").exists()
    hold_trial(run, effects, [split], [Dies], cells=cells)  # finds it, goes on
    assert not run.results(split.name, "dies.s0.checkpoint.pt").exists() and run.results(split.name, "dies.s0.weights.pt").exists()


def test_what_does_not_apply_is_one_line_and_leaves_notes_for_figures(run):
    effects, _ = screen()
    split = make_split(effects, "combination")
    trial = hold_trial(run, effects, [split], [Careful, Graphic])
    assert not trial.shown and len(trial.scores) == 0
    assert "careful: needs single cells" in trial.why and "graphic: needs prior knowledge" in trial.why and "\n" not in trial.why
    assert len(save_error(trial, "toy")) == 0
    save_training(trial, "toy"), save_predicted(trial, effects, "toy")
    assert {f.name for f in run.figures.glob("*")} == {f"toy_{what}.note.txt" for what in ("error", "training", "predicted")}
    partly = hold_trial(run, effects, [split], [Careful, Mean])
    save_predicted(partly, effects, "partly", ["careful"])  # what is there stands in for what did not apply
    assert set(pd.read_csv(run.figures / "partly_predicted.csv")["model"]) == {"mean"}
    skipped = hold_trial(run, effects, [split], [NoChange], skip="replicate combination")
    assert not skipped.shown and "parameter 'skip'" in skipped.why


def test_a_permuted_model_gets_the_permuted_prior(run):
    effects, _ = screen()

    class Prior:
        def permuted(self, rng): return f"permuted {rng.integers(10**9)}"
    given = {}

    class Plain(Mean):
        name, needs = "plain", ("graph",)
        def learn(self, val): given[self.name] = self.priors
    class Exchanged(Plain): name, permuted = "exchanged", True
    prior = Prior()
    split = make_split(effects, "combination")
    hold_trial(run, effects, [split], [Plain, Exchanged], priors=prior)
    first = given["exchanged"]
    hold_trial(run, effects, [split], [Exchanged], priors=prior)
    assert given["plain"] is prior and first.startswith("permuted") and given["exchanged"] == first


def test_figures_stand_beside_the_baselines(run, capsys):
    effects, cells = screen()
    split = make_split(effects, "combination")
    hold_trial(run, effects, [split], [NoChange, Mean])  # as notebook 08 does
    trial = hold_trial(run, effects, [split], [Careful], cells=cells)
    error = save_error(trial, "toy")
    save_training(trial, "toy"), save_predicted(trial, effects, "toy")
    assert set(error["model"]) == {"no_change", "mean", "careful"} and np.isclose(error.query("model == 'mean'")["value"], 1).all()
    said = capsys.readouterr().out
    assert "careful has" in said and "of the error of mean" in said
    assert {f.stem for f in run.figures.glob("*.png")} == {"toy_error", "toy_training", "toy_predicted"}
    assert json.loads((run.figures / "toy_error.json").read_text())["caption"].startswith("Error of the models of this notebook")
    assert {"l2", "pearson_centred"} <= set(score_table(trial).columns)


def table(values, stratum="combo_seen2"):
    return pd.DataFrame([(f"P{i}|CRISPRa|||x", m, "l2", v, stratum) for m, column in values.items() for i, v in enumerate(column)], columns=["condition", "model", "metric", "value", "stratum"])


def test_the_order_of_figures_names_every_model():
    for step in ZOO: importlib.import_module("perturb_research." + step.partition("_")[2])
    def below(cls): return {cls} | {c for sub in cls.__subclasses__() for c in below(sub)}
    names = [c.name for c in below(Model) if c.__module__.startswith("perturb_research.") and c.__module__ != "perturb_research.drugs.candidate" and c.name]  # inverse models are no rows of forward figures
    assert sorted(set(names)) == sorted(ORDER)


def test_verdicts_are_paired():
    rng = np.random.default_rng(0)
    base = rng.uniform(1, 10, 40)  # conditions differ far more than the models do
    scores = table({"mean": base, "good": .9 * base, "same": base * rng.uniform(.9, 1.1, 40), "bad": 1.2 * base})
    found = verdicts(scores, ["good", "same", "bad"]).set_index("model")
    assert list(found.loc[["good", "same", "bad"], "verdict"]) == ["better", "not told apart", "worse"]
    assert_allclose(found.loc["good", ["ratio", "low", "high"]].astype(float), .9)
    assert (found["n"] == 40).all() and verdicts(scores, ["nobody"]).empty


def test_seeds_and_splits_are_averaged_before_perturbations():
    scores = pd.concat([table({"mean": [2., 4.], "m": [1., 3.]}), table({"m": [3., 1.]})])
    assert_allclose(summary(scores, "l2", "mean").set_index("model").loc["m", "value"], 2 / 3)
    bounds = table({"noise_free": [1., 1.]})
    assert summary(scores, "l2", "mean", bounds=bounds).query("model == 'noise_free'")["value"].item() == pytest.approx(1 / 3)
    assert "noise_free" not in set(summary(scores, "l2", "mean", bounds=bounds[:1].assign(condition="other"))["model"])


def test_a_gallery_holds_unseen_genes_where_genes_are_held_out():
    obs = pd.DataFrame({"perturbation": ["A", "B", "C", "A+B"], "perturbation_type": "CRISPRa", "context": "x", "dose": np.nan, "time_h": np.nan})
    known = dict(train=obs[:2], val=obs[3:], test=obs[2:3])
    asked = lambda kind, seed=0: gallery_of(SimpleNamespace(kind=kind, seed=seed), known, lambda rows: sorted(rows["perturbation"]))
    assert asked("combination") == {"gallery": ["A", "A+B", "B", "C"]}
    assert asked("doubles") == asked("replicate") == {"gallery": ["A", "B"]}
    assert asked("context") == asked("combination", seed=1) == {}
