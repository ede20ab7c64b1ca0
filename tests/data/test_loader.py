from collections import Counter
import itertools
import json
import threading
import time
from types import MappingProxyType

from image_files import plain
import numpy as np
import pytest

from tokjax.data.loader import Loader
from tokjax.data.sources import ImageFolder, keep_decoded, subset
from tokjax.data.transforms import Evaluation, ImageError, Mix, Normalise, Training
from tokjax.errors import UserError

SIZE = (8, 8)
RAW = Normalise((0, 0, 0), (1 / 255,) * 3)  # leaves pixels as they are


class Numbered:
    """`n` images whose red channel is their index; those in `bad` do not decode."""

    def __init__(self, n=50, bad=(), classes=5, in_memory=False, delay=0.0):
        self.labels = np.arange(n, dtype=np.int32) % classes
        self.class_names = tuple("abcdefghij"[:classes])
        self.num_classes = classes
        self.in_memory = in_memory
        self.bad = set(bad)
        self.delay = delay
        self.reads = Counter()
        self.lock = threading.Lock()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        with self.lock:
            self.reads[index] += 1
        time.sleep(self.delay * (index % 3))
        if index in self.bad:
            raise ImageError("truncated")
        return {"image": plain(index), "label": int(self.labels[index])}

    def name_of(self, index):
        return f"image-{index}.png"


def train_loader(source, batch_size=8, **options):
    options = {"transform": Training(SIZE, crop="pad", pad=2), "num_threads": 0, "normalise": RAW} | options
    return Loader(source, batch_size=batch_size, train=True, process_index=options.pop("process_index", 0), **options)


def eval_loader(source, batch_size=8, **options):
    options = {"transform": Evaluation(SIZE), "num_threads": 0, "normalise": RAW} | options
    return Loader(source, batch_size=batch_size, train=False, process_index=options.pop("process_index", 0), **options)


def take(loader_or_iterator, count):
    return list(itertools.islice(iter(loader_or_iterator), count))


def indices(batch) -> list[int]:
    """Which examples a batch of unaugmented images holds."""
    return batch["image"][batch["valid"]][:, 0, 0, 0].round().astype(int).tolist()


def shown_by(batches) -> list[int]:
    return [index for batch in batches for index in indices(batch)]


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
        for a, b in zip(first, second, strict=True)
    )


MIX = Mix(5, mixup=0.8, cutmix=1.0, label_smoothing=0.1)


class TestTraining:
    def test_the_form_of_a_batch(self):
        (batch,) = take(train_loader(Numbered()), 1)
        assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
            "image": ("float32", (8, 8, 8, 3)),
            "label": ("int32", (8,)),
            "valid": ("bool", (8,)),
        }
        assert batch["valid"].all()
        (mixed,) = take(train_loader(Numbered(), mix=MIX), 1)
        assert (mixed["label"].dtype, mixed["label"].shape) == (np.float32, (8, 5))

    def test_an_epoch_shows_every_example_once_in_a_new_order(self):
        batches = take(train_loader(Numbered(48), transform=Evaluation(SIZE)), 12)
        first, second = shown_by(batches[:6]), shown_by(batches[6:])
        assert sorted(first) == sorted(second) == list(range(48))
        assert first != second
        assert first != sorted(first)
        for batch in batches:
            assert [index % 5 for index in indices(batch)] == batch["label"].tolist()

    def test_the_remainder_is_dropped_or_padded(self):
        assert len(list(train_loader(Numbered(50), num_epochs=2))) == 12
        padded = list(train_loader(Numbered(50), num_epochs=1, drop_remainder=False))
        assert [int(batch["valid"].sum()) for batch in padded] == [8] * 6 + [2]

    def test_the_seed_decides_everything(self):
        first, again, other = (take(train_loader(Numbered(), seed=s, mix=MIX), 9) for s in (3, 3, 4))
        assert same(first, again)
        assert not any(same([a], [b]) for a, b in zip(first, other, strict=True))

    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_threads_change_nothing(self, threads):
        inline = take(train_loader(Numbered(), mix=MIX), 15)
        assert same(inline, take(train_loader(Numbered(delay=0.001), mix=MIX, num_threads=threads), 15))

    def test_augmentation_differs_between_epochs_and_between_images(self):
        batches = take(train_loader(Numbered(8, classes=2)), 20)
        windows = {tuple(np.argwhere(image[..., 1] > 0)[0]) for batch in batches for image in batch["image"]}
        assert len(windows) > 5
        for index in range(8):
            shown = {image.tobytes() for batch in batches for image in batch["image"] if image[..., 0].max() == index}
            assert len(shown) > 5 or index == 0

    @pytest.mark.parametrize("threads", [0, 3])
    @pytest.mark.parametrize("at", [0, 3, 6, 11])
    def test_resumes_exactly(self, at, threads):
        """Mid-epoch, at its end and in a later one; with augmentation, mixing and bad images."""

        def make():
            return train_loader(Numbered(bad={7, 20}), mix=MIX, bad_image_limit=2, num_threads=threads)

        iterator = iter(make())
        take(iterator, at)
        state = json.loads(json.dumps(iterator.get_state()))
        expected = take(iterator, 9)
        resumed = iter(make())
        take(resumed, 2)  # a used iterator must forget what it has read ahead
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert same(take(resumed, 9), expected)

    def test_does_not_resume_in_another_stream(self):
        state = iter(train_loader(Numbered())).get_state()
        for other in (train_loader(Numbered(49)), train_loader(Numbered(), 4), train_loader(Numbered(), seed=1)):
            with pytest.raises(ValueError, match="saved position counts batches of"):
                iter(other).set_state(state)
        iter(train_loader(Numbered(), 4, process_count=2)).set_state(state)

    def test_processes_share_the_batches_of_one(self):
        whole = take(train_loader(Numbered(), 8), 13)
        parts = [take(train_loader(Numbered(), 2, process_index=p, process_count=4), 13) for p in range(4)]
        joined = [{k: np.concatenate([part[i][k] for part in parts]) for k in whole[0]} for i in range(13)]
        assert same(joined, whole)

    def test_processes_mix_differently(self):
        # With distinct labels in a batch, the largest entry of a target is lambda or 1 - lambda.
        mix = Mix(10, mixup=1.0)
        source = Numbered(10, classes=10)
        parts = [take(train_loader(source, 4, process_index=p, process_count=2, mix=mix), 5) for p in range(2)]
        shares = np.array([[batch["label"].max() for batch in part] for part in parts])
        assert (abs(shares[0] - shares[1]) > 1e-3).all()


class TestEvaluation:
    @pytest.mark.parametrize("threads", [0, 3])
    def test_pads_the_last_batch(self, threads):
        loader = eval_loader(Numbered(21), num_threads=threads)
        batches = list(loader)
        assert loader.batches_per_epoch == len(batches) == 3
        assert {batch["image"].shape for batch in batches} == {(8, 8, 8, 3)}
        assert shown_by(batches) == list(range(21))
        assert batches[-1]["valid"].tolist() == [True] * 5 + [False] * 3
        assert not batches[-1]["label"][5:].any()
        assert same(list(loader), batches)

    @pytest.mark.parametrize(("n", "processes", "batch_size"), [(21, 4, 2), (21, 2, 8), (3, 4, 1), (64, 4, 4)])
    def test_processes_count_every_example_once_in_equally_many_batches(self, n, processes, batch_size):
        parts = [
            list(eval_loader(Numbered(n), batch_size, process_index=p, process_count=processes))
            for p in range(processes)
        ]
        assert len({len(part) for part in parts}) == 1
        seen = [set(shown_by(part)) for part in parts]
        assert sum(map(len, seen)) == n
        assert set.union(*seen) == set(range(n))

    def test_resumes(self):
        iterator = iter(eval_loader(Numbered(50)))
        take(iterator, 4)
        state = iterator.get_state()
        rest = list(iterator)
        resumed = iter(eval_loader(Numbered(50)))
        resumed.set_state(state)
        assert same(list(resumed), rest)
        assert len(rest) == 3


class TestBadImages:
    bad = (4, 11, 30)

    @pytest.mark.parametrize("threads", [0, 1, 6])
    def test_training_passes_over_them(self, threads):
        source = Numbered(48, bad=self.bad, delay=0.0005 if threads else 0)
        loader = train_loader(source, transform=Evaluation(SIZE), bad_image_limit=3, num_threads=threads, num_epochs=3)
        batches = list(loader)
        assert len(batches) == 18
        assert all(batch["valid"].all() for batch in batches)
        for epoch in range(3):
            shown = Counter(shown_by(batches[6 * epoch : 6 * epoch + 6]))
            assert set(shown) == set(range(48)) - set(self.bad)
            assert sum(shown.values()) == 48
        for batch in batches:
            assert [index % 5 for index in indices(batch)] == batch["label"].tolist()
        assert loader.bad_images == ["image-4.png", "image-11.png", "image-30.png"]
        if not threads:
            assert [source.reads[index] for index in self.bad] == [1, 1, 1]

    @pytest.mark.parametrize("threads", [0, 4])
    def test_evaluation_masks_them(self, threads):
        loader = eval_loader(Numbered(40, bad=self.bad), bad_image_limit=3, num_threads=threads)
        for _ in range(2):
            batches = list(loader)
            assert shown_by(batches) == [i for i in range(40) if i not in self.bad]
            assert not batches[0]["valid"][4]
            assert not batches[0]["image"][4].any()
            assert batches[0]["label"][4] == 0
        assert len(loader.bad_images) == 3

    @pytest.mark.parametrize("threads", [0, 1, 4])
    @pytest.mark.parametrize("make", [train_loader, eval_loader])
    def test_more_than_the_limit_is_an_error(self, make, threads):
        loader = make(Numbered(48, bad=self.bad), bad_image_limit=2, num_threads=threads, num_epochs=1)
        with pytest.raises(UserError) as error:
            list(loader)
        message = str(error.value)
        assert message.startswith("3 bad images, bad_image_limit is 2: ")
        assert all(f"image-{index}.png (truncated)" in message for index in self.bad)
        assert len(loader.bad_images) == 3

    @pytest.mark.parametrize("threads", [0, 4])
    def test_the_error_does_not_go_away(self, threads):
        iterator = iter(eval_loader(Numbered(40, bad={9}), num_threads=threads))
        next(iterator)
        state = iterator.get_state()
        for _ in range(3):
            with pytest.raises(UserError, match="1 bad images"):
                next(iterator)
            assert iterator.get_state() == state

    def test_many_are_listed_in_part(self):
        with pytest.raises(UserError) as error:
            list(eval_loader(Numbered(40, bad=range(20)), bad_image_limit=10))
        assert str(error.value).count("truncated") == 5
        assert str(error.value).endswith("; ...")

    def test_none_left(self):
        with pytest.raises(UserError, match="none of the 8 images can be read"):
            take(train_loader(Numbered(8, bad=range(8)), bad_image_limit=100), 1)

    def test_files(self, tmp_path, write_folder):
        write_folder(tmp_path, {"a": 5, "b": 5})
        (tmp_path / "a" / "001.png").write_bytes(b"")
        file = tmp_path / "b" / "007.png"
        file.write_bytes(file.read_bytes()[:60])
        loader = eval_loader(ImageFolder(tmp_path, None), 4, bad_image_limit=2, num_threads=2)
        assert [batch["valid"].tolist() for batch in loader] == [
            [True, False, True, True],
            [True, True, True, False],
            [True, True, False, False],
        ]
        assert loader.bad_images == [str(tmp_path / "a" / "001.png"), str(file)]

    def test_other_errors_are_not_swallowed(self):
        class Broken(Numbered):
            def __getitem__(self, index):
                raise RuntimeError("a bug")

        with pytest.raises(RuntimeError, match="a bug"):
            next(iter(eval_loader(Broken(), bad_image_limit=1000, num_threads=2)))


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size"),
            ({"process_index": 2, "process_count": 2}, "process_index"),
            ({"num_epochs": 0}, "num_epochs"),
            ({"num_threads": -1}, "num_threads"),
            ({"seed": -1}, "seed"),
            ({"bad_image_limit": -1}, "bad_image_limit"),
            ({"mix": MIX, "drop_remainder": False}, "mix needs train"),
            ({"mix": Mix(4)}, "mix.num_classes is 4, the source has 5"),
        ],
    )
    def test_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=message):
            train_loader(Numbered(), **options)

    def test_mixing_in_evaluation(self):
        with pytest.raises(ValueError, match="mix needs train"):
            eval_loader(Numbered(), mix=MIX)

    def test_too_few_examples(self):
        with pytest.raises(UserError, match="7 examples do not fill a batch of 8 x 1"):
            train_loader(Numbered(7))
        with pytest.raises(UserError, match="8 x 7"):
            train_loader(Numbered(50), process_count=7)

    def test_defaults(self):
        assert len(list(Loader(Numbered(9), batch_size=4, train=False, transform=Evaluation(SIZE)))) == 3


class WithFields(Numbered):
    """Also tells its index as an array and as a scalar."""

    fields = MappingProxyType({"grid": ((2, 3), "float32"), "number": ((), "int32")})

    def __getitem__(self, index):
        return {**super().__getitem__(index), "grid": np.full((2, 3), index / 2), "number": index, "more": "text"}


class TestFields:
    @pytest.mark.parametrize("threads", [0, 3])
    def test_are_stacked_beside_their_images(self, threads):
        batches = list(eval_loader(WithFields(21, bad={4}), bad_image_limit=1, num_threads=threads))
        for batch in batches:
            assert batch["grid"].dtype == np.float32 and batch["grid"].shape == (8, 2, 3)
            assert batch["number"].dtype == np.int32 and batch["number"].shape == (8,)
            assert batch["number"][batch["valid"]].tolist() == indices(batch)
            np.testing.assert_array_equal(batch["grid"], np.tile(batch["number"][:, None, None] / 2, (1, 2, 3)))
            assert not batch["number"][~batch["valid"]].any()
        plain_batches = list(eval_loader(Numbered(21, bad={4}), bad_image_limit=1))
        assert same([{k: b[k] for k in ("image", "label", "valid")} for b in batches], plain_batches)

    def test_training_takes_them_from_the_image_that_replaces_a_bad_one(self):
        loader = train_loader(WithFields(24, bad={3, 9}), transform=Evaluation(SIZE), bad_image_limit=2)
        for batch in take(loader, 6):
            assert batch["number"].tolist() == indices(batch)

    def test_resume(self):
        iterator = iter(train_loader(WithFields()))
        take(iterator, 4)
        state = iterator.get_state()
        resumed = iter(train_loader(WithFields()))
        resumed.set_state(state)
        assert same(take(resumed, 5), take(iterator, 5))

    @pytest.mark.parametrize("threads", [0, 3])
    def test_a_transform_may_have_some_too(self, threads):
        class Column:
            """A grey image as floats, and how bright it is."""

            size, channels, dtype = (8, 4), 1, "float32"
            fields = MappingProxyType({"shape": ((2,), "int32")})

            def __call__(self, image, rng):
                grey = image[:8, :4, :1].astype(np.float32) / 2
                return {"image": grey, "shape": np.array(image.shape[:2])}

        def normalise(pixels, out=None):
            return np.add(pixels, 0.25, out=out)

        source = WithFields(11, bad={4})
        options = {"transform": Column(), "normalise": normalise, "bad_image_limit": 1, "num_threads": threads}
        for number, batch in enumerate(eval_loader(source, **options)):
            assert batch["image"].shape == (8, 8, 4, 1) and batch["image"].dtype == np.float32
            assert batch["number"].shape == (8,) and batch["shape"].dtype == np.int32
            assert not batch["shape"][~batch["valid"]].any()
            for row in np.flatnonzero(batch["valid"]):
                image = source[8 * number + int(row)]["image"]
                np.testing.assert_array_equal(batch["image"][row], image[:8, :4, :1] / 2 + 0.25)
                assert tuple(batch["shape"][row]) == image.shape[:2]

    def test_do_not_mix(self):
        with pytest.raises(ValueError, match="source or transform also have grid, number"):
            train_loader(WithFields(), mix=MIX)

    def test_pass_through_subsets_and_decoded_sources(self):
        part = subset(WithFields(50), 10)
        kept = keep_decoded(part, 1 << 20)
        assert kept is not part and kept.fields == part.fields == WithFields.fields
        for _ in range(2):
            (batch,) = take(eval_loader(kept, 10), 1)
            assert batch["number"].tolist() == indices(batch)
