"Priors: every form of file, bad ones, alignment, permutation, similarity, and that no held-out effect reaches what is written."
import gzip
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import SHARED, needs_shared, run_here
from scipy import sparse

from perturb_research.core import Problem, generator
from perturb_research.data.priors import (directed, gather, gene_effects, kind_of, mantel, matched, perturbed_genes, read_edges,
                                          read_graph, read_priors, read_sets, source_files, targets_move, write_graph, write_priors)
from perturb_research.data.splits import target_genes

GENES = [f"G{i}" for i in range(12)]


def put(folder, name, text):
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.fixture
def toy(tmp_path):
    "Twelve genes, five of them perturbed, known by a signed graph, sets and features."
    rng = np.random.default_rng(0)
    edges = "".join(f"{a}\t{b}\t{rng.choice([-1, 1])}\n" for a in GENES[:5] for b in rng.choice([*GENES, "ELSEWHERE1", "ELSEWHERE2"], 6, replace=False) if a != b)
    files = [put(tmp_path, "net.tsv", "# comment; {}\nsource\ttarget\tsign\n" + edges),
             put(tmp_path, "sets.gmt", "one\t\tG0\tG1\tG7\ntwo\thttp://x\tG1\tG2\tQ\n"),
             put(tmp_path, "map.csv", ",a,b,c\n" + "".join(f"G{i},{i % 3},{i * i % 5},\n" for i in range(4)))]
    return gather(files, GENES, GENES[:5])


# ---- files

@pytest.mark.parametrize("name, text, weights", [
    ("a.tsv", "source\tinteraction\ttarget\nA\tupregulates-expression\tB\nA\tdownregulates-expression\tC\n", [1, -1]),
    ("a.csv", "source,target,weight\nA,B,0.5\nA,C,-2\n", [.5, -2]),
    ("a.csv", "tf,target,mor\nA,B,1\nA,C,-1\n", [1, -1]),
    ("a.txt", "source\ttarget\nA\tB\nA\tC\n", [1, 1]),
    ("a.csv", "source;target;sign\nA;B;1\nA;C;-1\n", [1, -1]),
    ("a.csv.gz", "source,target,weight\nA,B,1\nA,C,-1\n", [1, -1]),
    ("a.csv", "source,target,source_genesymbol,target_genesymbol,is_stimulation,is_inhibition\nP1,P2,A,B,1,0\nP1,P3,A,C,0,1\n", [1, -1]),
])
def test_edges_of_many_forms(tmp_path, name, text, weights):
    path = put(tmp_path, name, text)
    edges = read_edges(path)
    assert kind_of(path) == "edges" and edges.attrs["directed"]
    assert edges[["source", "target"]].values.tolist() == [["A", "B"], ["A", "C"]] and edges["weight"].tolist() == weights


def test_edges_as_parquet_complexes_and_importance(tmp_path):
    pd.DataFrame({"source": ["A"], "target": ["B"], "weight": [-1.]}).to_parquet(tmp_path / "x.parquet")
    assert read_edges(tmp_path / "x.parquet")["weight"].tolist() == [-1]
    omni = put(tmp_path, "o.csv", "source,target,source_genesymbol,target_genesymbol,is_stimulation,is_inhibition\nCOMPLEX:P1_P2,P3,FOS_JUN,M,1,1\nP9,P3,HLA_A,M,0,0\n")
    assert read_edges(omni)["source"].tolist() == ["FOS", "JUN", "HLA_A"] and read_edges(omni)["weight"].tolist() == [1, 1, 1]
    go = gather([put(tmp_path, "go.csv", "source,target,importance\nG0,G1,0.5\nG2,G1,0.3\n")], GENES, GENES[:3])
    assert not directed(go.graphs["go"]) and go.graphs["go"].nnz == 4
    K = go.similarity(GENES[:4])["go"]
    assert K[0, 1] > 0 and K[0, 2] > 0 and not K[3, :3].any()


@pytest.mark.parametrize("name, text, said", [
    ("bad.gmt", "one,G0\n", "expected name, description and genes"),
    ("empty.gmt", "# nothing\n", "is empty"),
    ("a.csv", "source,target,weight\nA,B,much\nA,C,1\n", "'much' is no number"),
    ("a.csv", "source,target,weight\nA,B,inf\n", "is no number"),
    ("a.csv", "source,target,weight\nA,B,1\nA,B,1,1,1\n", "cannot be read as a table"),
    ("f.csv", "gene,x\nG0,high\n", "'high' is no number"),
    ("f.csv", "gene,x\nG0,inf\n", "infinite"),
    ("f.csv", "gene,x\nG0,1\nG0,2\n", "stands there twice"),
    ("f.csv", "gene\nG0\n", "has one column"),
    ("x.parquet", "no parquet", "cannot be read as parquet"),
    ("x.csv.gz", "", "is empty"),
    ("go.pkl", "x", "no file of sets, edges, features or a graph"),
    ("g.npz", "x", "no graph file"),
])
def test_bad_files_are_one_line(tmp_path, name, text, said):
    path = put(tmp_path, name, text)
    with pytest.raises(Problem, match=said) as e: gather([path], GENES, GENES[:3])
    assert name in str(e.value) and "\n" not in str(e.value)


def test_missing_unreadable_and_twice(tmp_path):
    with pytest.raises(Problem, match="no such file"): gather([tmp_path / "no.gmt"], GENES, [])
    (tmp_path / "latin.gmt").write_bytes(b"\xff\xfe\x00A\t\xe9\t\n")
    with pytest.raises(Problem, match="cannot be read as text"): read_sets(tmp_path / "latin.gmt")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"source,target\nA,B\n" * 99)[:40])
    with pytest.raises(Problem, match="cannot be read"): gather([tmp_path / "cut.csv.gz"], GENES, [])
    both = [put(tmp_path, "s.gmt", "one\t\tG0\n"), put(tmp_path, "s.csv", "source,target\nG0,G1\n")]
    with pytest.raises(Problem, match="a second source called 's'"): gather(both, GENES, [])
    with pytest.raises(Problem, match="put names with blanks in quotes"): source_files("'open", "mine", tmp_path, tmp_path)


def test_graph_files(tmp_path):
    A = sparse.random_array((12, 12), density=.3, rng=np.random.default_rng(0), format="csr")
    write_graph(tmp_path / "g.npz", A, GENES)
    again, genes = read_graph(tmp_path / "g.npz")
    assert list(genes) == GENES and (again != A).nnz == 0 and (sparse.load_npz(tmp_path / "g.npz") != A).nnz == 0
    with pytest.raises(Problem, match="a row and a column a gene"): write_graph(tmp_path / "h.npz", A, GENES[:3])
    first = (tmp_path / "g.npz").read_bytes()
    write_graph(tmp_path / "g.npz", A, GENES)
    assert (tmp_path / "g.npz").read_bytes() == first
    held = gather([tmp_path / "g.npz"], GENES[::-1], GENES[:2]).align(GENES).graphs["g"].toarray()
    assert np.allclose(held, A.toarray() * ~np.eye(12, dtype=bool))  # no edge from a gene to itself
    np.savez(tmp_path / "pickled.npz", genes=np.array(GENES, dtype=object), format=np.bytes_("csr"))
    with pytest.raises(Problem, match="no graph file"): read_graph(tmp_path / "pickled.npz")
    sparse.save_npz(tmp_path / "plain.npz", A)
    with pytest.raises(Problem, match="no graph file"): read_graph(tmp_path / "plain.npz")
    wrong = dict(np.load(tmp_path / "g.npz"))
    np.savez(tmp_path / "wrong.npz", **wrong | dict(indices=wrong["indices"] + 99))
    with pytest.raises(Problem, match="no graph file"): read_graph(tmp_path / "wrong.npz")


# ---- alignment

def test_names_meet_exactly_and_then_by_case(tmp_path):
    at, by_case = matched(["Myc", "TP53", "tp53", "x", "ab"], ["MYC", "TP53", "Ab", "AB"])
    assert at.tolist() == [0, 1, 1, -1, -1] and by_case == ["Myc", "tp53"]  # ab might be either of two
    priors = gather([put(tmp_path, "s.gmt", "one\t\tg0\tG1\n")], GENES, GENES[:2])
    assert priors.report.loc[0, "by_case"] == "g0" and priors.covers().loc[["G0", "G1"], "s"].all()


def test_the_report_says_what_is_missing(toy, tmp_path):
    report = toy.report.set_index("source")
    assert report.loc["sets", ["kind", "entries", "matched", "genes", "perturbed", "missing"]].tolist() == ["sets", 6, 5, 4, 3, "G3;G4"]
    assert report.loc["map", ["perturbed", "missing"]].tolist() == [4, "G4"] and report.loc["net", "linked"] == 5
    nothing = gather([put(tmp_path, "s2.gmt", "one\t\tX\n")], GENES, GENES[:2])
    assert not nothing and nothing.report.loc[0, "genes"] == 0 and not gather([], GENES, GENES)


def test_contradictory_edges_count_as_positive_and_repeated_ones_once(tmp_path):
    priors = gather([put(tmp_path, "e.csv", "source,target,sign\nG0,G1,1\nG0,G1,-1\nG0,G2,-1\nG0,G2,-1\nG3,G3,1\n")], GENES, GENES[:1])
    assert priors.align(GENES).graphs["e"].toarray()[0, [1, 2]].tolist() == [1, -1] and priors.graphs["e"].nnz == 2


def test_drugs_are_known_by_their_targets():
    obs = pd.DataFrame({"perturbation": ["d1", "d2", "A+B"], "perturbation_type": ["drug", "drug", "CRISPRi"], "targets": ["X; Y;", None, ""]})
    assert target_genes(obs) == [["X", "Y"], [], ["A", "B"]] and perturbed_genes(obs) == ["A", "B", "X", "Y"]


# ---- structure

def test_similarity_is_a_kernel_and_uses_what_was_not_read_out(toy, tmp_path):
    for name, K in toy.similarity([*GENES[:6], "NEW"]).items():
        assert np.array_equal(K, K.T) and (np.diag(K) == 1).all() and np.linalg.eigvalsh(K)[0] > -1e-7, name
        assert not K[-1, :-1].any()
    outside = gather([put(tmp_path, "o.csv", "source,target\nG0,FAR\nG1,FAR\nG2,AWAY\n")], GENES, GENES[:3])
    assert not outside.graphs["o"].nnz and outside.similarity(GENES[:3])["o:targets"][0].tolist() == [1, 1, 0]


def test_the_order_of_genes_changes_nothing(toy):
    names = ["G3", "G0", "G1"]
    first, second = toy.similarity(names), toy.align([*GENES[::-1], "NEW"]).similarity(names)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    moved = toy.align(GENES[::-1])
    assert np.array_equal(moved.graphs["net"].toarray()[::-1, ::-1], toy.align(GENES).graphs["net"].toarray())
    assert not toy.align(["NEW", "G0"]).graphs["net"].toarray()[0].any() and list(toy.align(["NEW", "G0"]).perturbed) == ["G0"]


def test_permuted_keeps_the_structure_and_loses_the_genes(toy):
    other = toy.permuted(generator(3, "test"))
    assert list(other.genes) == list(toy.genes) and not np.array_equal(other.graphs["net"].toarray(), toy.graphs["net"].toarray())
    own = toy.genes.isin(toy.perturbed)
    degrees = lambda p, which: sorted(abs(p.graphs["net"]).sum(1)[which])
    for which in (own, ~own): assert degrees(other, which) == degrees(toy, which)  # perturbed genes among themselves, the others too
    assert sorted(other.sets["sets"].sum(1)) == sorted(toy.sets["sets"].sum(1)) and other.features["map"].shape == toy.features["map"].shape
    assert sorted(other.similarity(toy.genes[own])["net:targets"].ravel()) == sorted(toy.similarity(toy.genes[own])["net:targets"].ravel())
    assert np.array_equal(toy.permuted(generator(3, "test")).graphs["net"].toarray(), other.graphs["net"].toarray())


def test_on_disk_as_in_memory_and_without_pickle(toy, tmp_path):
    write_priors(tmp_path / "p.npz", toy)
    first, again = (tmp_path / "p.npz").read_bytes(), read_priors(tmp_path / "p.npz")
    write_priors(tmp_path / "p.npz", again)
    assert (tmp_path / "p.npz").read_bytes() == first
    for shelf in ("graphs", "sets", "profiles"):
        assert all(np.array_equal(M.toarray(), getattr(again, shelf)[name].toarray()) for name, M in getattr(toy, shelf).items())
    assert again.features["map"].equals(toy.features["map"]) and again.set_names["sets"].tolist() == ["one", "two"]
    pd.testing.assert_frame_equal(again.report, toy.report, check_dtype=False)
    np.savez(tmp_path / "bad.npz", genes=np.array([{}], dtype=object))
    with pytest.raises(Problem, match="no priors"): read_priors(tmp_path / "bad.npz")
    (tmp_path / "cut.npz").write_bytes(first[:200])
    with pytest.raises(Problem, match="no priors"): read_priors(tmp_path / "cut.npz")


# ---- agreement

def screen(seed=0, n=14, genes=60):
    "Effects of n single genes and of two pairs, normal numbers."
    rng, names = np.random.default_rng(seed), [f"P{i:02d}" for i in range(n)]
    obs = pd.DataFrame({"perturbation": [*names, "P00+P01", "P02+P03"], "perturbation_type": "CRISPRa", "dose": np.nan, "time_h": np.nan, "context": "x"})
    obs.index = [f"{p}|CRISPRa|||x" for p in obs["perturbation"]]
    return ad.AnnData(rng.normal(size=(n + 2, genes)).astype("float32"), obs, pd.DataFrame(index=[f"g{i}" for i in range(genes)]), uns={"dataset_id": "toy"})


def test_what_is_planted_is_found_and_noise_is_not(tmp_path):
    effects = screen()
    observed = gene_effects(effects)
    assert len(observed) == 14 and np.allclose(observed.mean(), 0, atol=1e-6)
    edges = "".join(f"{p},{g},{np.sign(x):g}\n" for p, row in observed.iterrows() for g, x in row.items() if abs(x) > 1)
    priors = gather([put(tmp_path, "net.csv", "source,target,sign\n" + edges)], effects.var_names, observed.index)
    value, low, high, n = targets_move(priors, "net", observed, generator(0, "a"))
    assert n == 14 and low < 0 < high < .2 < .6 < value
    r, _, top = mantel(priors.similarity(observed.index)["net:targets"], observed, generator(0, "b"))
    assert r > .5 > top
    value, low, high, _ = targets_move(priors.permuted(generator(1, "c")), "net", observed, generator(0, "a"))
    assert low - .05 < value < high + .05
    assert np.isnan(mantel(np.eye(14), observed, generator(0, "d"))[0])


# ---- the notebook

def test_the_notebook_writes_what_names_alone_give(tmp_path):
    effects, source = screen(), put(tmp_path, "net.csv", "source,target,sign\nP00,g1,1\nP01,g2,-1\nP02,g1,1\n")
    (tmp_path / "data/processed/toy").mkdir(parents=True)
    effects.write_h5ad(tmp_path / "data/processed/toy/effects.h5ad")
    run_here("05c_data.priors", tmp_path, dataset="toy", profile="small", sources=str(source))
    write_priors(tmp_path / "names.npz", gather([source], effects.var_names, perturbed_genes(effects.obs)))  # no effects: held-out ones cannot reach a model
    assert (tmp_path / "names.npz").read_bytes() == (tmp_path / "data/processed/toy/priors.npz").read_bytes()
    table = pd.read_csv(tmp_path / "figures/toy/prior_coverage.csv")
    assert set(table["panel"]) == {"covered", "alike", "targets"} and table.loc[table["panel"] == "covered", "value"].iloc[0] == pytest.approx(3 / 14, abs=1e-5)


def test_a_screen_of_which_nothing_is_known_ends_well(tmp_path):
    (tmp_path / "data/processed/toy").mkdir(parents=True)
    screen().write_h5ad(tmp_path / "data/processed/toy/effects.h5ad")
    run_here("05c_data.priors", tmp_path, dataset="toy", profile="small")
    assert not read_priors(tmp_path / "data/processed/toy/priors.npz")
    notes = json.loads((tmp_path / "runs/toy/05c_data.priors.record.json").read_text())["notes"]
    assert "priors.sources='hallmark collectri'" in notes[0] and (tmp_path / "figures/toy/prior_coverage.note.txt").is_file()


@needs_shared
def test_real_sources_on_real_screens():
    norman = ad.read_h5ad(SHARED / "norman/norman_effects.h5ad", backed="r")
    genes = sorted({g for name in norman.obs["condition"] for g in name.split("+")})
    priors = gather([SHARED / "graphs/hallmark.gmt", SHARED / "graphs/collectri_signed.tsv", SHARED / "norman/norman_fitness_gi_map.csv"], norman.var_names, genes)
    report = priors.report.set_index("source")
    assert report["kind"].tolist() == ["sets", "edges", "features"] and report.loc["norman_fitness_gi_map", "perturbed"] > 95
    assert report.loc["collectri_signed", "perturbed"] > 70 and (priors.graphs["collectri_signed"].data < 0).any()
    assert priors.similarity(genes)["hallmark"].shape == (len(genes), len(genes))
