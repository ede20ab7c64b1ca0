import json

from image_files import encode, plain
import ml_collections
import numpy as np
import pytest

from tokjax import data
from tokjax.errors import UserError


def config(**fields) -> ml_collections.ConfigDict:
    result = data.default_config()
    result.update_from_flattened_dict(fields)
    return result


def test_the_default_trains_and_tests_on_digits():
    train = data.make(data.default_config(), "train", batch_size=64, train=True)
    test = data.make(data.default_config(), "test", batch_size=64, train=False)
    assert (train.num_classes, train.batches_per_epoch, test.batches_per_epoch) == (10, 1438 // 64, 6)
    batch = next(iter(train))
    assert batch["image"].shape == (64, 32, 32, 3)
    assert -1 <= batch["image"].min() < -0.9 and 0.9 < batch["image"].max() <= 1
    seen = list(test)
    assert sum(int(batch["valid"].sum()) for batch in seen) == len(test.source) == 359
    labels = np.concatenate([batch["label"][batch["valid"]] for batch in seen])
    np.testing.assert_array_equal(labels, test.source.labels)


def test_mixing_follows_the_config():
    batch = next(iter(data.make(config(**{"augment.mixup": 0.8}), "train", batch_size=16, train=True)))
    assert batch["label"].shape == (16, 10)
    smooth = config(**{"augment.label_smoothing": 0.2})
    batch = next(iter(data.make(smooth, "train", batch_size=16, train=True)))
    np.testing.assert_allclose(batch["label"].max(1), 0.82, atol=1e-6)
    assert next(iter(data.make(smooth, "train", batch_size=16, train=False)))["label"].dtype == np.int32


def test_every_field_of_the_transform_arrives():
    fields = {
        "image_size": (24, 40),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "resize.mode": "square",
        "resize.crop_pct": 0.9,
        "augment.flip": True,
        "augment.crop": "resized",
        "augment.scale": (0.5, 1.0),
        "bad_image_limit": 3,
    }
    train = data.make(config(**fields), "train", batch_size=4, train=True)
    assert train._transform == data.Training(
        (24, 40), flip=True, crop="resized", scale=(0.5, 1.0), mode="square", crop_pct=0.9
    )
    assert train._normalise == data.Normalise((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert train._bad_image_limit == 3
    assert next(iter(train))["image"].shape == (4, 24, 40, 3)
    test = data.make(config(**fields), "test", batch_size=4, train=False)
    assert test._transform == data.Evaluation((24, 40), mode="square", crop_pct=0.9)


@pytest.mark.parametrize("crop", ["none", "", None])
def test_no_crop(crop):
    fields = data.default_config()
    fields.augment.crop = crop
    assert data.make(fields, "train", batch_size=4, train=True)._transform.crop is None


def test_only_some_classes():
    loader = data.make(config(only=("8", "3"), test_subset=40), "test", batch_size=64, train=False)
    assert loader.source.class_names == ("8", "3")
    batch, every = next(iter(loader)), data.make(config(), "test", batch_size=359, train=False)
    assert batch["valid"].sum() == 40 and set(batch["label"][batch["valid"]]) == {0, 1}
    whole = next(iter(every))
    for label, name in enumerate((8, 3)):
        of_class = whole["image"][whole["label"] == name]
        image = batch["image"][batch["valid"] & (batch["label"] == label)][0]
        assert (np.abs(of_class - image).max((1, 2, 3)) == 0).any()
    np.testing.assert_array_equal(batch["label"][:40], loader.source.labels)


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (("3", "cat"), "only has cat; the classes of the data are 0, 1, 2"),
        (("3",), "must be at least two different classes"),
        (("3", "3"), "must be at least two different classes"),
    ],
)
def test_classes_that_are_not_there(only, message):
    with pytest.raises(UserError, match=message):
        data.make(config(only=only), "test", batch_size=8, train=False)


def test_subsets():
    fields = config(subset=100, test_subset=30)
    train = data.make(fields, "train", batch_size=10, train=True)
    again = data.make(fields, "train", batch_size=10, train=True, seed=7)
    assert np.bincount(train.source.labels).tolist() == [10] * 10
    assert [train.source.name_of(i) for i in range(100)] == [again.source.name_of(i) for i in range(100)]
    assert len(data.make(fields, "test", batch_size=10, train=False).source) == 30


def test_split_names_come_from_the_config(tmp_path, write_folder):
    write_folder(tmp_path / "training", {"a": 4, "b": 4})
    write_folder(tmp_path / "held", {"a": 1, "b": 2})
    fields = config(path=str(tmp_path), train_split="training", test_split="held", subset=6)
    assert len(data.make(fields, "train", batch_size=2, train=True).source) == 6
    assert len(data.make(fields, "training", batch_size=2, train=False).source) == 6
    assert len(data.make(fields, "test", batch_size=2, train=False).source) == 3
    assert len(data.make(fields, "held", batch_size=2, train=False).source) == 3
    with pytest.raises(UserError, match=r"no split 'other' in .*: it has held, training"):
        data.make(fields, "other", batch_size=2, train=False)


def test_small_images_are_decoded_once(tmp_path, write_parquet):
    write_parquet(tmp_path / "train.parquet")
    loader = data.make(config(path=str(tmp_path)), "train", batch_size=4, train=True)
    assert loader.source.in_memory
    loader = data.make(config(path=str(tmp_path), decoded_gb=0.0), "train", batch_size=4, train=True)
    assert not loader.source.in_memory


def test_a_partial_config_is_completed():
    partial = ml_collections.ConfigDict({"subset": 40, "augment": {"flip": True}})
    loader = data.make(partial, "train", batch_size=8, train=True)
    assert len(loader.source) == 40
    assert loader._transform == data.Training((32, 32), flip=True, crop="pad")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sauce": "digits"}, "unknown field 'sauce'; choose from augment, bad_image_limit"),
        ({"augment": {"flop": True}}, "unknown field of augment 'flop'; choose from crop, cutmix, flip"),
        ({"resize": 0.9}, "resize must hold fields, got 0.9"),
        ({"image_size": "32"}, "image_size"),
        ({"augment": {"crop": "centre"}}, "crop must be 'pad', 'resized' or None, got 'centre'"),
        ({"augment": {"mixup": -1.0}}, "mixup"),
        ({"resize": {"crop_pct": 0.0}}, "crop_pct must be in"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be positive"),
        ({"subset": 5000}, "1 to 1438 examples, got 5000"),
        ({"source": "imagefolder"}, "needs a path"),
        ({"train_split": "training"}, "no split 'training' in digits: it has train, test"),
    ],
)
def test_wrong_fields_are_one_clear_line(fields, message):
    with pytest.raises(UserError, match=message) as error:
        data.make(ml_collections.ConfigDict(fields), "train", batch_size=8, train=True)
    assert "\n" not in str(error.value)


def words(texts):
    return np.array([[len(text), text.count("r")] for text in texts], np.int32)


class TestOtherTasks:
    def test_scenes(self):
        fields = config(source="scenes", image_size=(48, 48), **{"augment.crop": "none", "scenes.train_count": 40})
        fields.scenes.test_count = 10
        train = data.make(fields, "train", batch_size=8, train=True, tokenizer=words)
        batch = next(iter(train))
        assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
            "image": ("float32", (8, 48, 48, 3)),
            "label": ("int32", (8,)),
            "valid": ("bool", (8,)),
            "segmentation": ("int32", (8, 6, 6)),
            "depth": ("float32", (8, 6, 6)),
            "ids": ("int32", (8, 2)),
        }
        assert len(train.source) == 40
        (first, second) = data.make(fields, "test", batch_size=8, train=False)
        scenes = data.Scenes("test", count=10)
        np.testing.assert_array_equal(first["image"][3], data.Normalise()(scenes[3]["image"][None])[0])
        np.testing.assert_array_equal(second["segmentation"][:2], [scenes[i]["segmentation"] for i in (8, 9)])
        assert "ids" not in first and second["valid"].tolist() == [True] * 2 + [False] * 6

    def test_every_option_of_scenes_arrives(self):
        options = {"digits": (2, 2), "colours": False, "distinct": True, "test_count": 5, "seed": 3}
        fields = config(source="scenes", image_size=(32, 64), patch_size=4)
        fields.scenes.update(options)
        source = data.make(fields, "test", batch_size=4, train=False).source
        count = options.pop("test_count")
        want = data.Scenes("test", size=(32, 64), patch_size=4, count=count, **options)
        assert source.scenes == want.scenes and source.fields == want.fields

    def test_places_do_not_move(self):
        for augment in ({"augment.crop": "pad"}, {"augment.crop": "none", "augment.flip": True}):
            fields = config(source="scenes", image_size=(48, 48), **augment, **{"scenes.train_count": 9})
            with pytest.raises(UserError, match=r"neither augment.flip nor augment.crop"):
                data.make(fields, "train", batch_size=8, train=True)
        test = config(source="scenes", image_size=(48, 48), **{"scenes.test_count": 9, "resize.crop_pct": 0.5})
        other = data.Evaluation((48, 48), crop_pct=0.9)
        given, own = (data.make(test, "test", batch_size=9, train=False, transform=t) for t in (other, None))
        np.testing.assert_array_equal(next(iter(given))["image"], next(iter(own))["image"])
        with pytest.raises(UserError, match=r"image_size is \(48, 48\), the model's images are \(32, 32\)"):
            data.make(test, "test", batch_size=9, train=False, transform=data.Evaluation((32, 32)))

    def test_captions(self, tmp_path):
        write_captions(tmp_path)
        fields = config(source="captions", path=str(tmp_path), image_size=(8, 8), **{"augment.crop": "none"})
        train = data.make(fields, "train", batch_size=3, train=True, tokenizer=words)
        test = data.make(fields, "test", batch_size=3, train=False, tokenizer=words)
        assert (len(train.source), len(test.source)) == (6, 3)
        assert test.source.captions[1] == ("rr", "a b")
        (batch,) = test
        assert batch["ids"].tolist() == [[1, 1], [2, 2], [3, 3]] and batch["label"].tolist() == [0, 1, 2]
        assert {tuple(row) for row in next(iter(train))["ids"]} <= {(1, 1), (2, 2), (3, 3), (3, 0)}

    def test_segmentation(self, tmp_path):
        for split in ("train", "test"):
            for folder in ("images", "labels"):
                (tmp_path / split / folder).mkdir(parents=True)
            for i in range(2):
                (tmp_path / split / "images" / f"{i}.png").write_bytes(encode(plain(i)))
                (tmp_path / split / "labels" / f"{i}.png").write_bytes(encode(np.full((8, 8), i, np.uint8)))
        fields = config(source="segmentation", path=str(tmp_path), image_size=(16, 16), patch_size=8, classes=2)
        (batch,) = data.make(fields, "test", batch_size=2, train=False)
        assert batch["segmentation"].tolist() == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"source": "scenes", "scenes": {"dogs": 3}}, "unknown field of scenes 'dogs'; choose from colours"),
            ({"source": "scenes", "scenes": {"digits": (0, 1)}}, "data config: digits must be"),
            ({"source": "scenes", "patch_size": 5}, "data config: size must be .* whole patches of 5"),
            ({"source": "captions"}, "'captions' needs a path"),
        ],
    )
    def test_wrong_fields(self, fields, message):
        with pytest.raises(UserError, match=message):
            data.make(ml_collections.ConfigDict(fields), "train", batch_size=8, train=True)


def write_captions(folder) -> None:
    for split in ("train", "test"):
        (folder / split).mkdir()
        for i in range(3):
            (folder / split / f"{i}.png").write_bytes(encode(plain(i)))
        rows = [{"file": f"{i}.png", "caption": ["r" * (i + 1), "a b"]} for i in range(3)]
        (folder / split / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
