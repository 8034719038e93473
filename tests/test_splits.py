"Splits: what each kind holds out, that draws depend on seed and names alone, options, and every way in which a split can be wrong."
import json
from collections import Counter

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SHARED, needs_shared, run_here

from perturb_research.core import Problem, Run, effective, sha256
from perturb_research.data.labels import condition_ids, parts_of
from perturb_research.data.splits import (FRACTIONS, KINDS, PARTS, Split, checked_split, freeze, frozen, load_split, load_splits, make_split,
                                          split_name, strata)


def effects_of(obs, genes=6, halves=False, seed=0, **uns):
    "Effects of random numbers for the conditions in `obs`."
    obs = obs.copy()
    for column in ("dose", "time_h"):
        if column not in obs: obs[column] = np.nan
    obs.index = condition_ids(obs).to_numpy()
    assert obs.index.is_unique
    X = np.random.default_rng(seed).normal(size=(len(obs), genes)).astype(np.float32)
    return ad.AnnData(X, obs, pd.DataFrame(index=[f"G{i}" for i in range(genes)]), uns={"dataset_id": "toy"} | uns, layers={"half1": X + 1, "half2": X - 1} if halves else None)


def genes():
    "Twelve genes and twenty pairs in three contexts."
    rng = np.random.default_rng(1)
    singles = list("ABCDEFGHIJKL")
    pairs = sorted({"+".join(sorted(rng.choice(singles, 2, replace=False))) for _ in range(26)})[:20]
    obs = pd.DataFrame([(p, "CRISPRa", c) for c in ("x", "y", "z") for p in [*singles, *pairs]], columns=["perturbation", "perturbation_type", "context"])
    return effects_of(obs.assign(n_cells=rng.integers(5, 200, len(obs)).astype(float)), halves=True)


RINGS = ["c1ccccc1", "C1CCCCC1", "c1ccncc1", "c1ccsc1", "c1ccoc1", "C1CCNCC1", "c1ccc2ccccc2c1", "C1CCOC1"]


def drugs(contexts=5):
    "Twenty-six drugs at three doses in some contexts: eight scaffolds of three, two without a ring; ten targets; one drug of which nothing is known."
    rows = []
    for i in range(24):
        tail, salt = "C" * (i // 8) + "O", ".Cl" * (i % 2)
        targets = f"T{i % 10}" + (";T9" if i % 6 == 0 else "")
        rows.append((f"drug {i}", f"{tail}{RINGS[i % 8]}{salt}", targets, f"{'T%d' % (i % 10)} inhibitor"))
    rows += [("chain one", "CCCO", "T3", "T3 inhibitor"), ("chain two", "CCN", "", ""), ("secret", "", "", "unclear")]
    table = pd.DataFrame(rows, columns=["perturbation", "smiles", "targets", "mechanism"]).assign(perturbation_type="drug")
    obs = table.merge(pd.DataFrame({"dose": [.1, 1., 10.]}), how="cross").merge(pd.DataFrame({"context": [f"line{i}" for i in range(contexts)]}), how="cross")
    obs = obs[~((obs["perturbation"] == "drug 3") & (obs["context"] == "line0") & (obs["dose"] < 10))]  # its highest dose stands alone there
    return effects_of(obs.assign(n_cells=100.))


GENETIC, CHEMICAL = genes(), drugs()
CASES = [(GENETIC, k) for k in ("perturbation", "combination", "doubles", "context", "leave_context_out", "pairs", "both", "kfold", "replicate")]
CASES += [(CHEMICAL, k) for k in ("perturbation", "context", "leave_context_out", "pairs", "both", "scaffold", "target", "mechanism", "dose", "kfold")]


def obs_of(effects, split, part): return effects.obs.loc[split.ids[part]]


def keys(conditions, *columns): return set(zip(*(conditions[c].astype(str) for c in columns)))


@pytest.mark.parametrize("effects, kind", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_parts_are_apart_and_draws_do_not_hang_on_row_order(effects, kind):
    split = make_split(effects, kind, seed=1)
    train, val, test = (set(split.ids[p]) for p in PARTS)
    assert train and test and (train | val | test) <= set(effects.obs_names)
    assert (train == test) if kind == "replicate" else not (train & test or train & val or val & test)
    assert set(split.strata) == val | test
    shuffled = effects[np.random.default_rng(3).permutation(effects.n_obs)].copy()
    assert make_split(shuffled, kind, seed=1) == split and make_split(effects, kind, seed=1).hash == split.hash
    assert checked_split(json.loads(json.dumps(split.content())), "it") == split
    if kind not in ("replicate", "dose"): assert make_split(effects, kind, seed=2).ids["test"] != split.ids["test"]


def test_the_committed_splits_load_and_are_what_the_draw_gives():
    index = json.loads((ROOT / "data/splits/index.json").read_text())
    for name, digest in index.items():
        split = load_split(ROOT / "data/splits" / f"{digest}.json")
        assert split.hash == digest and name.split("/")[1] == split.name == f"{split.kind}.s{split.seed}" and split.content()["schema"] == 1


def test_existing_kinds_still_draw_as_they_did():
    "Hashes of the ids that the first version of this notebook drew for the same screen."
    singles = effects_of(pd.DataFrame(dict(perturbation=[f"g{i:02}" for i in range(40)], perturbation_type="CRISPRi", context="x")))
    pairs = GENETIC[GENETIC.obs["context"] == "x"].copy()
    found = {kind: make_split(effects, kind).hash[:12] for kind, effects in (("perturbation", singles), ("combination", pairs), ("doubles", pairs), ("context", CHEMICAL))}
    assert found == FIRST_HASHES


FIRST_HASHES = {'perturbation': 'ea416a9317d0', 'combination': '8d98c2ed54ce', 'doubles': 'f4dcc0317048', 'context': 'c13f1f5baf0e'}


# What each kind promises

def test_an_unseen_gene_is_nowhere_in_training_and_strata_count_the_seen_ones():
    split = make_split(GENETIC, "combination")
    alone = {p[0] for p in parts_of(obs_of(GENETIC, split, "train")) if len(p) == 1}
    labels = keys(obs_of(GENETIC, split, "train"), "perturbation")
    for c, said in split.strata.items():
        mine = GENETIC.obs.loc[c, "perturbation"].split("+")
        if (("+".join(mine),) in labels): assert said in ("pair_unseen", "context_unseen")
        elif len(mine) > 1: assert said == f"combo_seen{sum(g in alone for g in mine)}"
        else: assert said == "single_unseen" and not any(mine[0] in p for p in parts_of(obs_of(GENETIC, split, "train")))


def test_leave_context_out_walks_through_all_contexts_and_asks_only_for_trained_perturbations():
    tests = [set(obs_of(CHEMICAL, make_split(CHEMICAL, "leave_context_out", s), "test")["context"]) for s in range(5)]
    assert tests == [{f"line{i}"} for i in range(5)]
    assert make_split(CHEMICAL, "leave_context_out", 5) == "seed 5: there are 5 contexts that share perturbations, counted from 0"
    fewer = CHEMICAL[~((CHEMICAL.obs["perturbation"] == "drug 1") & (CHEMICAL.obs["context"] != "line0"))].copy()
    split = make_split(fewer, "leave_context_out")
    assert "drug 1" not in set(obs_of(fewer, split, "test")["perturbation"]) and "line0" not in set(obs_of(fewer, split, "train")["context"])
    assert set(split.strata.values()) == {"context_unseen"}


def test_pairs_leave_every_perturbation_and_context_in_training():
    for effects in (GENETIC, CHEMICAL):
        split = make_split(effects, "pairs", 4)
        train, asked = obs_of(effects, split, "train"), effects.obs.loc[split.ids["test"] + split.ids["val"]]
        assert keys(asked, "perturbation") <= keys(train, "perturbation") and keys(asked, "context") <= keys(train, "context")
        assert not keys(asked, "perturbation", "context") & keys(train, "perturbation", "context")
        assert set(split.strata.values()) == {"pair_unseen"}
        n = len(keys(effects.obs, "perturbation", "context"))
        assert len(keys(obs_of(effects, split, "test"), "perturbation", "context")) == round(.2 * n)
    lonely = effects_of(pd.DataFrame(dict(perturbation=list("ABC"), perturbation_type="drug", context=list("xyz"))))
    assert make_split(lonely, "pairs") == "0 pairs of context and perturbation have both halves elsewhere (5 needed)"


def test_both_asks_for_new_perturbations_in_new_contexts_alone():
    for effects in (GENETIC, CHEMICAL):
        for seed in range(3):
            split = make_split(effects, "both", seed)
            train, test, val = (obs_of(effects, split, part) for part in ("train", "test", "val"))
            assert not keys(train, "perturbation") & keys(test, "perturbation") and not keys(train, "context") & keys(test, "context")
            assert not keys(train, "perturbation") & keys(val, "perturbation") and not keys(train, "context") & keys(val, "context")
            assert set(split.strata.values()) == {"both_unseen"} and len(split.options) == 0
            assert split.ids["test"] == sorted(c for c in make_split(effects, "perturbation", seed).ids["test"] if effects.obs.loc[c, "context"] in set(test["context"]))
    assert keys(obs_of(CHEMICAL, make_split(CHEMICAL, "both"), "val"), "context")  # five lines: one validates
    more = make_split(CHEMICAL, "both", fractions=(.5, 0))
    assert len(keys(obs_of(CHEMICAL, more, "test"), "perturbation")) > len(keys(obs_of(CHEMICAL, make_split(CHEMICAL, "both"), "test"), "perturbation"))
    one = CHEMICAL[CHEMICAL.obs["context"] == "line0"].copy()
    assert make_split(one, "both") == "no two contexts share a perturbation"
    few = CHEMICAL[CHEMICAL.obs["perturbation"].isin(["drug 1", "drug 2"])].copy()
    assert make_split(few, "both") == "2 perturbations are too few to hold any out (5 needed)"


def test_no_scaffold_stands_on_both_sides():
    from rdkit import Chem
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
    for seed in range(4):
        split = make_split(CHEMICAL, "scaffold", seed)
        scaffold = lambda part: {MurckoScaffoldSmiles(mol=Chem.MolFromSmiles(s.replace(".Cl", ""))) for s in obs_of(CHEMICAL, split, part)["smiles"]} - {""}
        assert not scaffold("train") & (scaffold("test") | scaffold("val")) and not scaffold("test") & scaffold("val")
        assert set(split.strata.values()) == {"scaffold_unseen"}
        everyone = {d for part in PARTS for d in obs_of(CHEMICAL, split, part)["perturbation"]}
        assert everyone == set(CHEMICAL.obs["perturbation"]) - {"secret"}  # without structure: on no side
        assert 0 < len(set(obs_of(CHEMICAL, split, "test")["perturbation"])) <= round(.2 * 26)
    apart = [{"chain one", "chain two"} & set(obs_of(CHEMICAL, make_split(CHEMICAL, "scaffold", s), "test")["perturbation"]) for s in range(6)]
    assert any(len(x) == 1 for x in apart)  # two molecules without a ring are no family


def test_no_trained_drug_hits_a_held_out_target_and_what_else_is_unseen_is_said():
    said = Counter()
    for seed in range(4):
        split = make_split(CHEMICAL, "target", seed)
        hit = lambda rows: {t for text in rows["targets"] for t in text.split(";") if t}
        trained = hit(obs_of(CHEMICAL, split, "train"))
        for c, stratum in split.strata.items():
            mine = set(CHEMICAL.obs.loc[c, "targets"].split(";"))
            assert stratum == ("drug_unseen" if mine & trained else "target_unseen")
            assert not mine <= trained, "a held-out drug has at least one target that no trained drug has"
        said.update(split.strata.values())
        assert not {"chain two", "secret"} & {d for part in PARTS for d in obs_of(CHEMICAL, split, part)["perturbation"]}
    assert said["target_unseen"] > said["drug_unseen"] > 0
    mixed = ad.concat([CHEMICAL, effects_of(pd.DataFrame(dict(perturbation=[f"T{i}" for i in range(10)], perturbation_type="CRISPRi", context="line0")))], uns_merge="first", join="outer")
    for seed in range(4):
        split = make_split(mixed, "target", seed)
        gone = {t for t in (f"T{i}" for i in range(10)) if f"{t}|CRISPRi|||line0" in split.ids["test"]}
        assert not any(gone & set(str(t).split(";")) for t in obs_of(mixed, split, "train")["targets"])
    assert make_split(GENETIC, "target") == "no drug has a known target"


def test_mechanism_split_and_its_reasons():
    split = make_split(CHEMICAL, "mechanism")
    assert not keys(obs_of(CHEMICAL, split, "train"), "mechanism") & keys(obs_of(CHEMICAL, split, "test"), "mechanism")
    assert set(split.strata.values()) == {"mechanism_unseen"}
    bare = CHEMICAL.copy()
    del bare.obs["mechanism"]
    assert make_split(bare, "mechanism") == "no drug has a known mechanism"
    few = CHEMICAL[CHEMICAL.obs["mechanism"].isin(["T1 inhibitor", "T2 inhibitor"])].copy()
    assert make_split(few, "mechanism") == "2 different mechanisms are too few to hold any out (5 needed)"


def test_dose_asks_for_the_highest_from_lower_ones():
    split = make_split(CHEMICAL, "dose")
    test, train = obs_of(CHEMICAL, split, "test"), obs_of(CHEMICAL, split, "train")
    assert set(test["dose"]) == {10.} and set(train["dose"]) == {.1, 1.} and set(split.strata.values()) == {"dose_unseen"}
    assert keys(test, "perturbation", "context") <= keys(train, "perturbation", "context")
    assert ("drug 3", "line0") not in keys(test, "perturbation", "context")  # no lower dose there: left out
    assert set(obs_of(CHEMICAL, split, "val")["dose"]) == {1.}
    assert make_split(GENETIC, "dose") == "the screen has no doses"
    one = CHEMICAL[CHEMICAL.obs["dose"] == 1].copy()
    assert make_split(one, "dose") == "no drug was given in two doses in one context"
    half = make_split(CHEMICAL, "dose", fractions=(.5, 0.))
    assert set(half.ids["test"]) < set(split.ids["test"]) and half.name != split.name


@pytest.mark.parametrize("effects, folds", [(GENETIC, 5), (CHEMICAL, 4)])
def test_folds_partition_the_perturbations(effects, folds):
    asked = [keys(obs_of(effects, make_split(effects, "kfold", s, folds=folds), "test"), "perturbation") for s in range(2 * folds)]
    for mine in (asked[:folds], asked[folds:]):
        times = Counter(name for fold in mine for (name,) in fold)
        assert set(times) == {name for (name,) in keys(effects.obs, "perturbation")}
        assert all(1 <= n <= len(name.split("+")) for name, n in times.items())  # a combination is asked for with each of its genes
        singles = [sum("+" not in name for (name,) in fold) for fold in mine]
        assert max(singles) - min(singles) <= 1
    assert asked[:folds] != asked[folds:]
    assert make_split(effects, "kfold", folds=50).endswith("are too few for 50 folds (100 needed)")


def test_nothing_measured_on_held_out_cells_comes_with_the_training_rows():
    effects = GENETIC.copy()
    effects.var["mean"] = 1.
    effects.uns["control_mean"] = np.arange(3. * effects.n_vars).reshape(3, -1)
    given = make_split(effects, "combination", n_genes=2).train(effects)
    assert not len(given.var.columns) and given.uns["control_mean"].shape == (3, 2)
    np.testing.assert_array_equal(given.uns["control_mean"], effects.uns["control_mean"][:, effects.var_names.get_indexer(given.var_names)])


def test_a_molecule_is_held_out_under_all_its_names():
    effects = CHEMICAL.copy()
    effects.obs["smiles"] = effects.obs["smiles"].astype(str)
    names = sorted(set(effects.obs["perturbation"].astype(str)))[:2]
    salt = {names[0]: "CC(=O)Oc1ccccc1C(=O)O", names[1]: "CC(=O)Oc1ccccc1C(=O)[O-].[Na+]"}
    effects.obs["smiles"] = [salt.get(p, s) for p, s in zip(effects.obs["perturbation"].astype(str), effects.obs["smiles"])]
    for kind, seed in [(k, s) for k in ("perturbation", "kfold") for s in range(8)]:
        split = make_split(effects, kind, seed)
        where = [{part for part in PARTS if name in set(obs_of(effects, split, part)["perturbation"].astype(str))} for name in names]
        assert where[0] == where[1] and len(where[0]) == 1


def test_a_fold_trains_on_nothing_that_it_asks_for():
    for seed in range(5):
        split = make_split(GENETIC, "kfold", seed)
        genes_of = lambda part: {g for (name,) in keys(obs_of(GENETIC, split, part), "perturbation") for g in name.split("+")}
        held = {name for (name,) in keys(obs_of(GENETIC, split, "test"), "perturbation") if "+" not in name}
        assert held and not held & genes_of("train")


def test_replicate_hands_out_the_halves_and_nothing_else():
    split = make_split(GENETIC, "replicate")
    assert np.allclose(split.train(GENETIC).X - split.test(GENETIC).X, 2) and not split.train(GENETIC).layers
    with pytest.raises(Problem, match="needs the layers half1 and half2"): Split("toy", "replicate", 0, split.ids, split.strata, 9).check(effects_of(GENETIC.obs))


# Options

def test_lists_mean_what_they_say():
    split = make_split(GENETIC, "listed", test=["A", "B|CRISPRa|||x"], val=["C"])
    assert split.ids["test"] == sorted([*(f"A|CRISPRa|||{c}" for c in "xyz"), "B|CRISPRa|||x"]) and len(split.ids["val"]) == 3
    assert split.strata["A|CRISPRa|||x"] == "single_unseen" and split.strata["B|CRISPRa|||x"] == "pair_unseen"
    assert set(obs_of(GENETIC, make_split(GENETIC, "listed", test=["z"]), "test")["context"]) == {"z"}
    for lists, said in [(dict(test=["Q", "A"]), "Q is no condition, perturbation or context"), (dict(test=["A"], val=["A|CRISPRa|||x"]), "in test and in val"),
                        (dict(val=["A"]), "nothing to ask for")]:
        with pytest.raises(Problem, match=said): make_split(GENETIC, "listed", **lists)
    twice = effects_of(pd.DataFrame(dict(perturbation=["x", "y"], perturbation_type="drug", context=["x", "x"])))
    with pytest.raises(Problem, match="'x' is a perturbation and a context"): make_split(twice, "listed", test=["x"])
    assert make_split(GENETIC, "listed", test=["x", "y", "z"]) == "nothing would be left to train on or to ask for"


def test_conditions_with_few_cells_are_not_asked_for_and_floors_are_nested():
    plain, floor, higher = (make_split(GENETIC, "combination", min_cells=n) for n in (0, 50, 100))
    assert plain.ids["train"] == floor.ids["train"] and set(plain.ids["test"]) > set(floor.ids["test"]) > set(higher.ids["test"])
    assert GENETIC.obs.loc[floor.ids["test"] + floor.ids["val"], "n_cells"].min() >= 50 > GENETIC.obs.loc[floor.ids["train"], "n_cells"].min()
    assert len({plain.name, floor.name, higher.name}) == 3 and plain.name == "combination.s0" and floor.content()["options"] == {"min_cells": 50}
    with pytest.raises(Problem, match="does not say how many cells"): make_split(effects_of(GENETIC.obs.drop(columns="n_cells")), "combination", min_cells=5)


@pytest.mark.parametrize("by", ["cells", "effect"])
def test_stratified_draws_are_balanced(by):
    n = 100
    effects = effects_of(pd.DataFrame(dict(perturbation=[f"g{i:03}" for i in range(n)], perturbation_type="CRISPRi", context="x", n_cells=np.random.default_rng(0).permutation(n) + 1.)))
    effects.X *= effects.obs["n_cells"].to_numpy()[:, None] ** 2
    value = effects.obs["n_cells"] if by == "cells" else pd.Series(np.linalg.norm(effects.X, axis=1), effects.obs_names)
    bins = lambda split: np.bincount(value.rank()[split.ids["test"]].sub(1).floordiv(20).astype(int), minlength=5).tolist()
    for seed in range(5): assert bins(make_split(effects, "perturbation", seed, stratify=by)) == [4] * 5
    assert any(bins(make_split(effects, "perturbation", seed)) != [4] * 5 for seed in range(5))
    for seed in range(5): assert bins(make_split(effects, "kfold", seed, stratify=by)) == [4] * 5
    assert make_split(effects, "perturbation", 0, stratify=by) != make_split(effects, "perturbation", 1, stratify=by)


def test_options_are_checked():
    for given, said in [(dict(kind="scafold"), "did you mean 'scaffold'"), (dict(kind="drug"), "did you mean 'perturbation'"), (dict(kind="zzz"), "there are: perturbation"),
                        (dict(kind="context", stratify="cells"), "'stratify' has no meaning"), (dict(kind="replicate", fractions=(.5, 0.)), "'fractions' has no meaning"),
                        (dict(kind="perturbation", test=["A"]), "'test' has no meaning"), (dict(kind="perturbation", stratify="size"), "expected 'cells', 'effect'"),
                        (dict(kind="perturbation", fractions=(2, 0)), "two numbers from 0 to 1"), (dict(kind="kfold", folds=1), "an integer from 2")]:
        with pytest.raises(Problem, match=said) as e: make_split(GENETIC, **given)
        assert "\n" not in str(e.value)
    assert set(FRACTIONS) <= set(KINDS)


def test_usual_options_leave_the_name_alone_and_others_do_not():
    assert make_split(GENETIC, "combination", fractions=FRACTIONS["combination"]).name == make_split(GENETIC, "combination").name == "combination.s0"
    names = {split_name("doubles", 0, *rest) for rest in ((), (100,), (2000, {"stratify": "cells"}), (2000, {"fractions": [0., .4]}))}
    assert len(names) == 4 and all(name.startswith("doubles.s0") for name in names)


# What is wrong with a split

def spoil(tmp_path, change):
    "A frozen split whose content was changed and whose name fits its content again."
    content = make_split(GENETIC, "combination").content()
    changed = change(content)
    content = changed if isinstance(changed, list) else content
    path = tmp_path / f"{sha256(content)}.json"
    path.write_text(json.dumps(content))
    return path


A = "A|CRISPRa|||x"
WRONG = [(lambda c: c["train"].append(c["test"][0]), "is in its train and its test"), (lambda c: c["val"].append(c["train"][0]), "is in its train and its val"),
         (lambda c: c["test"].append(c["test"][0]), "is listed twice in its test"), (lambda c: c.update(test=[]), "its test is empty"), (lambda c: c.update(train=[]), "its train is empty"),
         (lambda c: c.update(train=c.pop("val"), val=None) or c.pop("val"), "it has no val"), (lambda c: [c.pop(key) for key in ("seed", "strata")] and None, "it has no seed, strata"), (lambda c: c.update(seed="0"), "its seed is '0'; expected an integer"),
         (lambda c: c.update(test="all"), "its test is 'all'; expected a list"), (lambda c: c.update(test=[1, 2]), "its test holds 1; expected ids"), (lambda c: c.update(seed=True), "expected an integer"),
         (lambda c: c.update(strata={}), "asked for without a stratum"), (lambda c: c.update(schema=3), "schema 3, this version knows up to 2"), (lambda c: [1], "no JSON object"),
         (lambda c: c.update(options=[1]), "its options is [1]; expected an object")]


@pytest.mark.parametrize("change, said", WRONG, ids=[said[:30] for _, said in WRONG])
def test_a_spoilt_split_is_refused_in_a_line(tmp_path, change, said):
    with pytest.raises(Problem) as e: load_split(spoil(tmp_path, change))
    assert said in str(e.value) and "\n" not in str(e.value)


def test_an_edited_split_names_both_hashes(tmp_path):
    split = make_split(GENETIC, "combination")
    path = freeze(split, tmp_path, "toy")
    assert load_split(path) == split and json.loads((tmp_path / "index.json").read_text()) == {"toy/combination.s0": split.hash}
    content = json.loads(path.read_text())
    content["train"].append(content["test"].pop())
    path.write_text(json.dumps(content))
    with pytest.raises(Problem, match=f"has the hash {sha256(content)}, its name says {split.hash}"): load_split(path)
    path.write_text("{")
    with pytest.raises(Problem, match="not a readable split"): load_split(path)
    with pytest.raises(Problem, match="not a readable split"): load_split(tmp_path / "none.json")


def test_a_split_meets_only_its_own_screen():
    split, other = make_split(GENETIC, "combination"), effects_of(GENETIC.obs, dataset_id="another")
    with pytest.raises(Problem, match="made for data set toy, but these effects are another"): split.train(other)
    fewer = GENETIC[[c not in split.ids["test"][:6] for c in GENETIC.obs_names]].copy()
    for part in (split.train, split.val, split.test):
        with pytest.raises(Problem, match="and 2 more are not among the conditions"): part(fewer)
    bad = Split("toy", "listed", 0, {"train": [A], "val": [], "test": [A]}, {A: "x"}, 9)
    with pytest.raises(Problem, match="is in its train and its test"): freeze(bad, "nowhere", "toy")


def test_strata_name_the_coarsest_news():
    rows = pd.DataFrame([("A", "x", 1., 6.), ("B", "y", 1., 6.), ("A", "x", 2., 6.), ("A", "x", 1., 24.), ("A", "y", 2., 6.), ("A", "z", 2., 6.), ("C", "x", 1., 6.)],
                        columns=["perturbation", "context", "dose", "time_h"]).assign(perturbation_type="drug")
    assert list(strata(rows[:2], rows[2:]).values()) == ["dose_unseen", "time_unseen", "pair_unseen", "context_unseen", "drug_unseen"]


# The notebook

def processed(out, effects, dataset):
    "Effects where notebook 05 looks for them."
    folder = out / "data/processed" / dataset
    folder.mkdir(parents=True)
    effects.write_h5ad(folder / "effects.h5ad")


def test_the_notebook_makes_what_it_is_asked_for(tmp_path):
    processed(tmp_path, CHEMICAL, "pills")
    (tmp_path / "lists.json").write_text(json.dumps(dict(train_conditions=["drug 1", "drug 2", "DMSO", "drug 99"], val_conditions=[], test_conditions=["drug 4"])))
    run_here("05_data.splits", tmp_path, dataset="pills", kinds="default scaffold kfold doubles", repeats=2, min_cells=20, imported=str(tmp_path / "lists.json"))
    listed = json.loads((tmp_path / "data/results/pills/splits.json").read_text())
    assert [s["kind"] for s in listed] == ["perturbation"] * 2 + ["context"] * 2 + ["scaffold"] * 2 + ["kfold"] * 2 + ["imported"]
    assert len({s["name"] for s in listed}) == len({s["hash"] for s in listed}) == 9
    for entry in listed: load_split(tmp_path / entry["path"]).check(CHEMICAL)
    notes = json.loads((tmp_path / "runs/pills/05_data.splits.record.json").read_text())["notes"]
    assert any("1 names are not in this screen: drug 99" in n for n in notes) and any(n.startswith("doubles split: ") for n in notes)


def test_a_changed_data_set_is_refused_with_both_hashes(tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURB_OUT", str(tmp_path))
    run = Run("05_data.splits", effective(dict(dataset="sim", profile="default"), dataset=str, profile=str))
    index = json.loads((ROOT / "data/splits/index.json").read_text())
    theirs = load_split(ROOT / "data/splits" / f"{index['sim/combination.s0']}.json").dataset_id
    with pytest.raises(Problem, match=f"is frozen for data set {theirs}, this one is toy"): frozen(run, "combination.s0", GENETIC)
    assert frozen(run, "combination.s0", ad.AnnData(uns={"dataset_id": theirs})).stem == index["sim/combination.s0"] and frozen(run, "combination.s99", GENETIC) is None


def test_steps_read_the_frozen_files_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURB_OUT", str(tmp_path))
    run = Run("08_models.baselines", effective(dict(dataset="pills"), dataset=str))
    split = make_split(CHEMICAL, "dose")
    path = freeze(split, run.results("splits"), "pills")
    entry = dict(name=split.name, kind="dose", seed=0, hash=split.hash, path=str(path.relative_to(tmp_path)))
    run.results("splits.json").write_text(json.dumps([entry]))
    assert load_splits(run, CHEMICAL) == [split]
    with pytest.raises(Problem, match="made for data set toy, but these effects are new"): load_splits(run, effects_of(CHEMICAL.obs, dataset_id="new"))
    run.results("splits.json").write_text(json.dumps([entry | {"hash": "0" * 64}]))
    with pytest.raises(Problem, match=f"dose.s0 is {'0' * 64}, its file holds {split.hash}"): load_splits(run, CHEMICAL)
    path.unlink()
    with pytest.raises(Problem, match="not there yet"): load_splits(run, CHEMICAL)


# Real screens

@needs_shared
def test_norman():
    obs = ad.read_h5ad(SHARED / "norman/norman_effects.h5ad").obs
    effects = effects_of(pd.DataFrame(dict(perturbation=obs["condition"].astype(str).to_numpy(), perturbation_type="CRISPRa", context="K562")))
    for kind in ("combination", "doubles", "kfold"):
        split = make_split(effects, kind)
        assert sum(map(len, split.ids.values())) == 204
    assert {"combo_seen0", "combo_seen1", "combo_seen2", "single_unseen"} == set(make_split(effects, "combination").strata.values())
    assert make_split(effects, "context") == "no two contexts share a perturbation" and make_split(effects, "scaffold") == "no drug has a known scaffold"


@needs_shared
def test_l1000_drugs_and_lines():
    obs = ad.read_h5ad(SHARED / "l1000/l1000_14drugs_43lines.h5ad").obs.astype(str)
    effects = effects_of(pd.DataFrame(dict(perturbation=obs["smiles"], perturbation_type="drug", context=obs["cell"], smiles=obs["smiles"])))
    for kind in ("perturbation", "context", "leave_context_out", "pairs", "scaffold"):
        split = make_split(effects, kind)
        train, asked = obs_of(effects, split, "train"), effects.obs.loc[split.ids["test"] + split.ids["val"]]
        unseen = {"perturbation": "perturbation", "scaffold": "perturbation"}.get(kind, "context")
        if kind != "pairs": assert not keys(train, unseen) & keys(asked, unseen)
        else: assert keys(asked, "perturbation") <= keys(train, "perturbation") and keys(asked, "context") <= keys(train, "context")
        assert set(split.strata.values()) == {dict(perturbation="drug_unseen", pairs="pair_unseen", scaffold="scaffold_unseen").get(kind, "context_unseen")}
