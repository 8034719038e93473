"Splits that others made: each format, GEARS' own draw, and what is refused."
import hashlib
import json
import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import SHARED, needs_shared

from perturb_research.core import Problem, sha256
from perturb_research.data.labels import condition_ids
from perturb_research.data.split_formats import gears_simulation, match_names, read_split, split_format
from perturb_research.data.splits import PARTS, checked_split, freeze, load_split, make_split

NAMES = [*"ABCDEFGH", "A+B", "A+C", "B+D", "E+F", "G+H"]


def screen(names=NAMES, kind="CRISPRa", contexts=("x", "y"), per=3, controls=8):
    "Effects of `names` in each context, and the cells that they are of, in random order."
    obs = pd.DataFrame([(p, kind, np.nan, np.nan, c) for c in contexts for p in names], columns=["perturbation", "perturbation_type", "dose", "time_h", "context"])
    obs.index = condition_ids(obs).to_numpy()
    effects = ad.AnnData(np.zeros((len(obs), 8), np.float32), obs, pd.DataFrame(index=list("ABCDEFGH")), uns={"dataset_id": "toy"})
    untreated = pd.DataFrame(dict(perturbation="control", perturbation_type=kind, dose=np.nan, time_h=np.nan, context="x"), index=range(controls))
    cells = pd.concat([*[obs] * per, untreated]).sample(frac=1, random_state=0)
    return effects, cells.assign(is_control=cells["perturbation"] == "control").set_axis([f"AAAC{i}-1" for i in range(len(cells))])


EFFECTS, CELLS = screen()


def parts(test=("A", "A+B"), val=("C",), cells=CELLS):
    "The part of every cell; controls are divided."
    part = pd.Series("train", cells.index).mask(cells["perturbation"].isin(test), "test").mask(cells["perturbation"].isin(val), "val")
    return part.mask(cells["is_control"] & (np.arange(len(cells)) % 3 == 0), "test")


def ids_of(names): return sorted(f"{n}|CRISPRa|||{c}" for n in names for c in "xy")


# PerturBench

@pytest.mark.parametrize("header", [False, True])
def test_perturbench_cells(tmp_path, header):
    parts().to_csv(tmp_path / "norman19_split.csv", header=["split"] if header else False)
    split, remark = read_split(tmp_path / "norman19_split.csv", EFFECTS, cells=CELLS)
    assert split.ids["test"] == ids_of(["A", "A+B"]) and split.ids["val"] == ids_of("C") and len(split.ids["train"]) == 20
    assert split.kind == "imported" and split.strata["A|CRISPRa|||x"] == "single_unseen" and split.strata["A+B|CRISPRa|||y"] == "combo_seen1"
    assert remark == "norman19_split.csv (perturbench): 20 train, 2 val, 4 test conditions"
    assert checked_split(json.loads(json.dumps(split.content())), "it") == split and load_split(freeze(split, tmp_path, "toy")) == split
    assert split.options["sha256"] == sha256(tmp_path / "norman19_split.csv")


def test_perturbench_remarks(tmp_path):
    part = parts().mask(CELLS["perturbation"] == "H", "")  # left out by its makers
    part.to_csv(tmp_path / "s.csv", header=False)
    few = CELLS.drop(CELLS.index[CELLS["perturbation"] == "G"][:2])
    split, remark = read_split(tmp_path / "s.csv", EFFECTS[EFFECTS.obs["perturbation"] != "F"].copy(), cells=few)
    for said in ("6 cells have no part", "2 of 80 cells are not in the table of cells", "2 conditions of this screen are in no part", "2 conditions have no effect here, having too few cells: F|CRISPRa|||x"):
        assert said in remark and "\n" not in remark, remark


def test_perturbench_by_condition(tmp_path):
    (tmp_path / "s.tsv").write_text("condition\tsplit\nctrl\ttrain\nA+ctrl\ttrain\nctrl+B\tval\nB+A\ttest\nZ+ctrl\ttest\n")
    split, remark = read_split(tmp_path / "s.tsv", EFFECTS)
    assert split.ids == dict(train=ids_of("A"), val=ids_of("B"), test=ids_of(["A+B"]))
    assert "1 names are not in this screen: Z+ctrl" in remark and "a name stands for all its conditions in 2 contexts" in remark and "20 conditions of this screen are in no part" in remark


# PerturbFM

def perturbfm(path, part, **more):
    content = {f"{p}_idx": np.flatnonzero(part == p).tolist() for p in PARTS} | dict(ood_axes={"combo": ["A+B"]}, seed=7) | more
    kept = {k: v for k, v in content.items() if v is not None}
    path.write_text(json.dumps(dict(calib_idx=None) | content | dict(notes={}, frozen_hash=sha256(kept))))
    return path


def test_perturbfm_rows(tmp_path):
    part = parts().mask(CELLS["is_control"], "train")
    inside = part == "train"
    part = part.mask(inside & (np.random.default_rng(0).random(len(part)) < .2), "val")  # PerturbFM validates on cells of trained conditions
    split, remark = read_split(perturbfm(tmp_path / "a.json", part), EFFECTS, cells=CELLS)
    assert split.ids["test"] == ids_of(["A", "A+B"]) and split.ids["val"] == ids_of("C") and split.seed == 7
    assert "conditions with cells in train and val are trained on" in remark
    rows = np.flatnonzero(part == "val").tolist()
    again, _ = read_split(perturbfm(tmp_path / "b.json", part.mask(part == "val", "calib"), calib_idx=rows), EFFECTS, cells=CELLS)
    assert again.ids == split.ids


def test_perturbfm_bad(tmp_path):
    path = perturbfm(tmp_path / "a.json", parts())
    content = json.loads(path.read_text())
    refuse(path, "numbers the rows of a table of 86 cells, none are here")
    refuse(path, "numbers the rows of a table of 86 cells, 80 are here", cells=CELLS[:80])
    path.write_text(json.dumps(content | {"test_idx": content["test_idx"][1:]}))
    refuse(path, f"it says {content['frozen_hash']}; it was edited", cells=CELLS)
    path.write_text(json.dumps(content | {"test_idx": ["0"]}))
    refuse(path, "its test_idx is not a list of row numbers", cells=CELLS)
    refuse(perturbfm(path, parts(), val_idx=content["train_idx"][:1]), "a row stands in two parts", cells=CELLS)
    refuse(perturbfm(path, parts().mask(CELLS["perturbation"].eq("D") & ~CELLS["perturbation"].duplicated(), "test")), "in train and in test; a condition belongs to one part", cells=CELLS)


# Lists

def test_lists_of_names(tmp_path):
    path = tmp_path / "lists.json"
    path.write_text(json.dumps(dict(train_conditions=["ctrl", "A+ctrl", "ctrl+B", "D", "Q", "R+ctrl"], val_conditions=["C_A"], test_conditions=["B+A", "b+d", "C|CRISPRa|||x"], kind="doubles", seed=3)))
    split, remark = read_split(path, EFFECTS)
    assert split.ids == dict(train=ids_of("ABD"), val=ids_of(["A+C"]), test=sorted([*ids_of(["A+B", "B+D"]), "C|CRISPRa|||x"]))
    assert split.kind == "doubles" and split.seed == 3 and split.name.startswith("doubles.s3.") and "2 names are not in this screen: Q, R+ctrl" in remark
    path.write_text(json.dumps(dict(train=["A", "B"], test=["A+B"], kind="replicate")))
    split, _ = read_split(path, EFFECTS)
    assert split.kind == "imported" and set(split.strata.values()) == {"combo_seen2"} and split.ids["val"] == []


def test_names_of_drugs_are_never_taken_apart():
    effects, _ = screen(["a+b", "Nutlin-3", "a"], kind="drug")
    found = match_names(["a+b", "b+a", "nutlin-3", "DMSO", "a"], effects)
    assert len(found["a+b"]) == 2 and found["b+a"] == [] and len(found["nutlin-3"]) == 2 and found["DMSO"] is None
    assert found["a"] == ["a|drug|||x", "a|drug|||y"]


def test_a_split_of_this_project_keeps_its_hashes(tmp_path):
    split = make_split(EFFECTS, "combination")
    path = freeze(split, tmp_path, "toy")
    assert read_split(path, EFFECTS)[0] == split and split_format(path)[0] == "perturb_research"
    other = EFFECTS.copy()
    other.uns["dataset_id"] = "new"
    refuse(path, "made for data set toy, but these effects are new", effects=other)
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    refuse(path, "it was edited")


# GEARS; the lists were measured with cell-gears 0.1.2

SPELT = "A+ctrl ctrl+B C+ctrl D+ctrl E+ctrl F+ctrl ctrl+G H+ctrl I+ctrl J+ctrl B+A A+C D+A B+C E+B F+C D+E G+H I+J J+A C+I H+B".split()
MEASURED = {1: ("A+ctrl ctrl+B C+ctrl D+ctrl E+ctrl J+ctrl B+A A+C B+C J+A", "ctrl+G D+E", "F+ctrl H+ctrl I+ctrl D+A E+B F+C G+H I+J C+I H+B"),
            2: ("ctrl+B C+ctrl D+ctrl E+ctrl F+ctrl H+ctrl F+C D+E H+B", "A+ctrl B+A D+A B+C", "ctrl+G I+ctrl J+ctrl A+C E+B G+H I+J J+A C+I"),
            5: ("A+ctrl ctrl+B C+ctrl F+ctrl H+ctrl J+ctrl B+A A+C B+C J+A", "E+ctrl F+C", "D+ctrl ctrl+G I+ctrl D+A E+B D+E G+H I+J C+I H+B")}


@pytest.mark.parametrize("seed", MEASURED)
def test_gears_draws_the_same(seed):
    for names in (SPELT, SPELT[::-1], ["ctrl", *SPELT, *SPELT]):
        assert {p: sorted(n) for p, n in gears_simulation(names, seed).items()} == {p: sorted(n.split()) for p, n in zip(PARTS, MEASURED[seed])}


def test_gears_spelling_moves_pairs_of_known_genes_and_nothing_else():
    own = ["+".join(sorted(n.split("+"), key=lambda g: (g == "ctrl", g))) for n in SPELT]
    back = dict(zip(own, SPELT))
    differ = 0
    for seed in range(1, 8):
        a, b = gears_simulation(SPELT, seed), gears_simulation(own, seed)
        moved = {back[n] for n in b["test"]} ^ set(a["test"])
        singles = {g for n in a["test"] if "ctrl" in n for g in n.split("+")}
        assert not any(set(n.split("+")) & (singles - {"ctrl"}) or "ctrl" in n for n in moved)
        differ += bool(moved)
    assert differ


@pytest.mark.parametrize("seed", range(1, 5))
def test_gears_itself(seed):
    splitter = pytest.importorskip("gears.data_utils").DataSplitter
    obs = pd.DataFrame({"condition": ["ctrl", *SPELT]}, index=[str(i) for i in range(len(SPELT) + 1)])
    split, _ = splitter(ad.AnnData(obs=obs), split_type="simulation").split_data(seed=seed, train_gene_set_size=.75, combo_seen2_train_frac=.75)
    theirs = split.obs[split.obs["condition"] != "ctrl"].groupby("split")["condition"].apply(set).to_dict()
    assert {p: set(n) for p, n in gears_simulation(SPELT, seed).items()} == theirs


def test_gears_from_the_screen_and_from_a_list(tmp_path):
    names = [f"{a}+ctrl" for a in "ABCDEFGH"] + ["B+A", "A+C", "D+B", "E+F", "H+G"]
    (tmp_path / "conditions.txt").write_text("\n".join(["ctrl", *names]))
    own, remark = read_split("gears:3", EFFECTS)
    assert own.seed == 3 and own.options == dict(format="gears", source="gears:3") and "pairs are spelt as here" in remark
    listed, remark = read_split(f"gears:3:{tmp_path / 'conditions.txt'}", EFFECTS)
    assert "pairs" not in remark and listed.options["sha256"] == sha256(tmp_path / "conditions.txt") and listed.name != own.name
    expected = gears_simulation(names, 3)
    assert listed.ids["test"] == sorted(c for ids in match_names(expected["test"], EFFECTS).values() for c in ids)
    assert [c for c in own.ids["test"] if "+" not in c] == [c for c in listed.ids["test"] if "+" not in c]  # the same genes
    assert read_split("gears", EFFECTS)[0].seed == 1


@needs_shared
def test_gears_on_norman():
    conditions = ad.read_h5ad(SHARED / "norman/norman_effects.h5ad").obs["condition"].astype(str)
    names = [c if "+" in c else f"{c}+ctrl" for c in conditions]
    measured = {1: "222b6c7ef5be21d6e667001fa615b3b31608b1b398ef64182df6a683bf36c218", 2: "e2b70e1e03387cfb110d19b536f4eaccf33af71ff5694b62c77c0003f6f4237c"}
    for seed, digest in measured.items():
        split = gears_simulation(names, seed)
        split["train"] = ["ctrl", *split["train"]]
        assert hashlib.sha256("\n".join(f"{part} {c}" for part in sorted(split) for c in sorted(split[part])).encode()).hexdigest() == digest
    effects, _ = screen(sorted(set(conditions)), contexts=("K562",))
    split, remark = read_split("gears:1", effects)
    assert {part: len(ids) for part, ids in split.ids.items()} == dict(train=97, val=22, test=85) and remark.startswith("gears:1 (gears): 97 train, 22 val, 85 test")
    assert pd.Series(split.strata)[split.ids["test"]].value_counts().to_dict() == NORMAN_STRATA


NORMAN_STRATA = {'combo_seen0': 13, 'combo_seen1': 36, 'combo_seen2': 10, 'single_unseen': 26}  # GEARS counts 7, 38, 14, 26: its genes kept for validation are seen


# What is refused

def refuse(path, said, effects=EFFECTS, cells=None):
    with pytest.raises(Problem) as e: read_split(path, effects, cells=cells)
    assert said in str(e.value) and "\n" not in str(e.value), str(e.value)


def test_refused(tmp_path):
    danger = tmp_path / "norman_simulation_1_0.75.pkl"

    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path / "boom"), "w"))
    danger.write_bytes(pickle.dumps(Bomb()))
    refuse(danger, "a pickle can run any program when it is opened, so it is not")
    assert not (tmp_path / "boom").exists()
    refuse(tmp_path / "none.csv", "no such file")
    refuse("gears:one", "expected gears, gears:SEED or gears:SEED:FILE")
    refuse(f"gears:1:{tmp_path / 'none.txt'}", "not a readable list of conditions")
    refuse("gears:1", "is one of genes", effects=screen(["a", "b"], kind="drug")[0])
    refuse("gears:1", "neither a gene nor a pair of genes", effects=screen(["A", "B", "A+B+C"])[0])
    with pytest.raises(Problem, match="expected the format 'perturbfm', it is 'gears'"): read_split("gears:1", EFFECTS, format="perturbfm")


@pytest.mark.parametrize("content, said", [
    ("{", "not readable as JSON"), ("[1]", "no split that is known"), ('{"a": 1}', "no split that is known"),
    ('{"train_conditions": ["A"], "test_conditions": "B"}', "its test conditions are no list of names"), ('{"train": ["A"], "test": [1]}', "its test conditions are no list of names"),
    ('{"train": ["A", "B+A"], "test": ["A+B"]}', "A+B|CRISPRa|||x, A+B|CRISPRa|||y in train and in test"), ('{"train": ["A"], "val": ["B"], "test": ["Q"]}', "nothing would be left to train on or to ask for; 1 names are not"),
    ('{"train": ["A"], "test": []}', "nothing would be left"), ('{"train": ["ctrl"], "test": ["A"]}', "nothing would be left")])
def test_bad_json(tmp_path, content, said):
    (tmp_path / "s.json").write_text(content)
    refuse(tmp_path / "s.json", said)


def test_bad_tables(tmp_path):
    path = tmp_path / "s.csv"
    for text, said in [("", "not a readable table"), ("a,train,1\nb,test,1\n", "has 3 columns; expected two"), ("AAAC0-1,train\nAAAC1-1,holdout\n", "'holdout' in its second column; expected train, val or test"),
                       ("AAAC0-1,train\nAAAC0-1,test\n", "'AAAC0-1' stands twice"), ("T1-1,train\nT2-1,test\n", "is neither a cell nor a condition of this screen; expected its barcodes")]:
        path.write_text(text)
        refuse(path, said, cells=CELLS)
    parts().to_csv(path, header=False)
    refuse(path, "a split by cell needs the cells of the screen")
    mixed = parts()
    mixed[CELLS.index[CELLS["perturbation"] == "D"][0]] = "test"
    mixed.to_csv(path, header=False)
    refuse(path, "in train and in test; a condition belongs to one part", cells=CELLS)
