from concurrent import futures
import re

from ml_collections import ConfigDict
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokjax.data.sources import (
    Decoded,
    Digits,
    ImageFolder,
    Parquet,
    keep_decoded,
    open_source,
    stratified,
    subset,
)
from tokjax.data.transforms import ImageError
from tokjax.errors import UserError


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


class TestDigits:
    def test_splits_are_disjoint_complete_and_stratified(self):
        train, test = Digits("train"), Digits("test")
        rows = [source.name_of(i).split()[-1] for source in (train, test) for i in range(len(source))]
        assert (len(train), len(test), len(set(rows))) == (1438, 359, 1797)
        counts = np.bincount(train.labels), np.bincount(test.labels)
        np.testing.assert_allclose(counts[1], 0.2 * (counts[0] + counts[1]), atol=1)

    def test_the_split_depends_on_the_seed_only(self):
        first, again, other = Digits("test"), Digits("test"), Digits("test", seed=1)
        assert [first.name_of(i) for i in range(99)] == [again.name_of(i) for i in range(99)]
        assert [first.name_of(i) for i in range(99)] != [other.name_of(i) for i in range(99)]

    def test_images_are_the_digits_enlarged(self):
        from sklearn.datasets import load_digits

        source = Digits("test", size=32)
        example = source[5]
        assert example["image"].shape == (32, 32, 3)
        assert example["image"].dtype == np.uint8
        assert np.ptp(example["image"], axis=-1).max() == 0
        row = int(source.name_of(5).split()[-1])
        original = load_digits()
        assert example["label"] == original.target[row] == source.labels[5]
        small = example["image"][..., 0].reshape(8, 4, 8, 4).mean((1, 3)) / 255 * 16
        assert np.corrcoef(small.ravel(), original.images[row].ravel())[0, 1] > 0.98

    def test_another_split_is_an_error(self):
        with pytest.raises(UserError, match="no split 'val' in digits: it has train, test"):
            Digits("val")
        with pytest.raises(ValueError, match="test_fraction"):
            Digits(test_fraction=1.0)


class TestParquet:
    @pytest.mark.parametrize("struct", [True, False])
    def test_reads_every_row(self, tmp_path, write_parquet, struct):
        images, labels = write_parquet(tmp_path / "train.parquet", names=["a", "b", "c"], struct=struct)
        source = Parquet(tmp_path, "train")
        assert source.class_names == ("a", "b", "c")
        np.testing.assert_array_equal(source.labels, labels)
        for index in np.random.default_rng(0).permutation(len(source)):
            np.testing.assert_array_equal(source[index]["image"], images[index])
            assert source[index]["label"] == labels[index]
        with pytest.raises(IndexError):
            source[20]

    @pytest.mark.parametrize(
        "files",
        [
            ("test-00000-of-00002.parquet", "test-00001-of-00002.parquet"),
            ("data/test-00000-of-00002-1a2b.parquet", "data/test-00001-of-00002-3c4d.parquet"),
            ("test/0000.parquet", "test/0001.parquet"),
            ("data/test/part-0.parquet", "data/test/part-1.parquet"),
        ],
    )
    def test_several_files_in_their_layouts(self, tmp_path, write_parquet, files):
        first, _ = write_parquet(tmp_path / files[0], n=10)
        second, _ = write_parquet(tmp_path / files[1], n=7, first=10)
        write_parquet((tmp_path / files[0]).parent.parent / "train.parquet", n=5)
        source = Parquet(tmp_path, "test")
        assert len(source) == 17
        for index, image in enumerate(np.concatenate([first, second])):
            np.testing.assert_array_equal(source[index]["image"], image)
        assert source.name_of(9) == f"{files[0]} row 9"
        assert source.name_of(16) == f"{files[1]} row 6"

    def test_a_small_cache_forgets_row_groups_but_not_rows(self, tmp_path, write_parquet):
        images, _ = write_parquet(tmp_path / "train.parquet", n=30, group=5)
        source = Parquet(tmp_path, "train", cache_bytes=1)
        order = np.random.default_rng(0).permutation(30)
        with futures.ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda index: source[index]["image"], order))
        np.testing.assert_array_equal(np.stack(read), images[order])
        assert len(source._cache) == 1
        whole = Parquet(tmp_path, "train")
        for index in order:
            whole[index]
        assert len(whole._cache) == 6

    def test_classes_without_names_come_from_this_split_and_train(self, tmp_path, write_parquet):
        write_parquet(tmp_path / "train.parquet", n=20)
        write_parquet(tmp_path / "test.parquet", n=2)
        source = Parquet(tmp_path, "test")
        assert source.labels.max() == 1
        assert source.class_names == ("0", "1", "2")

    def test_classes_without_names_may_be_told(self, tmp_path, write_parquet):
        write_parquet(tmp_path / "test.parquet", n=20)
        assert Parquet(tmp_path, "test").num_classes == 3
        config = ConfigDict({"source": "parquet", "path": str(tmp_path), "classes": 7})
        assert open_source(config, "test").num_classes == 7
        with pytest.raises(UserError, match=r"classes=2: column 'label' of .* has label 2"):
            Parquet(tmp_path, "test", classes=2)
        write_parquet(tmp_path / "test.parquet", n=20, names=["a", "b", "c"])
        assert Parquet(tmp_path, "test", classes=3).class_names == ("a", "b", "c")
        with pytest.raises(UserError, match=r"classes=4: the schema of .* names 3"):
            Parquet(tmp_path, "test", classes=4)

    def test_validation_goes_by_other_names(self, tmp_path, write_parquet):
        write_parquet(tmp_path / "validation.parquet", n=4)
        assert len(Parquet(tmp_path, "test")) == 4
        with pytest.raises(UserError, match=r"no split 'train' in .*: it has validation"):
            Parquet(tmp_path, "train")

    def test_a_damaged_image_is_an_image_error(self, tmp_path, write_parquet):
        write_parquet(tmp_path / "train.parquet", bad={3})
        with pytest.raises(ImageError, match="no bytes"):
            Parquet(tmp_path, "train")[3]

    def test_a_null_image_is_an_image_error(self, tmp_path):
        images = pa.array([None, {"bytes": None}], pa.struct({"bytes": pa.binary()}))
        pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "train.parquet")
        source = Parquet(tmp_path, "train")
        for index in range(2):
            with pytest.raises(ImageError, match="no bytes"):
                source[index]

    def test_columns_are_found_by_type_or_by_name(self, tmp_path, write_parquet):
        write_parquet(tmp_path / "train.parquet", image="picture", label="kind")
        assert len(Parquet(tmp_path, "train")) == 20
        table = pq.read_table(tmp_path / "train.parquet").append_column("fine", pa.array([1] * 20))
        pq.write_table(table, tmp_path / "train.parquet")
        with pytest.raises(UserError, match=r"several columns of .* could be the label_column, name one: kind, fine"):
            Parquet(tmp_path, "train")
        assert set(Parquet(tmp_path, "train", label_column="fine").labels) == {1}
        write_parquet(tmp_path / "test.parquet", label="fine")
        with pytest.raises(UserError, match=r"'kind' is not in .*test.parquet"):
            Parquet(tmp_path, "test", label_column="kind")

    def test_wrong_columns_are_named(self, tmp_path, write_parquet):
        write_parquet(tmp_path / "train.parquet")
        with pytest.raises(UserError) as error:
            Parquet(tmp_path, "train", image_column="image")
        assert re.match(r"image_column 'image' is not in .*train.parquet: its columns are img, label", one_line(error))
        with pytest.raises(UserError, match=r"label_column 'img' of .* has type struct.*; fitting columns: label"):
            Parquet(tmp_path, "train", label_column="img")
        pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "test.parquet")
        with pytest.raises(UserError, match=r"no column of .* can be the image_column: it has text \(string\), label"):
            Parquet(tmp_path, "test")

    @pytest.mark.parametrize(
        ("labels", "message"),
        [([0, None], "1 rows without a label"), ([0, -1], "has the label -1"), ([], "has no rows")],
    )
    def test_wrong_labels(self, tmp_path, labels, message):
        table = pa.table({"image": pa.array([b"x"] * len(labels), pa.binary()), "label": pa.array(labels, pa.int64())})
        pq.write_table(table, tmp_path / "train.parquet")
        with pytest.raises(UserError, match=message):
            Parquet(tmp_path, "train")

    def test_more_labels_than_names(self, tmp_path, write_parquet):
        write_parquet(tmp_path / "train.parquet", names=["a", "b"])
        with pytest.raises(UserError, match="has label 2, its schema names 2 classes"):
            Parquet(tmp_path, "train")

    def test_a_file_that_is_not_parquet(self, tmp_path):
        (tmp_path / "train.parquet").write_bytes(b"no")
        with pytest.raises(UserError, match=r"cannot read .*train\.parquet") as error:
            Parquet(tmp_path, "train")
        one_line(error)


class TestImageFolder:
    def test_labels_number_the_sorted_classes(self, tmp_path, write_folder):
        write_folder(tmp_path / "train", {"dog": 2, "cat": 3})
        (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
        (tmp_path / "train" / ".cache").mkdir()
        source = ImageFolder(tmp_path, "train")
        assert source.class_names == ("cat", "dog")
        assert source.labels.tolist() == [0, 0, 0, 1, 1]
        assert source.name_of(4) == str(tmp_path / "train" / "dog" / "001.png")
        assert source[4]["image"][0, 0, 0] == 1
        assert source[4]["label"] == 1

    def test_nested_folders_belong_to_their_class(self, tmp_path, write_folder):
        write_folder(tmp_path / "train" / "cat", {"a": 2, "b": 1})
        source = ImageFolder(tmp_path, "train")
        assert source.class_names == ("cat",)
        assert [source.name_of(i)[-9:] for i in range(3)] == ["a/000.png", "a/001.png", "b/002.png"]

    def test_without_splits(self, tmp_path, write_folder):
        write_folder(tmp_path, {"x": 1, "y": 1})
        assert ImageFolder(tmp_path, None).class_names == ("x", "y")

    def test_a_class_missing_from_validation_does_not_shift_the_others(self, tmp_path, write_folder):
        write_folder(tmp_path / "train", {"a": 1, "b": 1, "c": 1})
        write_folder(tmp_path / "val", {"c": 2})
        source = ImageFolder(tmp_path, "test")
        assert source.class_names == ("a", "b", "c")
        assert source.labels.tolist() == [2, 2]

    def test_errors(self, tmp_path, write_folder):
        write_folder(tmp_path / "train", {"a": 1})
        write_folder(tmp_path / "val", {"z": 1})
        (tmp_path / "empty" / "a").mkdir(parents=True)
        for split, message in [
            ("dev2", "no split 'dev2' in .*: it has empty, train, val"),
            ("val", "has classes that .*train lacks: z"),
            ("empty", "no images in .*empty: expected class folders with"),
        ]:
            with pytest.raises(UserError, match=message) as error:
                ImageFolder(tmp_path, split)
            one_line(error)
        with pytest.raises(UserError, match="no such folder"):
            ImageFolder(tmp_path / "nowhere", "train")
        with pytest.raises(UserError, match="is not a folder"):
            ImageFolder(tmp_path / "train" / "a" / "000.png", "train")

    def test_an_unreadable_file_is_an_image_error(self, tmp_path, write_folder):
        write_folder(tmp_path / "train", {"a": 2})
        source = ImageFolder(tmp_path, "train")
        (tmp_path / "train" / "a" / "000.png").unlink()
        with pytest.raises(ImageError, match="No such file"):
            source[0]


class TestOpenSource:
    def config(self, **fields) -> ConfigDict:
        return ConfigDict({"source": "auto", "path": "", "image_size": (16, 16)} | fields)

    def test_auto_looks_at_the_path(self, tmp_path, write_parquet, write_folder):
        write_parquet(tmp_path / "p" / "train.parquet")
        write_folder(tmp_path / "f" / "train", {"a": 1})
        digits = open_source(self.config(), "train")
        assert isinstance(digits, Digits)
        assert digits[0]["image"].shape == (16, 16, 3)
        assert isinstance(open_source(self.config(path=str(tmp_path / "p")), "train"), Parquet)
        assert isinstance(open_source(self.config(path=str(tmp_path / "f")), "train"), ImageFolder)

    def test_errors(self, tmp_path):
        with pytest.raises(UserError, match="unknown data source 'tfds': choose from digits, parquet"):
            open_source(self.config(source="tfds"), "train")
        with pytest.raises(UserError, match="'parquet' needs a path"):
            open_source(self.config(source="parquet"), "train")
        with pytest.raises(UserError, match="no such folder"):
            open_source(self.config(path=str(tmp_path / "gone")), "train")
        with pytest.raises(UserError, match=r"no split 'train' in .*: it has none"):
            open_source(self.config(path=str(tmp_path)), "train")
        with pytest.raises(UserError, match="needs the name of a split"):
            open_source(self.config(source="parquet", path=str(tmp_path)), None)


class TestSubset:
    def test_classes_keep_their_share(self):
        labels = np.repeat([0, 1, 2, 7], [100, 50, 25, 5])
        picked = stratified(labels, 36, seed=3)
        assert np.bincount(labels[picked], minlength=8)[[0, 1, 2, 7]].tolist() == [20, 10, 5, 1]
        assert len(set(picked)) == 36
        np.testing.assert_array_equal(picked, stratified(labels, 36, seed=3))
        assert not np.array_equal(picked, stratified(labels, 36, seed=4))

    @pytest.mark.parametrize("n", [1, 7, 101, 180])
    def test_the_count_is_exact_whatever_the_rounding(self, n):
        labels = np.repeat([0, 1, 2, 7], [100, 50, 25, 5])
        picked = stratified(labels, n, seed=0)
        assert len(picked) == len(set(picked)) == n
        share = np.bincount(labels[picked], minlength=8) - np.bincount(labels) * n / 180
        assert abs(share).max() < 1

    def test_is_a_view_of_the_source(self):
        source = Digits("test")
        part = subset(source, 50, seed=1)
        assert (len(part), part.num_classes) == (50, 10)
        names = [source.name_of(i) for i in range(len(source))]
        where = names.index(part.name_of(7))
        np.testing.assert_array_equal(part[7]["image"], source[where]["image"])
        assert part[7]["label"] == part.labels[7] == source.labels[where]

    @pytest.mark.parametrize("n", [0, 360])
    def test_wrong_sizes(self, n):
        with pytest.raises(ValueError, match="1 to 359 examples"):
            subset(Digits("test"), n)


class TestDecoded:
    def test_decodes_once(self, tmp_path, write_folder):
        write_folder(tmp_path, {"a": 3})
        source = keep_decoded(ImageFolder(tmp_path, None), 3 * 8 * 8 * 3)
        assert isinstance(source, Decoded)
        before = [source[i]["image"].copy() for i in range(3)]
        for file in (tmp_path / "a").iterdir():
            file.unlink()
        np.testing.assert_array_equal([source[i]["image"] for i in range(3)], before)
        assert source.in_memory

    def test_keeps_no_more_than_fits(self, tmp_path, write_folder):
        write_folder(tmp_path, {"a": 3})
        folder = ImageFolder(tmp_path, None)
        assert keep_decoded(folder, 3 * 8 * 8 * 3 - 1) is folder
        source = Decoded(folder, 2 * 8 * 8 * 3)
        for i in range(3):
            source[i]
        assert len(source._examples) == 2

    def test_leaves_a_bad_first_image_to_the_loader(self, tmp_path, write_folder):
        write_folder(tmp_path, {"a": 3})
        (tmp_path / "a" / "000.png").write_bytes(b"")
        folder = ImageFolder(tmp_path, None)
        assert keep_decoded(folder, 1 << 30) is folder
