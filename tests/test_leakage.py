"The leakage audit: every leak planted, each found by its own check; a clean split raises nothing; inputs of models; bad input in one line."
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import SHARED, needs_shared

from perturb_research.core import Problem
from perturb_research.data.labels import condition_ids
from perturb_research.data.leakage import CHECKS, SEVERITIES, Limits, audit, duplicates, leaks, nearest_effects, own_gene_ranks, reliability, several_names, sides, who_is_who
from perturb_research.data.labels import describe
from perturb_research.data.preprocess import is_condition_level, measure, read_effects
from perturb_research.data.read import read_screen
from perturb_research.data.splits import Split, make_split

IMATINIB = "Cc1ccc(NC(=O)c2ccc(CN3CCN(C)CC3)cc2)cc1Nc1nccc(-c2cccnc2)n1"
SMILES = {"Imatinib": IMATINIB, "Aspirin": "CC(=O)Oc1ccccc1C(=O)O", "Caffeine": "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "Naproxen": "COc1ccc2cc(ccc2c1)C(C)C(=O)O",
          "Cortisone": "CC12CCC(=O)C=C1CCC1C2C(=O)CC2(C)C1CCC2(O)C(=O)CO", "Dopamine": "NCCc1ccc(O)c(O)c1", "Metformin": "CN(C)C(=N)NC(=N)N", "Nicotine": "CN1CCCC1c1cccnc1"}


def effects_of(rows, n_genes=120, noise=.4, seed=0, **more):
    "Effects of `rows` (perturbation, type, dose, time, context) with halves; each molecule or gene has its own effect."
    obs = pd.DataFrame(rows, columns=["perturbation", "perturbation_type", "dose", "time_h", "context"]).assign(**more)
    obs.index = condition_ids(obs).to_numpy()
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(len(obs), n_genes))
    halves = {h: (signal + noise * rng.normal(size=signal.shape)).astype("float32") for h in ("half1", "half2")}
    return ad.AnnData((halves["half1"] + halves["half2"]) / 2, obs, pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)]), layers=halves, uns={"dataset_id": "toy", "halves_share_controls": False})


def screen_of_genes():
    names = [*"ABCDEFGHIJ", "A+B", "A+C", "B+C", "C+D", "A+G", "G+H", "B+D"]
    effects = effects_of([(p, "CRISPRi", np.nan, np.nan, "x") for p in names])
    test = ["G", "H", "B+C", "C+D", "A+G", "G+H"]
    where = dict(zip(effects.obs["perturbation"], effects.obs_names))
    labels = dict(zip((where[t] for t in test), ["single_unseen"] * 2 + ["combo_seen2"] * 2 + ["combo_seen1", "combo_seen0"]))
    ids = {"train": [where[p] for p in ("A", "B", "C", "D", "E", "F", "A+B", "A+C", "B+D")], "val": [where[p] for p in "IJ"], "test": [where[t] for t in test]}
    return effects, Split("toy", "combination", 0, ids, labels, 60)


def screen_of_drugs(extra=(), contexts=("x", "y")):
    "Drugs at two doses in two lines; the test holds out Imatinib, Caffeine and Naproxen; `extra`: further (name, smiles), trained on."
    drugs = [*SMILES.items(), *extra]
    effects = effects_of([(p, "drug", d, 24., c) for p, _ in drugs for d in (1., 10.) for c in contexts], smiles=[s for _, s in drugs for _ in range(2 * len(contexts))])
    held = effects.obs["perturbation"].isin(["Imatinib", "Caffeine", "Naproxen"])
    test, train = list(effects.obs_names[held]), list(effects.obs_names[~held])
    return effects, Split("toy", "perturbation", 0, {"train": train, "val": [], "test": test}, dict.fromkeys(test, "drug_unseen"), 500)


def cells_for(effects, split, own_batch=True, own_controls=True):
    "Ten cells a condition; the test in a batch with controls of its own, or not."
    rows = [(c, effects.obs.at[c, "context"], "b2" if c in split.ids["test"] and own_batch else "b1", False) for c in effects.obs_names for _ in range(10)]
    rows += [("", k, b, True) for k in effects.obs["context"].unique() for b in (("b1", "b2") if own_controls else ("b1",)) for _ in range(10)]
    return pd.DataFrame(rows, columns=["condition", "context", "batch", "is_control"])


def moved(split, **changes):
    "The split with other ids (train, val, test) or fields."
    ids = split.ids | {part: changes.pop(part) for part in ("train", "val", "test") if part in changes}
    return replace(split, ids=ids, **changes)


def copied(effects, source, target, noise=0.):
    "Effects in which condition `target` has the cells of `source`, up to a little noise."
    effects = effects.copy()
    i, j = effects.obs_names.get_loc(target), effects.obs_names.get_loc(source)
    extra = noise * np.random.default_rng(1).normal(size=effects.n_vars)
    effects.X[i] = effects.X[j] + extra
    for half in ("half1", "half2"): effects.layers[half][i] = effects.layers[half][j] + extra
    return effects


def row(table, name): return table.set_index("check").loc[name]


@pytest.mark.parametrize("screen", [screen_of_genes, screen_of_drugs])
def test_a_clean_split_raises_nothing(screen):
    effects, split = screen()
    train = split.train(effects)
    given = dict(train=train, genes=list(train.var_names), mean=train.X.mean(0), sd=train.X.std(0, ddof=1))
    table = audit(effects, split, cells=cells_for(effects, split), inputs=given)
    assert list(table["check"]) == list(CHECKS) and set(table["severity"]) <= set(SEVERITIES)
    assert set(table["severity"]) == {"clean", "not applicable"}, table[table["severity"].isin(["leak", "notice"])][["check", "found"]].to_string()
    assert (table["conditions"] == 0).all() and (table[["found", "meaning", "mend"]] != "").all(axis=None)
    for name in ("condition_overlap", "called_new", "shared_controls", "shared_batches", "near_duplicates", "input_rows", "gene_selection", "input_scaling"): assert row(table, name)["severity"] == "clean"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["combination", "doubles", "replicate"])
def test_splits_drawn_here_have_no_leak(kind, seed):
    effects, _ = screen_of_genes()
    split = make_split(effects, kind, seed, n_genes=60)
    assert leaks(audit(effects, split, inputs=split.train(effects))) == []


def test_a_test_condition_in_training_or_validation():
    effects, split = screen_of_genes()
    test = split.ids["test"]
    for part in ("train", "val"):
        table = audit(effects, moved(split, **{part: [*split.ids[part], test[0]]}))
        assert row(table, "condition_overlap")[["severity", "conditions", "examples"]].tolist() == ["leak", 1, test[0]]
        assert leaks(table)[0] == "condition_overlap" and set(leaks(table)) <= {"condition_overlap", "near_duplicates", "constituents"}


def test_a_condition_under_another_id():
    "The same genes in another order and case, measured anew, are one condition."
    effects, split = screen_of_genes()
    i = effects.obs_names.get_loc(split.ids["train"][4])
    effects.obs["perturbation"] = effects.obs["perturbation"].astype(str)
    effects.obs.iloc[i, 0] = "c+B"
    assert leaks(audit(effects, split)) == ["condition_overlap"]


def test_what_is_called_new_was_trained_on():
    effects, split = screen_of_drugs()
    low = [c for c in split.ids["test"] if "Imatinib|drug|1|" in c]  # the low dose goes to training, the high one is asked for
    table = audit(effects, moved(split, train=split.ids["train"] + low, test=[c for c in split.ids["test"] if c not in low]))
    assert leaks(table) == ["called_new"] and row(table, "called_new")["conditions"] == 2
    in_context = moved(split, strata=dict.fromkeys(split.strata, "context_unseen"))
    assert leaks(audit(effects, in_context)) == ["called_new"]
    effects, split = screen_of_genes()  # a gene called unseen stands in a trained combination
    assert leaks(audit(effects, moved(split, train=[*split.ids["train"], split.ids["test"][4]], test=split.ids["test"][:4]))) == ["called_new"]


@pytest.mark.parametrize("stratum, leak", [("pair_unseen", False), ("dose_unseen", False), ("context_unseen", True), ("drug_unseen", True)])
def test_each_claim_by_its_own_columns(stratum, leak):
    "One line of a drug is asked for, the other trained on: a new pair, no new context, no new drug."
    effects, split = screen_of_drugs()
    asked = [c for c in split.ids["test"] if c.endswith("|x")]
    ids = dict(train=[c for c in effects.obs_names if c not in asked], val=[], test=asked)
    assert leaks(audit(effects, replace(split, ids=ids, strata=dict.fromkeys(asked, stratum)))) == (["called_new"] if leak else [])


def test_a_stratum_that_hides_what_was_seen():
    effects, split = screen_of_genes()
    wrong = split.strata | {split.ids["test"][2]: "combo_seen0"}
    table = audit(effects, moved(split, strata=wrong))
    assert leaks(table) == ["constituents"] and "combo_seen0, 2 trained on alone" in row(table, "constituents")["examples"]
    harder = audit(effects, moved(split, strata=split.strata | {split.ids["test"][5]: "combo_seen2"}))
    assert row(harder, "constituents")["severity"] == "notice"  # asked for more than it claims
    without_b = [c for c in split.ids["train"] if not c.startswith("B|")]  # B stays known through A+B
    through = audit(effects, moved(split, train=without_b, strata=split.strata | {split.ids["test"][2]: "combo_seen1"}))
    assert row(through, "constituents")[["severity", "conditions"]].tolist() == ["notice", 1]


@pytest.mark.parametrize("name, smiles", [("STI-571", IMATINIB), ("Imatinib mesylate", f"{IMATINIB}.CS(=O)(=O)O"), ("IMATINIB (hydrochloride)", ""), ("xyz-1", IMATINIB.replace("NC(=O)", "[NH]C(=O)") + ".Cl")])
def test_the_same_drug_under_another_name_or_salt(name, smiles):
    effects, split = screen_of_drugs([(name, smiles)])
    table = audit(effects, split)
    assert set(leaks(table)) == {"same_drug"} and row(table, "same_drug")["conditions"] == 4
    assert "Imatinib = " + name in row(table, "same_drug")["examples"]
    assert list(several_names(who_is_who(effects.obs))) == ["KTUFNOKKBVMGRW"]


def test_two_names_of_one_drug_where_the_drug_is_not_new():
    "In a split by context nothing is broken, but the drug stands there twice."
    effects, split = screen_of_drugs([("STI-571", IMATINIB)])
    asked = [c for c in effects.obs_names if c.endswith("|y") and "STI" not in c]
    ids = dict(train=[c for c in effects.obs_names if c.endswith("|x")], val=[], test=asked)
    table = audit(effects, replace(split, kind="context", ids=ids, strata=dict.fromkeys(asked, "context_unseen")))
    assert leaks(table) == [] and row(table, "same_drug")[["severity", "conditions"]].tolist() == ["notice", 2]


@pytest.mark.parametrize("kind, severity", [("perturbation", "notice"), ("scaffold", "leak")])
def test_the_same_scaffold(kind, severity):
    "Ketoprofen-like relatives: another drug with Naproxen's naphthalene is trained on."
    effects, split = screen_of_drugs([("Nabumetone", "CC(=O)CCc1ccc2cc(OC)ccc2c1")])
    split = replace(split, kind=kind, strata={c: f"{'drug' if kind == 'perturbation' else 'scaffold'}_unseen" for c in split.strata})
    table = audit(effects, split)
    assert row(table, "same_scaffold")[["severity", "conditions"]].tolist() == [severity, 4] and leaks(table) == (["same_scaffold"] if severity == "leak" else [])


@pytest.mark.parametrize("column, what", [("targets", "target"), ("mechanism", "mechanism")])
def test_a_target_or_mechanism_that_is_called_unseen(column, what):
    effects, split = screen_of_drugs()
    effects.obs[column] = effects.obs["perturbation"].astype(str).map({"Imatinib": "ABL1;KIT", "Caffeine": "ADORA2A", "Naproxen": "PTGS1", "Nicotine": "CHRNA4; KIT"}).fillna("unknown")
    named = replace(split, kind=what, strata=dict.fromkeys(split.strata, f"{what}_unseen"))
    table = audit(effects, named)
    assert leaks(table) == [f"same_{what}"] and row(table, f"same_{what}")["conditions"] == 4
    honest = replace(named, strata={c: "drug_unseen" if "Imatinib" in c else s for c, s in named.strata.items()})
    assert row(audit(effects, honest), f"same_{what}")["severity"] == "notice"
    assert row(audit(effects, split), f"same_{what}")["severity"] == "not applicable"


@pytest.mark.parametrize("own_batch, own_controls, expected", [(True, True, ("clean", "clean")), (False, True, ("notice", "notice")), (True, False, ("notice", "clean"))])
def test_shared_controls_and_batches(own_batch, own_controls, expected):
    effects, split = screen_of_genes()
    table = audit(effects, split, cells=cells_for(effects, split, own_batch, own_controls))
    assert tuple(row(table, c)["severity"] for c in ("shared_controls", "shared_batches")) == expected and leaks(table) == []


def test_cells_can_be_anndata_or_counted_groups():
    effects, split = screen_of_genes()
    cells = cells_for(effects, split, own_batch=False)
    groups = cells.groupby(["condition", "context", "batch", "is_control"]).size().rename("n_cells").reset_index()
    named = groups["condition"].str.split("|", expand=True).reindex(columns=range(5))
    groups = groups.drop(columns="condition").assign(perturbation=named[0], perturbation_type=named[1], dose=np.nan, time_h=np.nan)
    found = [audit(effects, split, cells=c)[["severity", "found"]] for c in (cells, ad.AnnData(obs=cells.set_axis(cells.index.astype(str))), groups)]
    assert found[0].equals(found[1]) and found[0].equals(found[2])


def test_halves_with_the_same_controls():
    effects, _ = screen_of_genes()
    split = make_split(effects, "replicate")
    assert row(audit(effects, split), "shared_controls")["severity"] == "clean"
    effects.uns["halves_share_controls"] = True
    assert row(audit(effects, split), "shared_controls")[["severity", "share"]].tolist() == ["notice", 1]


@pytest.mark.parametrize("noise", [0., .05])
def test_a_test_effect_under_another_name_in_training(noise):
    effects, split = screen_of_genes()
    table = audit(copied(effects, split.ids["test"][0], split.ids["train"][4], noise), split)
    assert leaks(table) == ["near_duplicates"] and row(table, "near_duplicates")["conditions"] == 1
    bare = ad.AnnData(copied(effects, split.ids["test"][0], split.ids["train"][4], noise / 10).X, effects.obs, effects.var, uns=effects.uns)
    assert leaks(audit(bare, split)) == ["near_duplicates"]  # without halves, by correlation alone


@pytest.mark.parametrize("noise", [.1, .5, 2.])
def test_the_same_effect_measured_twice_is_no_copy(noise):
    "A training condition that truly does the same, measured with cells of its own, correlates as expected and is no leak."
    effects, split = screen_of_genes()
    a, b = (effects.obs_names.get_loc(c) for c in (split.ids["test"][0], split.ids["train"][4]))
    rng = np.random.default_rng(3)
    signal = rng.normal(size=effects.n_vars)
    for i in (a, b):
        for half in ("half1", "half2"): effects.layers[half][i] = signal + noise * rng.normal(size=effects.n_vars)
        effects.X[i] = (effects.layers["half1"][i] + effects.layers["half2"][i]) / 2
    near = nearest_effects(sides(effects, split)).set_index("condition").loc[split.ids["test"][0]]
    assert leaks(audit(effects, split)) == []
    if noise < 1: assert near["nearest"] == split.ids["train"][4] and abs(near["correlation"] - near["expected"]) < .1


def test_reliability_is_that_of_spearman_and_brown():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(20, 3000))
    a, b = (signal + rng.normal(size=signal.shape) for _ in range(2))
    effects = ad.AnnData((a + b) / 2, layers=dict(half1=a, half2=b))
    assert np.allclose(reliability(effects, whole=False), [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)], atol=1e-5)
    assert abs(reliability(effects).mean() - 2 / 3) < .02
    effects.layers["half1"][0] = np.nan
    assert np.isnan(reliability(effects).iloc[0])


def test_a_replicate_whose_halves_are_one():
    effects, _ = screen_of_genes()
    effects.layers["half2"][:5] = effects.layers["half1"][:5]
    table = audit(effects, make_split(effects, "replicate"))
    assert leaks(table) == ["near_duplicates"] and row(table, "near_duplicates")["conditions"] == 5


def test_the_limits_move_the_lines():
    table = pd.DataFrame({"correlation": [.95, .9, .999], "expected": [.8, .8, np.nan]})
    assert duplicates(table).tolist() == [False, False, True]
    assert duplicates(table, Limits(noise_share=.3, identical=.9999)).tolist() == [True, False, False]


def test_the_perturbed_gene_gives_itself_away():
    effects, split = screen_of_genes()
    g = split.ids["test"][0]
    effects.var_names = ["G", *effects.var_names[1:]]
    loud = effects.copy()
    loud.X[loud.obs_names.get_loc(g), 0] = -9  # CRISPRi: down
    split = replace(split, n_genes=effects.n_vars)
    table = audit(loud, split)
    assert leaks(table) == [] and row(table, "own_gene_visible")["severity"] == "notice" and f"{g} (rank 1)" in row(table, "own_gene_visible")["examples"]
    up = effects.copy()
    up.X[up.obs_names.get_loc(g), 0] = 9  # the wrong way
    assert np.isinf(own_gene_ranks(up[[g]])["rank"]).all()
    query = split.test(loud).to_df()
    shown = audit(loud, split, inputs={"query": query})
    assert leaks(shown) == ["query_shows_target"] and row(shown, "query_shows_target")["conditions"] == 3  # G, A+G and G+H
    assert leaks(audit(loud, split, inputs={"query": query.assign(G=np.nan)})) == [] == leaks(audit(loud, split, inputs={"query": query.assign(G=0.)}))


def test_rows_given_to_a_model():
    effects, split = screen_of_genes()
    train, test = split.train(effects), split.ids["test"]
    genes = train.var_names
    seen = [c for part in ("train", "val") for c in split.ids[part]]
    assert leaks(audit(effects, split, inputs=train)) == [] == leaks(audit(effects, split, inputs=effects[seen]))
    assert leaks(audit(effects, split, inputs=effects[split.ids["train"] + test[:2], genes])) == ["input_rows"]
    renamed = effects[split.ids["train"] + test[:2], genes].to_df().set_axis([f"row{i}" for i in range(len(split.ids["train"]) + 2)])
    table = audit(effects, split, inputs={"train": renamed})
    assert leaks(table) == ["input_rows"] and row(table, "input_rows")["conditions"] == 2
    hidden = train.copy()
    hidden.layers["more"] = np.array(hidden.X)
    hidden.layers["more"][0] = effects[test[0], genes].X
    assert row(audit(effects, split, inputs=hidden), "input_rows")[["severity", "conditions"]].tolist() == ["leak", 1]


def test_a_replicate_split_with_whole_effects_as_input():
    effects, _ = screen_of_genes()
    split = make_split(effects, "replicate")
    assert leaks(audit(effects, split, inputs=split.train(effects))) == []
    assert leaks(audit(effects, split, inputs=effects)) == ["input_rows"]


@pytest.mark.parametrize("rule", [lambda X: (X**2).mean(0), lambda X: X.var(0)])
def test_genes_chosen_with_test_rows(rule):
    effects, split = screen_of_genes()
    train, test = split.ids["train"], split.ids["test"]
    effects.X[effects.obs_names.get_indexer(test), :6] *= 4
    choose = lambda ids: list(effects.var_names[np.argsort(-rule(effects[ids].X), kind="stable")[:60]])
    for clean in (train, train + split.ids["val"]): assert leaks(audit(effects, split, inputs={"genes": choose(clean)})) == []
    for dirty in (train + test, list(effects.obs_names)):
        table = audit(effects, split, inputs={"genes": choose(dirty)})
        assert leaks(table) == ["gene_selection"] and row(table, "gene_selection")["share"] == 1
    other = audit(effects, split, inputs={"genes": sorted(effects.var_names)[::2]})
    assert row(other, "gene_selection")["severity"] == "not applicable" and "no rule known here" in row(other, "gene_selection")["found"]


@pytest.mark.parametrize("name, statistic", [("mean", lambda X: X.mean(0)), ("sd", lambda X: X.std(0)), ("sd", lambda X: X.std(0, ddof=1))])
def test_scalers_fitted_on_test_rows(name, statistic):
    effects, split = screen_of_genes()
    train, test = split.ids["train"], split.ids["test"]
    given = lambda ids: {name: pd.Series(statistic(effects[ids].X), effects.var_names)}
    for clean in (train, train + split.ids["val"]): assert leaks(audit(effects, split, inputs=given(clean))) == []
    for dirty in (train + test, list(effects.obs_names)): assert leaks(audit(effects, split, inputs=given(dirty))) == ["input_scaling"]
    unknown = audit(effects, split, inputs={name: np.full(effects.n_vars, 7.)})
    assert row(unknown, "input_scaling")["severity"] == "not applicable"


@pytest.mark.parametrize("wrong, says", [
    (dict(inputs={"gene": []}), "inputs: 'gene' is unknown; expected train"),
    (dict(inputs={"genes": ["nothing"]}), "none of the genes given is in the effects"),
    (dict(inputs={"mean": [1., 2.]}), "mean has 2 numbers for 120 genes"),
    (dict(inputs={"train": [1, 2]}), "train is list; expected AnnData or DataFrame"),
    (dict(inputs={"train": pd.DataFrame({"other": [1.]}, index=["a"])}), "train has 0 of the genes"),
    (dict(inputs={"query": pd.DataFrame({"gene1": [1.]}, index=["a"])}), "query has none of the test conditions"),
    (dict(cells=pd.DataFrame({"condition": ["a"], "batch": ["b"]})), "cells: no column 'context'"),
])
def test_bad_input_is_one_line(wrong, says):
    effects, split = screen_of_genes()
    with pytest.raises(Problem, match=says) as error: audit(effects, split, **wrong)
    assert "\n" not in str(error.value)


def test_a_split_of_other_conditions_is_refused():
    effects, split = screen_of_genes()
    with pytest.raises(Problem, match="made for data set other"): audit(effects, replace(split, dataset_id="other"))
    with pytest.raises(Problem, match="Z\\|CRISPRi"): audit(effects, moved(split, test=["Z|CRISPRi|||x"]))
    with pytest.raises(Problem, match="has no test conditions"): audit(effects, moved(split, test=[]))


def from_file(path):
    "Effects of a real screen, as notebook 04 makes them."
    screen = read_screen(SHARED / path)
    table, report = describe(screen)
    effects = read_effects(screen, table, report) if is_condition_level(table) else measure(screen, table)[0]
    effects.uns["dataset_id"] = path
    return effects


@needs_shared
def test_drugs_of_l1000_under_several_names():
    "Seven molecules stand in this screen under two names; a split that parts them has a leak, whatever the names say."
    effects = from_file("l1000/l1000_ht115_355drugs.h5ad")
    twice = several_names(who_is_who(effects.obs))
    assert ["sirolimus #1", "sirolimus #2"] in twice.values() and ["tipifarnib", "tipifarnib-P2"] in twice.values() and len(twice) == 7
    test = list(effects.obs_names[effects.obs["perturbation"] == "tipifarnib"])
    split = Split(effects.uns["dataset_id"], "perturbation", 0, {"train": [c for c in effects.obs_names if c not in test], "val": [], "test": test}, dict.fromkeys(test, "drug_unseen"), 2000)
    table = audit(effects, split)
    assert leaks(table) == ["same_drug"] and row(table, "same_drug")["examples"] == "tipifarnib = tipifarnib-P2 (PLHJCIYEEKOWNM)"


@needs_shared
def test_activated_genes_of_norman_name_themselves():
    effects = from_file("norman/norman_effects.h5ad")
    split = make_split(effects, "combination")
    table = audit(effects, split)
    assert leaks(table) == [] and row(table, "own_gene_visible")["severity"] == "notice" and row(table, "own_gene_visible")["share"] > .5
    assert row(audit(from_file("carpool/carpool_effects.h5ad"), make_split(from_file("carpool/carpool_effects.h5ad"), "combination")), "own_gene_visible")["share"] < .1
