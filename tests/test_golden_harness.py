"""The harness must catch what it is there to catch, so it is given adapters that cheat and err."""

from pathlib import Path
from types import SimpleNamespace

from golden_harness import GoldenError, check_adapter, check_case, find_cases, folder_of, load_adapter
import jax
import jax.numpy as jnp
import numpy as np
import pytest

X = np.array([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]], np.float32)


@pytest.fixture
def case(tmp_path):
    path = tmp_path / "double" / "small.npz"
    path.parent.mkdir()
    np.savez(
        path, x=X, **{"out.double": X * 2, "out.order": np.argsort(X), "out.positive": X > 0}, length=np.array([2, 3])
    )
    return path


def run(case, arrays):
    x = jnp.asarray(arrays["x"])
    return {"out.double": x * 2, "out.order": jnp.argsort(x), "out.positive": x > 0}


def adapter(run=run, **declared):
    return SimpleNamespace(**{"INPUTS": ("x", "len*"), "run": run, **declared})


def changed(**values):
    """The right answers, but for these arrays ("_" for "."); None: not returned."""

    def wrong(case, arrays):
        out = run(case, arrays) | {name.replace("_", "."): value for name, value in values.items()}
        return {name: value for name, value in out.items() if value is not None}

    return wrong


def fails(case, adapter, message):
    with pytest.raises(GoldenError, match=message) as caught:
        check_case(case, adapter)
    return str(caught.value)


def test_right_answers_pass(case):
    report = check_case(case, adapter())
    assert report.inputs == ("x", "length")
    assert report.compared == {"out.double": 1.0, "out.order": 1.0, "out.positive": 1.0}
    assert report.excused == {}
    assert "2 inputs, 3 compared, 0 excused" in str(report)


def test_only_inputs_are_handed_over(case):
    def spy(path, arrays):
        assert path == case
        assert set(arrays) == {"x", "length", "out.double", "out.order", "out.positive"}
        assert isinstance(arrays["x"], np.ndarray)
        assert not arrays["x"].flags.writeable
        for name in ("out.double", "out.order", "out.positive"):
            assert isinstance(arrays[name], jax.ShapeDtypeStruct)
            assert arrays[name].shape == (2, 3)
        assert arrays["out.order"].dtype == np.int64
        return run(path, arrays)

    check_case(case, adapter(spy))


def test_patterns_are_case_sensitive(case):
    fails(case, adapter(INPUTS=("x", "LEN*")), "length: neither an input")


def test_missing_array_is_caught_by_name(case):
    text = fails(
        case, adapter(changed(out_order=None)), "out.order: neither an input, nor returned by run, nor excused"
    )
    assert "out.double" not in text


def test_excused_array_may_be_missing(case):
    report = check_case(case, adapter(changed(out_order=None), EXCUSED={"out.o*": "ties are broken at random"}))
    assert report.excused == {"out.order": "ties are broken at random"}
    assert "ties are broken at random" in str(report)


def test_excuse_does_not_cover_what_is_returned_wrong(case):
    fails(case, adapter(changed(out_order=np.zeros((2, 3))), EXCUSED={"*": "any"}), "out.order: .* differ")


@pytest.mark.parametrize("reason", ["", "  ", None, 3])
def test_excuse_without_reason_is_rejected(case, reason):
    fails(case, adapter(EXCUSED={"nothing": reason}), "EXCUSED.*needs a reason")


def test_unknown_name_is_caught(case):
    fails(case, adapter(changed(out_typo=X)), "out.typo: returned by run, but no array of the file")


def test_wrong_value_is_caught(case):
    wrong = X * 2
    wrong[1, 2] += 0.5
    text = fails(case, adapter(changed(out_double=wrong)), "out.double: 1 of 6 elements differ")
    assert "first at (1, 2): -11.5, expected -12.0, largest difference 0.5" in text


def test_all_problems_are_told_at_once(case):
    text = fails(case, adapter(changed(out_double=X, out_order=None)), "out.double")
    assert "out.order" in text


@pytest.mark.parametrize("wrong", [X[None] * 2, (X * 2)[:, :2], np.float32(2), (X * 2).reshape(3, 2)])
def test_wrong_shape_is_caught(case, wrong):
    fails(case, adapter(changed(out_double=wrong)), r"out.double: shape .*, expected \(2, 3\)")


def test_floats_are_exact_without_tolerance(case):
    near = np.nextafter(X * 2, np.inf)
    fails(case, adapter(changed(out_double=near)), "6 of 6 elements differ")
    check_case(case, adapter(changed(out_double=near), TOLERANCE={"out.d*": (1e-6, 0)}))
    check_case(case, adapter(changed(out_double=near.astype(np.float64)), TOLERANCE={"out.d*": (0, 1e-5)}))


def test_first_tolerance_that_matches_counts(case):
    off = adapter(changed(out_double=X * 2 + 0.1), TOLERANCE={"out.double": (0, 0.01), "*": (0, 1)})
    fails(case, off, "rtol 0, atol 0.01")
    off.TOLERANCE = {"*": (0, 0.2), "out.double": (0, 0.01)}
    check_case(case, off)


def test_a_tolerance_may_be_that_of_some_cases_only(case):
    off = adapter(changed(out_double=X * 2 + 0.1), TOLERANCE={"sm*/out.double": (0, 0.2), "*": (0, 0.01)})
    check_case(case, off)
    off.TOLERANCE = {"large*/out.double": (0, 0.2), "*": (0, 0.01)}
    fails(case, off, "rtol 0, atol 0.01")


@pytest.mark.parametrize("tolerance", [(1e-3,), 1e-3, (-1, 0), (float("nan"), 0), (0, float("inf"))])
def test_malformed_tolerance_is_rejected(tolerance):
    with pytest.raises(GoldenError, match="TOLERANCE"):
        check_adapter(adapter(TOLERANCE={"*": tolerance}))


def test_whole_numbers_and_booleans_have_no_relative_tolerance(tmp_path):
    path = tmp_path / "tokens.npz"
    np.savez(path, x=X, ids=np.array([30000, 5]), flag=np.array([True, False]))

    def off(ids=(30000, 5), flag=(True, False)):
        return adapter(lambda case, arrays: {"ids": np.array(ids), "flag": np.array(flag)}, TOLERANCE={"*": (0.1, 0.5)})

    check_case(path, off())
    fails(path, off(ids=(30001, 5)), "ids: 1 of 2 elements differ")
    fails(path, off(flag=(True, True)), "flag: 1 of 2 elements differ")
    fails(path, off(flag=(1.1, 0)), "flag: 1 of 2 elements differ")
    check_case(path, off(flag=(1, 0)))
    near = off(ids=(30001, 4))
    near.TOLERANCE = {"ids": (0, 1)}
    check_case(path, near)
    fails(path, off(ids=(30000.4, 5)), "ids: 1 of 2")


def test_nan_and_infinity_must_sit_in_the_same_places(tmp_path):
    path = tmp_path / "special.npz"
    np.savez(path, x=X, y=np.array([np.nan, np.inf, -np.inf, 1]))

    def of(*values):
        return adapter(lambda case, arrays: {"y": jnp.array(values)}, TOLERANCE={"*": (1e-3, 1e-3)})

    nan, inf = np.nan, np.inf
    check_case(path, of(nan, inf, -inf, 1.0005))
    for wrong in (
        (0, inf, -inf, 1),
        (nan, nan, -inf, 1),
        (nan, inf, inf, 1),
        (nan, inf, -inf, nan),
        (nan, 1e30, -inf, 1),
    ):
        fails(path, of(*wrong), "y: 1 of 4 elements differ")
    fails(path, of(nan, inf, -inf, inf), "y: 1 of 4 elements differ")


def test_bfloat16_answers_and_empty_arrays_compare(tmp_path):
    path = tmp_path / "special.npz"
    np.savez(path, y=np.array([1.0, 2.0], np.float32), empty=np.zeros((0, 3)))
    check_case(path, adapter(lambda case, arrays: {"y": jnp.array([1, 2], jnp.bfloat16), "empty": jnp.zeros((0, 3))}))


def test_mask_leaves_out_what_is_undefined_and_tells_the_share(case):
    beyond = np.array([[2, -4, 99], [8, 10, -12]], np.float32)
    masked = adapter(
        changed(out_double=beyond),
        COMPARE={"out.double": lambda inputs: np.arange(3) < inputs["length"][:, None]},
    )
    report = check_case(case, masked)
    assert report.compared["out.double"] == pytest.approx(5 / 6)
    assert "out.double: compared 83.3% of the elements" in str(report)
    beyond[0, 0] = 99
    fails(case, masked, r"out.double: 1 of 5 elements differ .* first at \(0, 0\)")


def test_mask_broadcasts(case):
    report = check_case(case, adapter(COMPARE={"*": lambda inputs: np.array([[True], [False]])}))
    assert set(report.compared.values()) == {0.5}


@pytest.mark.parametrize(
    "mask, message",
    [
        (lambda inputs: np.zeros((2, 3), bool), "selects nothing"),
        (lambda inputs: np.ones((2, 3)), "dtype float64, expected bool"),
        (lambda inputs: np.ones((4, 3), bool), "does not broadcast"),
        (lambda inputs: np.ones((5, 2, 3), bool), "does not broadcast"),
    ],
)
def test_bad_masks_are_caught(case, mask, message):
    fails(case, adapter(COMPARE={"out.double": mask}), f"out.double: .*{message}")


def test_masks_see_inputs_only(case):
    with pytest.raises(KeyError):
        check_case(case, adapter(COMPARE={"out.double": lambda inputs: inputs["out.positive"]}))


def test_returned_inputs_do_not_count_as_compared(case):
    echo = adapter(lambda path, arrays: {"x": arrays["x"]}, EXCUSED={"out.*": "not made yet"})
    fails(case, echo, "nothing is compared")
    assert set(check_case(case, adapter(lambda p, a: run(p, a) | {"x": a["x"]})).compared) == {
        *("out.double", "out.order", "out.positive")
    }


def test_everything_an_input_fails(case):
    fails(case, adapter(lambda path, arrays: {}, INPUTS=("*",)), "nothing is compared")


def test_empty_arrays_alone_fail(tmp_path):
    np.savez(tmp_path / "empty.npz", x=X, y=np.zeros((0, 2)))
    fails(tmp_path / "empty.npz", adapter(lambda path, arrays: {"y": np.zeros((0, 2))}), "nothing is compared")


def test_strings_compare_with_strings_only(tmp_path):
    path = tmp_path / "words.npz"
    np.savez(path, x=X, words=np.array(["one", "2"]))
    check_case(path, adapter(lambda path, arrays: {"words": np.array(["one", "2"])}))
    fails(path, adapter(lambda path, arrays: {"words": np.array(["one", "3"])}), "words: 1 of 2 elements differ")
    fails(path, adapter(lambda path, arrays: {"words": np.array([1, 2])}), "words: 2 of 2 elements differ")


def test_pickled_arrays_are_refused(tmp_path):
    path = tmp_path / "objects.npz"
    np.savez(path, x=np.array([{}], object))
    fails(path, adapter(), "objects.npz cannot be read")


@pytest.mark.parametrize("inputs", [["x"], "x", None, (3,)])
def test_malformed_inputs_are_rejected(case, inputs):
    fails(case, adapter(INPUTS=inputs), "INPUTS must be a tuple")


def test_cases_come_from_the_folder(case, tmp_path):
    deep = tmp_path / "other-method" / "large" / "one.npz"
    deep.parent.mkdir(parents=True)
    for path in (deep, tmp_path / "double" / "weights.npz", tmp_path / "double" / "weights_b.npz"):
        np.savez(path, x=X)
    (tmp_path / "double" / "notes.json").write_text("{}")
    assert find_cases(tmp_path) == [case, deep]
    assert [folder_of(path, tmp_path) for path in (case, deep)] == ["double", "other-method"]
    np.savez(tmp_path / "stray.npz", x=X)
    with pytest.raises(GoldenError, match=r"stray\.npz lies directly in the golden root"):
        folder_of(tmp_path / "stray.npz", tmp_path)
    assert find_cases(tmp_path / "nowhere") == []


ADAPTER = """
import dataclasses
import numpy as np
INPUTS = ("x", "length")
@dataclasses.dataclass
class Double:
    x: "np.ndarray"
def run(case, arrays):
    beside = np.load(case.parent / "weights.npz", allow_pickle=False)["two"]
    x = Double(arrays["x"]).x
    return {"out.double": x * beside, "out.order": np.argsort(x), "out.positive": x > 0}
"""


def test_adapters_load_by_path_and_read_files_beside_the_case(case, tmp_path):
    np.savez(case.parent / "weights.npz", two=np.float32(2))
    path = tmp_path / "a-method.py"
    path.write_text(ADAPTER)
    assert set(check_case(case, load_adapter(path)).compared) == {"out.double", "out.order", "out.positive"}


def test_missing_or_malformed_adapter_fails(tmp_path):
    with pytest.raises(GoldenError, match="golden vectors for 'tome' but no adapter golden_adapters/tome"):
        load_adapter(Path("golden_adapters") / "tome.py")
    path = tmp_path / "empty.py"
    path.write_text("")
    with pytest.raises(GoldenError, match=r"INPUTS must be a tuple .*\n.*run.* is missing"):
        load_adapter(path)
