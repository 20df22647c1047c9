"""What tasks on features compute, against loops that say it slowly, and against scikit-learn."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from zoo.data.draw import stratified
from zoo.errors import ZooError
from zoo.measure import retrieval, similar
from zoo.measure.knn import knn_classes
from zoo.measure.linear_probe import fit_probe
from zoo.measure.retrieval import retrieve
from zoo.measure.similar import centred_cosine, similarities
from zoo.measure.zeroshot import by_text, in_order_of, read_texts


def features(count, width=6, classes=3, seed=0, noise=1.0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=g)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + noise * torch.randn(count, width, generator=g), labels


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
        sum(x * x for x in a) * sum(y * y for y in b)
    )


# ------------------------------------------------------------------------------- neighbours


def slow_knn(queries, gallery, labels, k, temperature, exclude=None):
    found = []
    for i, query in enumerate(queries.tolist()):
        near = [
            (cosine(query, other), label)
            for j, (other, label) in enumerate(zip(gallery.tolist(), labels.tolist(), strict=True))
            if exclude is None or j != exclude[i]
        ]
        votes = {}
        for value, label in sorted(near, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(value / temperature)
        found.append(max(sorted(votes), key=votes.get))
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.sampled_from([0.07, 0.5, 5.0]), st.booleans())
def test_neighbours_vote_as_dino_lets_them(seed, k, temperature, among_themselves):
    queries, _ = features(9, seed=seed)
    gallery, labels = features(14, seed=seed + 1)
    exclude = None
    if among_themselves:
        gallery, labels = features(14, seed=seed)
        queries, exclude = gallery[:9], torch.arange(9)
    found = knn_classes(queries, gallery, labels, k, temperature, exclude)
    assert found.tolist() == slow_knn(queries, gallery, labels, k, temperature, exclude)


def test_one_neighbour_is_that_of_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    queries, _ = features(50, seed=1)
    gallery, labels = features(80, seed=2)
    theirs = KNeighborsClassifier(1, metric="cosine").fit(gallery.numpy(), labels.numpy())
    assert knn_classes(queries, gallery, labels, k=1).tolist() == theirs.predict(queries).tolist()


def test_small_temperatures_overflow_nothing_and_leave_the_nearest():
    queries, _ = features(20, seed=1)
    gallery, labels = features(30, seed=2)
    one = knn_classes(queries, gallery, labels, k=1)
    assert torch.equal(knn_classes(queries, gallery, labels, k=20, temperature=1e-6), one)


def test_more_neighbours_than_images_are_refused():
    queries, labels = features(4)
    with pytest.raises(ZooError, match=r"knn.k=5: expected at most 4.* type knn.k=4"):
        knn_classes(queries, queries, labels, k=5)
    with pytest.raises(ZooError, match="knn.k=4: expected at most 3"):
        knn_classes(queries, queries, labels, k=4, exclude=torch.arange(4))


@pytest.mark.parametrize("at_once", [1, 7, 100, 10**6])
def test_pieces_of_any_size_give_the_same(at_once):
    queries, _ = features(11, seed=1)
    gallery, _ = features(9, seed=2)
    exclude = torch.tensor([3, -1] * 5 + [0])
    parts = list(similarities(queries, gallery, exclude, at_once))
    assert [start for start, _ in parts] == list(range(0, 11, max(1, at_once // 9)))
    assert all(block.numel() <= max(9, at_once) for _, block in parts)
    whole = torch.cat([block for _, block in parts])
    for i in range(11):
        for j in range(9):
            want = (
                -math.inf if exclude[i] == j else cosine(queries[i].tolist(), gallery[j].tolist())
            )
            assert whole[i, j] == pytest.approx(want, abs=1e-5)


# -------------------------------------------------------------------------------- retrieval


def slow_retrieval(queries, gallery, wanted, kinds, exclude):
    hits, precisions = {1: 0, 5: 0}, []
    for i, query in enumerate(queries.tolist()):
        ranked = sorted(
            (-cosine(query, other), j)
            for j, other in enumerate(gallery.tolist())
            if exclude is None or j != exclude[i]
        )
        right = [bool(kinds[j] == wanted[i]) for _, j in ranked]
        if not any(right):
            continue
        for most in hits:
            hits[most] += any(right[:most])
        ap = [sum(right[: r + 1]) / (r + 1) for r, yes in enumerate(right) if yes]
        precisions.append(sum(ap) / len(ap))
    return (hits[1], hits[5]), precisions


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.booleans(), st.sampled_from([1, 30, 10**6]))
def test_recall_and_average_precision_are_what_the_loops_say(seed, classes, alone, at_once):
    queries, wanted = features(10, classes=classes, seed=seed)
    gallery, kinds = features(15, classes=classes, seed=seed + 1)
    exclude = None
    if alone:
        gallery, kinds = queries, wanted
        exclude = torch.arange(10)
    retrieval._AT_ONCE, was = at_once, retrieval._AT_ONCE
    try:
        found = retrieve(queries, gallery, wanted, kinds, exclude)
    finally:
        retrieval._AT_ONCE = was
    hits, precisions = slow_retrieval(queries, gallery, wanted, kinds, exclude)
    assert found.hits == hits and found.queries == len(precisions)
    assert found.precisions.tolist() == pytest.approx(precisions)


def test_average_precision_is_that_of_scikit_learn():
    from sklearn.metrics import average_precision_score

    queries, wanted = features(6, seed=3)
    gallery, kinds = features(40, seed=4)
    found = retrieve(queries, gallery, wanted, kinds)
    scores = torch.cat([block for _, block in similarities(queries, gallery)])
    for i in range(6):
        theirs = average_precision_score((kinds == wanted[i]).numpy(), scores[i].numpy())
        assert found.precisions[i] == pytest.approx(theirs)
    low, high = found.interval()
    assert low < found.mean_precision < high


def test_features_like_the_dense_ones_have_cosine_one_and_the_centre_does_not_count():
    dense, _ = features(12)
    common = 100 * torch.ones(6)
    centre = (dense + common).mean(0)
    assert centred_cosine(dense + common, dense + common, centre).min() == pytest.approx(1)
    shuffled = (dense + common).roll(1, 0)
    # Seen from the origin all are alike, which says nothing.
    assert torch.nn.functional.cosine_similarity(dense + common, shuffled).min() > 0.99
    assert centred_cosine(shuffled, dense + common, centre).mean() < 0.5


# ----------------------------------------------------------------------------- linear probe


def test_the_probe_is_the_logistic_regression_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, labels = features(150, width=8, noise=2.0, seed=5)
    x = x * torch.logspace(-2, 2, 8)  # scales do not matter
    test, _ = features(100, width=8, noise=2.0, seed=6)
    test = test * torch.logspace(-2, 2, 8)
    held_out = torch.zeros(150, dtype=torch.bool)
    held_out[::5] = True
    grid = (0.01, 1.0)
    ours = fit_probe(x, labels, held_out, grid)
    scores = {}
    for c in grid:
        scaler = StandardScaler().fit(x[~held_out].double())
        part = LogisticRegression(C=c, tol=1e-8, max_iter=5000)
        part.fit(scaler.transform(x[~held_out].double()), labels[~held_out])
        scores[c] = 100 * part.score(scaler.transform(x[held_out].double()), labels[held_out])
    assert ours.scores == pytest.approx(scores)
    assert ours.c == min(c for c in grid if scores[c] == max(scores.values()))
    scaler = StandardScaler().fit(x.double())
    whole = LogisticRegression(C=ours.c, tol=1e-8, max_iter=5000)
    whole.fit(scaler.transform(x.double()), labels)
    np.testing.assert_allclose(ours.weight.numpy(), whole.coef_, atol=2e-4)
    assert ours.classes(test).tolist() == whole.predict(scaler.transform(test.double())).tolist()


def test_a_probe_needs_two_classes_and_stands_features_that_never_change():
    x, labels = features(30)
    x[:, 0] = 7.0
    none = torch.zeros(30, dtype=torch.bool)
    found = fit_probe(x, labels, none, (1.0,))
    assert found.weight.isfinite().all() and found.c == 1.0 and found.scores == {}
    with pytest.raises(ZooError, match="two classes or more.*larger gallery_limit"):
        fit_probe(x, torch.ones(30, dtype=torch.long), none)


# ------------------------------------------------------------------------------------- text


def test_each_image_gets_the_class_of_the_nearest_text(tmp_path):
    texts = torch.nn.functional.normalize(torch.randn(4, 3, 5), dim=2)
    path = tmp_path / "text.safetensors"
    names = ["cat", "dog", "cow", "owl"]
    save_file({"text": texts}, path, metadata={"class_names": json.dumps(names)})
    read = read_texts(path)
    assert read.names == names
    mean = torch.nn.functional.normalize(texts.mean(1), dim=1)
    torch.testing.assert_close(read.x, mean)
    turned = in_order_of(read, ["owl", "cat"], 2, "zoo")
    torch.testing.assert_close(turned, mean[[3, 0]])
    x = torch.randn(20, 5)
    first = by_text(x, turned)[:, 0].tolist()
    assert first == [int(cosine(v, mean[0]) > cosine(v, mean[3])) for v in x.tolist()]


@pytest.mark.parametrize(
    ("content", "about", "words"),
    [
        ({"a": torch.ones(2, 4), "b": torch.ones(2, 4)}, {}, "holds 2 tensors"),
        ({"a": torch.ones(4)}, {}, r"shape \(4,\)"),
        ({"a": torch.ones(2, 4, dtype=torch.int32)}, {}, "int32"),
        ({"a": torch.full((2, 4), torch.nan)}, {}, "NaN"),
        ({"a": torch.ones(2, 4)}, {"class_names": "cat, dog"}, "JSON list"),
        ({"a": torch.ones(2, 4)}, {"class_names": '["cat"]'}, "1 names .* for 2 embeddings"),
        ({"a": torch.ones(2, 4)}, {"class_names": '["cat", "cat"]'}, "1 different"),
    ],
)
def test_files_that_hold_no_text_embeddings_are_refused(tmp_path, content, about, words):
    path = tmp_path / "text.safetensors"
    save_file(content, path, metadata=about)
    with pytest.raises(ZooError, match=words):
        read_texts(path)


def test_texts_of_another_width_or_of_other_classes_are_refused(tmp_path):
    path = tmp_path / "text.safetensors"
    with pytest.raises(ZooError, match="no such file"):
        read_texts(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ZooError, match="cannot be read as safetensors"):
        read_texts(path)
    save_file({"a": torch.randn(2, 4)}, path, metadata={"class_names": '["cat", "dog"]'})
    read = read_texts(path)
    with pytest.raises(ZooError, match="answers with 5 numbers per image.*embeddings of 4"):
        by_text(torch.randn(3, 5), read.x, read.source)
    with pytest.raises(ZooError, match="classes without a text embedding: cow"):
        in_order_of(read, ["cat", "cow"], 2, "zoo")
    with pytest.raises(ZooError, match="zoo has 3 classes.* has 2 embeddings without names"):
        in_order_of(read, None, 3, "zoo")


# ------------------------------------------------------------------------------------ draws


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(1, 100), st.integers(0, 9))
def test_draws_are_stratified_and_nested(labels, count, seed):
    drawn = stratified(labels, count, seed)
    assert drawn == sorted(set(drawn)) and len(drawn) == min(count, len(labels))
    assert drawn == stratified(labels, count, seed)
    assert set(drawn) <= set(stratified(labels, count + 1, seed))
    for label in set(labels):
        share = labels.count(label) * len(drawn) / len(labels)
        assert abs(sum(labels[i] == label for i in drawn) - share) <= 1


def test_another_seed_draws_others():
    assert stratified([0] * 100, 10, seed=0) != stratified([0] * 100, 10, seed=1)
    assert similar._AT_ONCE >= 2**20
