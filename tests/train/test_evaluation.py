import numpy as np
import pytest
from sklearn import metrics
from sklearn.neighbors import KNeighborsClassifier

from tokjax.train.evaluation import confusion, depth_metrics, knn_accuracy, mean_iou, recall_at_k

RNG = np.random.default_rng(0)


class TestRecall:
    # Three images; texts 0 and 1 belong to image 0, text 2 to image 1, text 3 to image 2.
    owner = np.array([0, 0, 1, 2])
    similarity = np.array(
        [
            [0.1, 0.8, 0.9, 0.2],  # text 2, then its own text 1: found second
            [0.3, 0.1, 0.7, 0.2],  # its own first
            [0.6, 0.5, 0.4, 0.3],  # its own last
        ]
    )

    def test_by_hand(self):
        got = recall_at_k(self.similarity, self.owner, ks=(1, 2, 3, 4, 9))
        # Texts: 0 -> ranks image 0 third; 1 -> first; 2 -> image 1 second; 3 -> image 2 first.
        assert got == pytest.approx(
            {
                "image_to_text@1": 1 / 3,
                "image_to_text@2": 2 / 3,
                "image_to_text@3": 2 / 3,
                "image_to_text@4": 1,
                "image_to_text@9": 1,
                "text_to_image@1": 2 / 4,
                "text_to_image@2": 3 / 4,
                "text_to_image@3": 1,
                "text_to_image@4": 1,
                "text_to_image@9": 1,
            }
        )

    def test_ties_count_against_the_query(self):
        everything = recall_at_k(np.ones((4, 4)), np.arange(4), ks=(1, 3, 4))
        assert everything == {f"{d}@{k}": float(k == 4) for d in ("image_to_text", "text_to_image") for k in (1, 3, 4)}
        # Two own texts that tie with each other do not stand in each other's way.
        assert recall_at_k(np.array([[1.0, 1.0], [0.0, 0.0]]), np.array([0, 0]), ks=(1,)) == {
            "image_to_text@1": 1.0,
            "text_to_image@1": 1.0,
        }

    @pytest.mark.parametrize("chunk", [1, 7, 1000])
    def test_pieces_change_nothing(self, chunk):
        similarity, owner = RNG.normal(size=(13, 40)).round(1), RNG.integers(0, 13, 40)
        order = np.argsort(-similarity, axis=1, kind="stable")
        got = recall_at_k(similarity, owner, chunk=chunk)
        assert got == recall_at_k(similarity, owner)
        distinct = np.argsort(np.argsort(similarity.ravel())).reshape(similarity.shape).astype(float)
        order = np.argsort(-distinct, axis=1)
        queries = np.unique(owner)
        want = np.mean([(owner[order[i, :5]] == i).any() for i in queries])
        assert recall_at_k(distinct, owner, chunk=chunk)["image_to_text@5"] == pytest.approx(want)

    @pytest.mark.parametrize(
        ("similarity", "owner", "ks", "message"),
        [
            (np.zeros((2, 3)), [0, 1], (1,), "must be"),
            (np.zeros((2, 0)), np.zeros(0, int), (1,), "no text"),
            (np.zeros((2, 2)), [0, 2], (1,), "owner must name images 0..1"),
            (np.zeros((2, 2)), [0.0, 1.0], (1,), "float64"),
            (np.zeros((2, 2)), [0, 1], (0,), "ks"),
            (np.full((2, 2), np.nan), [0, 1], (1,), "NaN"),
        ],
    )
    def test_wrong_arguments(self, similarity, owner, ks, message):
        with pytest.raises(ValueError, match=message):
            recall_at_k(similarity, np.asarray(owner), ks)


class TestKnn:
    def test_by_hand(self):
        train = np.array([[2.0, 0], [0, 3], [0, 1]])
        labels = np.array([0, 1, 1])
        # cosines 0.8, 0.6, 0.6: at a low temperature the nearest decides, at a high one the two others together.
        test = np.array([[0.8, 0.6]])
        assert knn_accuracy(train, labels, test, np.array([0]), k=3, temperature=0.07) == 1
        assert knn_accuracy(train, labels, test, np.array([1]), k=3, temperature=10.0) == 1
        assert knn_accuracy(train, labels, test, np.array([0]), k=1, temperature=10.0) == 1
        assert knn_accuracy(train, labels, test, np.array([0]), k=20, temperature=1e-4) == 1
        assert knn_accuracy(train, labels, test, np.array([7])) == 0

    @pytest.mark.parametrize("chunk", [7, 1000])
    def test_is_that_of_sklearn(self, chunk):
        centres = RNG.normal(size=(5, 12))
        labels, test_labels = RNG.integers(0, 5, 300), RNG.integers(0, 5, 80)
        train = (centres[labels] + 1.5 * RNG.normal(size=(300, 12))) * RNG.uniform(0.1, 9, (300, 1))
        test = centres[test_labels] + 1.5 * RNG.normal(size=(80, 12))
        peer = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        want = peer.fit(train, labels).score(test, test_labels)
        assert 0.3 < want < 0.98
        assert knn_accuracy(train, labels, test, test_labels, chunk=chunk) == pytest.approx(want)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"train_features": np.zeros((3, 2, 2))}, "train_features are"),
            ({"test_labels": np.zeros(3, int)}, "test_labels"),
            ({"test_features": np.zeros((2, 3))}, "channels"),
            ({"train_features": np.full((3, 2), np.inf)}, "train_features are not finite"),
            ({"train_labels": np.array([0, -1, 0])}, "negative"),
            ({"k": 0}, "k, temperature"),
            ({"temperature": 0.0}, "k, temperature"),
        ],
    )
    def test_wrong_arguments(self, change, message):
        fields = {
            "train_features": np.ones((3, 2)),
            "train_labels": np.zeros(3, int),
            "test_features": np.ones((2, 2)),
            "test_labels": np.zeros(2, int),
        }
        with pytest.raises(ValueError, match=message):
            knn_accuracy(**{**fields, **change})


class TestSegmentation:
    def test_by_hand(self):
        label = np.array([[0, 0, 1], [1, 2, 255]])
        pred = np.array([[0, 1, 1], [1, 0, 9]])
        matrix = confusion(pred, label, 4)
        assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
        # IoU: 1/3, 2/3 and 0; class 3 occurs nowhere.
        assert mean_iou(matrix) == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
        assert mean_iou(np.zeros((3, 3), int)) == 0
        assert mean_iou(np.diag([5, 0, 2])) == 1

    def test_is_that_of_sklearn(self):
        label, pred = RNG.integers(0, 6, (2, 4, 50))
        matrix = confusion(pred, label, 6, ignore=None)
        np.testing.assert_array_equal(matrix, metrics.confusion_matrix(label.ravel(), pred.ravel()))
        want = metrics.jaccard_score(label.ravel(), pred.ravel(), average="macro")
        assert mean_iou(matrix) == pytest.approx(want)
        np.testing.assert_array_equal(matrix, sum(confusion(p, t, 6) for p, t in zip(pred, label, strict=True)))

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match=r"label must be in .*255"):
            confusion(np.zeros(2, int), np.array([0, 255]), 3, ignore=None)
        with pytest.raises(ValueError, match=r"pred must be in .*, got -1"):
            confusion(np.array([-1]), np.array([0]), 3)
        with pytest.raises(ValueError, match="must be the same"):
            confusion(np.zeros(2, int), np.zeros(3, int), 3)
        with pytest.raises(ValueError, match=r"must be \[K, K\]"):
            mean_iou(np.zeros((2, 3)))


class TestDepth:
    def test_by_hand(self):
        pred, target = np.array([2.0, 3.0, 1.0, -1.0, 9.0]), np.array([2.0, 4.0, 1.2, 1.0, 0.0])
        valid = np.array([True] * 4 + [False])
        got = depth_metrics(pred, target, valid)
        assert got.rmse == pytest.approx(np.sqrt((0 + 1 + 0.04 + 4) / 4))
        assert got.abs_rel == pytest.approx((0 + 1 / 4 + 0.2 / 1.2 + 2) / 4)
        assert got.delta1 == pytest.approx(2 / 4)  # 4 / 3 is beyond 1.25, 1.2 is not

    def test_a_perfect_map(self):
        target = RNG.uniform(1, 3, (2, 4, 4)).astype(np.float32)
        assert depth_metrics(target, target) == (0, 0, 1)

    @pytest.mark.parametrize(
        ("pred", "target", "valid", "message"),
        [
            (np.ones(2), np.ones(3), None, "must be the same"),
            (np.ones(2), np.ones(2), np.zeros(2, bool), "no point"),
            (np.ones(2), np.array([1.0, 0.0]), None, "above 0"),
            (np.array([1.0, np.nan]), np.ones(2), None, "finite"),
        ],
    )
    def test_wrong_arguments(self, pred, target, valid, message):
        with pytest.raises(ValueError, match=message):
            depth_metrics(pred, target, valid)
