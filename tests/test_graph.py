"Graph models: what they learn, what they must not see, and what they do with genes that nobody has perturbed."
import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from conftest import SHARED, needs_shared
from perturb_research.core import Problem, generator
from perturb_research.data.priors import Priors
from perturb_research.models.baselines import Additive, Mean
from perturb_research.models.graph import CGIO, CGIOState, Encoder, GraphEncoder, GraphEncoderPermuted, Probabilistic, exploded, reached

LADDER = Probabilistic, GraphEncoder, CGIO, CGIOState
FEW = dict(epochs=5, patience=0)


def conditions(perturbations, contexts=("line",)):
    "A table of CRISPRa conditions."
    rows = [(p, "CRISPRa", c, np.nan, np.nan) for c in contexts for p in perturbations]
    return pd.DataFrame(rows, columns=["perturbation", "perturbation_type", "context", "dose", "time_h"], index=[f"{c} {r}" for c in contexts for r in perturbations])


def planted(seed=0, genes=40, perturbed=16, doubles=30, contexts=("line",), noise=0.0):
    "A screen in which each gene moves three targets of a known graph and a pair does 0.7 times the sum, shared targets the other way; and its prior."
    rng = np.random.default_rng(seed)
    names = pd.Index([f"G{i:02d}" for i in range(genes)])
    A = np.zeros((genes, genes))
    for i in range(perturbed): A[i, rng.choice(np.arange(perturbed, genes), 3, replace=False)] = rng.choice([-1, 1], 3)
    shared = 0.3 * rng.normal(size=genes)
    X = [shared + 2 * A[i] + np.eye(genes)[i] for i in range(perturbed)]
    pairs = [tuple(sorted(p)) for p in rng.permutation([(i, j) for i in range(perturbed) for j in range(i)])[:doubles]]
    X += [0.7 * (X[i] + X[j]) - np.where(A[i] * A[j] != 0, X[i] + X[j], 0) for i, j in pairs]
    obs = conditions([*names[:perturbed], *(f"{names[i]}+{names[j]}" for i, j in pairs)], contexts)
    X = np.vstack([(1 + 0.2 * k) * np.array(X) for k in range(len(contexts))])
    screen = ad.AnnData(X + noise * rng.normal(size=X.shape), obs, pd.DataFrame(index=names))
    screen.uns["control_mean"], screen.uns["control_contexts"] = rng.gamma(2, 0.5, (len(contexts), genes)), np.array(contexts)
    sets = sparse.csr_array((rng.random((genes, 5)) < 0.3).astype(float))
    return screen, Priors(names, names[:perturbed], graphs={"toy": sparse.csr_array(A)}, sets={"programmes": sets}, profiles={"programmes": sets})


def halves(screen, gene=None, share=3):
    "Training and held-out rows: those with `gene`, or every `share`-th combination."
    combos = np.flatnonzero(screen.obs["perturbation"].str.contains("+", regex=False))
    out = screen.obs["perturbation"].str.contains(gene).to_numpy() if gene else np.isin(np.arange(screen.n_obs), combos[::share])
    return screen[~out].copy(), screen[out].copy()


def fitted(make, train, priors, val=None, seed=0, **changes):
    return make(**changes).fit(train, val=val, priors=priors, rng=generator(seed, "test"))


def length(model, rows): return np.linalg.norm(model.predict(rows.obs) - rows.X, axis=1).mean()


@pytest.mark.parametrize("gating", ["none", "scalar", "node", "low_rank", "mlp"])
def test_gradient_reaches_every_parameter(gating):
    screen, priors = planted(contexts=("one", "two"))
    for make in (GraphEncoder, CGIO, CGIOState):
        model = fitted(make, screen, priors, **FEW, gating=gating)
        model.network.zero_grad()
        for batch in model.batches(0, generator(0, "rows")): model.network(*batch)["loss"].backward()
        assert [n for n, p in model.network.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_the_order_of_genes_does_not_matter():
    screen, priors = planted()
    train, asked = halves(screen, "G15")
    order = np.random.default_rng(1).permutation(screen.n_vars)
    for make in LADDER:
        first, second = fitted(make, train, priors, **FEW), train[:, order].copy()
        second.uns["control_mean"] = train.uns["control_mean"][:, order]
        again = fitted(make, second, priors, **FEW)
        np.testing.assert_allclose(first.predict(asked.obs)[:, order], again.predict(asked.obs), atol=1e-5)


def test_a_planted_interaction_is_learned():
    screen, priors = planted(doubles=60)
    train, asked = halves(screen)
    additive = length(Additive().fit(train), asked)
    for make in (Probabilistic, CGIOState): assert length(fitted(make, train, priors, epochs=80), asked) < 0.5 * additive


def test_the_graph_tells_of_an_unseen_gene_and_a_shuffled_one_does_not():
    screen, priors = planted(noise=0.1)
    error = dict.fromkeys(("none", "true", "shuffled"), 0.0)
    for gene in ("G09", "G15"):
        train, asked = halves(screen, gene)
        wrong = priors.permuted(generator(0, "shuffle"))
        for name, make, said in (("none", Probabilistic, None), ("true", GraphEncoder, priors), ("shuffled", GraphEncoderPermuted, wrong)):
            error[name] += length(fitted(make, train, said, epochs=80), asked)
    assert error["true"] < 0.75 * error["none"] and error["shuffled"] > 0.9 * error["none"]


def test_relatives_tell_of_an_unseen_gene():
    "Genes in twos do the same; the sets name the twos, and no edge is known."
    screen, _ = planted(doubles=5)
    singles = screen[:16].copy()
    singles.X[1::2] = singles.X[::2]
    twos = sparse.csr_array(np.repeat(np.eye(20), 2, axis=0))
    priors = Priors(screen.var_names, screen.var_names[:16], sets={"twos": twos}, profiles={"twos": twos})
    train, asked = singles[:15].copy(), singles[15:].copy()
    assert length(fitted(GraphEncoder, train, priors, epochs=150), asked) < 0.6 * length(Mean().fit(train), asked)


def test_same_seed_same_numbers_and_a_checkpoint_brings_them_back(tmp_path):
    screen, priors = planted()
    train, asked = halves(screen)
    one, two = (fitted(CGIOState, train, priors, **FEW) for _ in range(2))
    np.testing.assert_array_equal(one.predict(asked.obs), two.predict(asked.obs))
    kept = [CGIOState(**FEW).fit(train, priors=priors, rng=generator(0, "test"), checkpoint=tmp_path / "model.pt") for _ in range(2)]
    np.testing.assert_array_equal(kept[0].predict(asked.obs), kept[1].predict(asked.obs))
    np.testing.assert_array_equal(kept[0].predict(asked.obs), one.predict(asked.obs))
    np.testing.assert_allclose(kept[1].var(asked.obs), one.var(asked.obs))


def test_starts_at_the_additive_baseline():
    screen, priors = planted()
    train, asked = halves(screen)
    model = fitted(GraphEncoder, train, priors, epochs=1, lr=1e-12, patience=0)
    np.testing.assert_allclose(model.predict(asked.obs), Additive().fit(train).predict(asked.obs), atol=1e-5)


def test_a_training_single_never_sees_itself():
    "Where a gene is not combined, what the network is shown of its row does not depend on its effect."
    screen, priors = planted(doubles=3)
    lone = next(p for p in screen.obs["perturbation"][:16] if not screen.obs["perturbation"][16:].str.contains(p).any())
    at = screen.obs["perturbation"].tolist().index(lone)
    model = fitted(GraphEncoder, screen, priors, **FEW)
    known, _, _, blocked, *_ = model.given
    assert known[at].sum() == 0 and blocked[at, 0].tolist() == [j == at for j in range(16)]


def test_held_out_effects_change_nothing():
    screen, priors = planted()
    train, asked = halves(screen, "G15")
    val, test = asked[:2].copy(), asked[2:].copy()
    first = fitted(GraphEncoder, train, priors, val=val, **FEW).predict(test.obs)
    test.X[:] = np.random.default_rng(0).normal(size=test.shape)
    np.testing.assert_array_equal(first, fitted(GraphEncoder, train, priors, val=val, **FEW).predict(test.obs))


def test_variance_is_positive_and_set_on_the_validation_rows():
    screen, priors = planted(noise=0.2)
    train, asked = halves(screen, "G15")
    model = fitted(Probabilistic, train, None, val=asked, epochs=30)
    var = model.var(asked.obs)
    assert var.shape == asked.shape and (var > 0).all()
    assert np.mean((asked.X - model.predict(asked.obs))**2 / var) == pytest.approx(1, rel=1e-3)


def test_genes_that_the_prior_does_not_know():
    screen, priors = planted()
    train, _ = halves(screen, "G15")
    asked = conditions(["NEW", "NEW+G01", "NEW+OTHER", "G02+G03+G04"])
    for make in LADDER:
        predicted = fitted(make, train, priors, **FEW).predict(asked)
        assert predicted.shape == (4, 40) and np.isfinite(predicted).all()


def test_contexts_known_and_new():
    screen, priors = planted(contexts=("one", "two"), doubles=20)
    model = fitted(CGIOState, screen, priors, epochs=40)
    single = conditions(["G01"], ("one", "two", "three"))
    a, b, c = model.predict(single)
    np.testing.assert_allclose(a, screen["one G01"].X[0], atol=1e-5)  # measured alone in its own context
    np.testing.assert_allclose(b, screen["two G01"].X[0], atol=1e-5)
    assert np.isfinite(c).all()


def test_what_is_refused_says_why():
    screen, _ = planted()
    drugs = screen.copy()
    drugs.obs["perturbation_type"] = "drug"
    assert "drugs" in GraphEncoder().applies(drugs, drugs.obs)
    assert "too few" in Probabilistic().applies(screen[20:].copy(), screen.obs)
    del screen.uns["control_mean"]
    assert "control profiles" in CGIOState().applies(screen, screen.obs) and CGIO().applies(screen, screen.obs) == ""
    with pytest.raises(Problem, match="gating.*none, scalar"): GraphEncoder(gating="sigmoid")


def test_a_screen_without_combinations_and_a_prior_without_edges():
    screen, priors = planted(doubles=2)
    singles, empty = screen[:16].copy(), Priors(priors.genes, priors.perturbed, sets=priors.sets, profiles=priors.profiles)
    for make in (GraphEncoder, CGIO): assert np.isfinite(fitted(make, singles, empty, **FEW).predict(conditions(["NEW", "G01+G02"]))).all()


def test_channels():
    A = sparse.csr_array(np.array([[0, 2, -2], [0, 0, 1], [0, 0, 0]], dtype=float))
    names, values = reached(Priors(pd.Index(list("ABC")), pd.Index(["A"]), graphs={"g": A}), ["A", "Z"], ["C", "X", "A", "B"], steps=2)
    assert names == ["itself", "g, up", "g, down", "g, onwards"]
    np.testing.assert_allclose(values[0], [[0, 0, 1, 0], [0, 0, 0, 1], [-1, 0, 0, 0], [0.5 / np.sqrt(2), 0, 0, 0]])
    assert not values[1].any() and reached(None, ["A"], ["A"])[0] == ["itself"]


def test_parts():
    parts, row, slot = exploded(conditions(["A", "B+C+D"]))
    assert (parts["perturbation"].tolist(), row.tolist(), slot.tolist()) == (["A", "B", "C", "D"], [0, 1, 1, 1], [0, 0, 1, 2])


def test_unperturbed_genes_have_no_vector_of_their_own():
    encoder = Encoder("low_rank", 0, 1, 2, torch.eye(3, 2), perturbed=4)
    assert not encoder.source(torch.tensor([4])).any() and encoder.source.weight[:4].any()


@needs_shared
def test_norman_pairs_beat_the_additive_rule():
    effects = ad.read_h5ad(SHARED / "norman" / "norman_effects.h5ad")[:, :300].copy()
    effects.obs = conditions(effects.obs["condition"].astype(str).str.removesuffix("+ctrl").tolist())
    train, asked = halves(effects, share=2)
    assert length(fitted(Probabilistic, train, None, epochs=40), asked) < 0.95 * length(Additive().fit(train), asked)
