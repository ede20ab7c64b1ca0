"""Pictures and plots: the published rendering, what must be visible in each, and the errors."""

from pathlib import Path

import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest

from tokjax import viz

GOLDEN = Path(__file__).parent / "golden" / "tome" / "visualisation.npz"
ROWS = [
    {"method": "none", "macs_relative": 1.0, "accuracy": 0.98},
    {"method": "tome", "macs_relative": 0.7, "accuracy": 0.97},
    {"method": "tome", "macs_relative": 0.5, "accuracy": 0.95},
    {"method": "evit", "macs_relative": 0.5, "accuracy": 0.94},
    {"method": "random", "macs_relative": 0.5, "accuracy": 0.90, "control": True},
    {"method": "skipper", "macs_relative": None, "accuracy": None, "unreachable": "too low"},
]


def noise(height=12, width=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("own_colors", [False, True])
def test_merged_regions_gives_the_published_picture(own_colors):
    with np.load(GOLDEN, allow_pickle=False) as golden:
        groups = viz.groups_of(golden["source"][0], prefix=1)
        colors = None if own_colors else golden["colormap_f64"]
        ours = viz.merged_regions(golden["image_u8"], groups, int(golden["patch_size"]), colors=colors)
        assert groups.max() + 1 == golden["num_groups"]
        assert np.abs(ours.astype(int) - golden["rendered_u8"]).max() <= 1
        np.testing.assert_array_equal(viz.region_colors(int(golden["num_groups"])), golden["colormap_f64"])


def test_merged_regions_on_a_grid_that_is_not_square():
    image = noise(8, 12)
    colors = np.array([[1, 0, 0], [0, 1, 0]])
    picture = viz.merged_regions(image, np.array([0, 0, 1, 0, 0, 1]), 4, grid=(2, 3), colors=colors)
    inside = np.zeros((8, 12), bool)
    inside[1:7, 1:7] = inside[1:7, 9:11] = True  # no ring between patches of one group, a ring along the border
    mean = image[:, :8].reshape(-1, 3).mean(0).astype(np.uint8)
    assert (picture[inside][..., :] == np.where(np.arange(12)[None, :, None] < 8, mean, picture)[inside]).all()
    assert (picture[:, :8][~inside[:, :8]] == [255, 0, 0]).all()
    assert (picture[:, 8:][~inside[:, 8:]] == [0, 255, 0]).all()


def test_dropped_patches_are_no_region_and_keep_their_structure():
    image = noise()
    groups = np.array([0, 1, -1, 2, 7, 0, 1, -1, 2, 7, 0, 1, 1, 1, 1])
    picture = viz.merged_regions(image, groups, 4, num_groups=3)
    dropped = np.isin(groups, (-1, 7)).reshape(3, 5).repeat(4, 0).repeat(4, 1)
    # Nearly grey, with less contrast than the image, and the same whatever the marker of a dropped patch.
    assert np.ptp(picture[dropped], axis=-1).max() <= 52
    assert 0 < picture[dropped].std(0).max() < 0.5 * image[dropped].std(0).min()
    again = viz.merged_regions(image, np.where(np.isin(groups, (-1, 7)), -1, groups), 4)
    np.testing.assert_array_equal(picture, again)
    everything = viz.merged_regions(image, np.full(15, -1), 4)
    np.testing.assert_array_equal(everything[dropped], picture[dropped])


def test_groups_of_a_source_and_of_an_origin_agree():
    origin = np.array([0, 1, 3, 1, 2, 4, 3])
    source = (np.arange(4)[:, None] == origin).astype(np.float32)  # slot 4 of 4: dropped
    expected = [1, 3, 1, 2, -1, 3]
    assert viz.groups_of(source, 1).tolist() == expected
    assert viz.groups_of(jnp.asarray(source, jnp.bfloat16), 1).tolist() == expected
    assert viz.groups_of_origin(jnp.asarray(origin), 1, 4).tolist() == expected
    assert viz.groups_of_origin(origin, 1).tolist() == [1, 3, 1, 2, 4, 3]


def test_merge_pictures_keep_a_region_s_colour_when_its_slot_moves():
    image = np.zeros((4, 8, 3), np.uint8)
    origins = [np.array([0, 1, 1, 2, 3, 1, 1, 2, 3]), np.array([0, 2, 2, 1, 3, 2, 2, 1, 3])]
    first, second = viz.merge_pictures(image, origins, [4, 4], 2, (2, 4), side=8)[1:]
    np.testing.assert_array_equal(first.image, second.image)
    assert first.caption == "after layer 1 of 2\n4 tokens"


def test_strips_hold_one_picture_a_layer():
    image, patches = noise(8, 12), 6
    origins = [np.arange(7), np.array([0, 1, 1, 2, 3, 4, 5])]
    strip = viz.merge_strip(image, origins, [7, 5], 4, side=120, layers=[1])
    assert strip.dtype == np.uint8 and strip.shape[1] > 2 * 120
    np.testing.assert_array_equal(strip[10:90, 10:130], image.repeat(10, 0).repeat(10, 1))
    kept = np.ones((3, patches), bool)
    kept[1:, 2] = False
    pictures = viz.kept_pictures(image, kept, 4, (2, 3), side=12)
    assert [p.caption.split("\n")[1] for p in pictures] == ["6 patches", "6 patches", "5 patches", "5 patches"]
    np.testing.assert_array_equal(pictures[1].image, image)
    changed = (pictures[2].image != image).any(-1)
    assert changed[:4, 8:].mean() > 0.9 and not changed[4:].any() and not changed[:, :8].any()
    wide, tall = viz.kept_patches(image, kept, 4), viz.kept_patches(image, kept, 4, columns=1)
    assert wide.shape[1] > wide.shape[0] and tall.shape[0] > 4 * 140 and tall.shape[1] < 260


def test_image_grid_centres_pictures_and_fits_captions():
    small, large = np.zeros((20, 20, 3), np.uint8), np.zeros((60, 140, 3), np.uint8)
    bare = viz.image_grid([small, large], columns=2, gap=4)
    assert bare.shape == (60 + 8, 2 * 140 + 12, 3)
    assert (bare[4 + 20 : 4 + 40, 4 + 60 : 4 + 80] == 0).all() and (bare[:, : 4 + 60] == 255).all()
    text = viz.image_grid([small, large], ["a caption of so many words that it breaks", "x" * 80], columns=2, gap=4)
    below = text[64:]
    assert below.shape[0] > 2 * 14 and (below < 128).any()
    assert (text[:, :4] == 255).all() and (text[:, -4:] == 255).all(), "a caption runs over the edge"
    assert (text[:, 144:148] == 255).all(), "a caption runs into its neighbour"


def test_to_uint8_undoes_the_normalisation():
    image = noise()
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    np.testing.assert_array_equal(viz.to_uint8((image / np.float32(255) - mean) / std, mean, std), image)
    np.testing.assert_array_equal(viz.to_uint8(jnp.asarray(image[..., :1] / 255.0)), image[..., :1].repeat(3, -1))
    assert viz.to_uint8(np.array([[[-1.0], [2.0]]]))[0, :, 0].tolist() == [0, 255]


def test_pareto_plot_tells_methods_controls_and_the_unreduced_model_apart():
    axes = viz.pareto_plot(ROWS, title="t").axes[0]
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"unreduced", "tome", "evit", "random (control)"}
    assert lines["unreduced"].get_marker() == "*"
    assert lines["tome"].get_xydata().tolist() == [[0.5, 95.0], [0.7, 97.0]]
    assert lines["random (control)"].get_color() in viz.GREYS and lines["random (control)"].is_dashed()
    assert {lines["tome"].get_color(), lines["evit"].get_color()} <= set(viz.PALETTE) and not lines["tome"].is_dashed()
    assert any(set(line.get_ydata()) == {98.0} for line in axes.lines if line.get_label().startswith("_"))
    assert "MACs" in axes.get_xlabel() and "%" in axes.get_ylabel()
    named = viz.pareto_plot(ROWS, baseline="evit", controls=["tome"]).axes[0]
    assert {"evit (unreduced)", "tome (control)", "none"} <= set(named.get_legend_handles_labels()[1])


def test_many_lines_look_different_and_their_legend_stands_outside():
    rows = [{"method": f"m{i}", "macs_relative": 0.5, "accuracy": i / 30} for i in range(21)]
    figure = viz.pareto_plot(rows)
    axes = figure.axes[0]
    looks = {(line.get_color(), line.get_marker(), str(line._dash_pattern)) for line in axes.lines}
    assert len(looks) == 21
    figure.draw_without_rendering()
    legend = axes.get_legend().get_window_extent()
    assert legend.x0 >= axes.get_window_extent().x1 and legend.x1 <= figure.bbox.x1 + 1


def test_token_count_plot_has_a_staircase_for_each_name():
    axes = viz.token_count_plot({"none": [197, 197, 197], "tome": np.array([197, 184, 171])}).axes[0]
    assert [line.get_label() for line in axes.lines] == ["unreduced", "tome"]
    assert axes.lines[1].get_xydata().tolist() == [[1, 197], [2, 184], [3, 171]]
    assert axes.lines[1].get_color() == viz.PALETTE[0] and axes.get_ylim()[0] == 0
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "tokens")


def test_curves_plot_sorts_keys_into_panels_and_skips_gaps():
    rows = [{"step": 1, "train_loss": 2.0}, {"step": 2, "train_loss": float("nan"), "val/accuracy": 0.5}, {"step": 3}]
    figure = viz.curves_plot(rows, title="run")
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy [%]"]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 2.0]]
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[2, 50.0]]
    several = viz.curves_plot({"a": rows, "b": rows}, panels=["loss"])
    assert [line.get_label() for line in several.axes[0].lines] == ["a · train_loss", "b · train_loss"]


def test_save_png_writes_whole_files_only(tmp_path, monkeypatch):
    image = noise()
    path = viz.save_png(image, tmp_path / "new" / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    with Image.open(viz.save_png(viz.token_count_plot({"a": [3, 2]}), tmp_path / "b.png")) as plot:
        assert plot.format == "PNG" and plot.width > 600

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        viz.save_png(image[::-1], path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_plots_leave_pyplot_alone():
    import matplotlib._pylab_helpers as helpers

    assert isinstance(viz.pareto_plot(ROWS), Figure)
    assert not helpers.Gcf.figs


IMAGE, GROUPS = noise(8, 8), np.zeros(4, int)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: viz.merged_regions(IMAGE.astype(np.float32), GROUPS, 4), "image must be uint8"),
        (lambda: viz.merged_regions(IMAGE[..., 0], GROUPS, 4), "image must be uint8"),
        (lambda: viz.merged_regions(IMAGE, GROUPS, 3), "patch_size must divide"),
        (lambda: viz.merged_regions(IMAGE, GROUPS, 0), "patch_size must divide"),
        (lambda: viz.merged_regions(IMAGE, GROUPS, 4, grid=(1, 4)), r"grid must be \(2, 2\)"),
        (lambda: viz.merged_regions(IMAGE, GROUPS[:3], 4), "2 x 2 = 4 patches, got 3"),
        (lambda: viz.merged_regions(IMAGE, GROUPS / 2, 4), "groups must be integers"),
        (lambda: viz.merged_regions(IMAGE, GROUPS - 2, 4), "groups must be -1"),
        (lambda: viz.merged_regions(IMAGE, GROUPS + 1, 4, colors=np.zeros((1, 3))), "colors must be"),
        (lambda: viz.merged_regions(IMAGE, GROUPS, 4, colors=np.full((1, 3), 255)), r"colors must lie in 0\.\.1"),
        (lambda: viz.merged_regions(IMAGE, GROUPS, 4, num_groups=-1), "num_groups must be"),
        (lambda: viz.groups_of(np.zeros((1, 3, 4))), "source must be a matrix"),
        (lambda: viz.groups_of(np.full((3, 4), np.nan)), "finite"),
        (lambda: viz.groups_of(np.zeros((3, 4)), prefix=4), "prefix must be"),
        (lambda: viz.groups_of_origin(np.array([0, 5]), 1, 4), r"slots 0\.\.4, got 0\.\.5"),
        (lambda: viz.groups_of_origin(np.array([0.0, 1.0]), 1, 4), "origin must be integers"),
        (lambda: viz.kept_patches(IMAGE, np.ones((2, 4), int), 4), r"kept\[0\] must be bool \[4\]"),
        (lambda: viz.kept_patches(IMAGE, np.ones((2, 4), bool), 4, layers=[2]), r"layers must be .* 0\.\.1"),
        (lambda: viz.merge_strip(IMAGE, [np.arange(5)], [5, 5], 4), "as long as each other"),
        (lambda: viz.merge_strip(IMAGE, [np.arange(5)], [5], 4, side=0), "side must be"),
        (lambda: viz.image_grid([]), "at least one picture"),
        (lambda: viz.image_grid([IMAGE], ["a", "b"]), "labels must hold one"),
        (lambda: viz.image_grid([IMAGE], columns=0), "columns"),
        (lambda: viz.to_uint8(np.zeros((2, 4, 4, 3))), "image must be"),
        (lambda: viz.to_uint8(np.full((4, 4, 3), np.nan)), "finite"),
        (lambda: viz.to_uint8(np.zeros((4, 4, 3)), mean=(0, 0)), "mean must be"),
        (lambda: viz.to_uint8(np.zeros((4, 4, 3)), std=0.0), "std must be positive"),
        (lambda: viz.pareto_plot([{"method": "a", "accuracy": float("nan")}]), "rows must hold"),
        (lambda: viz.token_count_plot({}), "counts must"),
        (lambda: viz.token_count_plot({"a": [1, -1]}), r"counts\['a'\]"),
        (lambda: viz.curves_plot([{"step": 1}]), "runs must hold"),
        (lambda: viz.save_png(IMAGE, "a.jpg"), "end in .png"),
        (lambda: viz.save_png(IMAGE / 255, "never.png"), "uint8"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class TestDeletedBytes:
    def inks(self, picture, color):
        return int((picture == np.array(color, np.uint8)).all(-1).sum())

    def test_boxes_are_filled_where_bytes_are_kept(self):
        kept, gone = (viz.deleted_bytes([("a", "abc dé", np.full(7, alive))], fonts=()) for alive in (True, False))
        blue = (0, 114, 178)
        assert kept.dtype == np.uint8 and kept.shape == gone.shape
        assert self.inks(kept, blue) > 0 == self.inks(gone, blue)
        half = viz.deleted_bytes([("a", "abc dé", np.array([1, 0, 0, 0, 0, 0, 0], bool))], fonts=())
        assert self.inks(kept, blue) > 6 * self.inks(half, blue) > 0

    def test_lines_wrap_between_characters(self):
        one, two = (viz.deleted_bytes([("a", "é" * n, np.ones(2 * n, bool))], columns=9, fonts=()) for n in (4, 5))
        assert two.shape[0] > one.shape[0] and two.shape[1] == one.shape[1]
        assert viz._characters("aé世\U0001f642".encode() + b"\xff\xe4") == [
            ("a", 1), ("é", 2), ("世", 3), ("\U0001f642", 4), (None, 1), (None, 1),
        ]  # fmt: skip

    def test_what_no_font_has_is_written_in_hexadecimal(self):
        faces = viz._faces({"a", "é", " ", "\U0010fffd", "\x00"}, 12, fonts=["no such font"])
        assert set(faces) == {"a", "é", " "}
        plain, coded = (viz.deleted_bytes([("a", t, np.ones(3, bool))], fonts=()) for t in (b"abc", b"\xff" * 3))
        assert plain.shape == coded.shape
        note = slice(48, None)  # below the only line
        assert (coded[note] < 255).sum() > 1.5 * (plain[note] < 255).sum() > 0

    def test_an_empty_text(self):
        assert viz.deleted_bytes([("nothing", "", np.zeros(0, bool))], fonts=()).ndim == 3

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            ([], {}, "rows must hold at least one text"),
            ([("a", "é", np.ones(1, bool))], {}, r"kept of 'a' must be bool \[2\], got bool \[1\]"),
            ([("a", "a", np.ones(1))], {}, r"must be bool \[1\], got float64"),
            ([("a", "a", np.ones(1, bool))], {"columns": 7}, "columns and font_size must be at least 8 and 6, got 7"),
        ],
    )
    def test_errors(self, rows, options, message):
        with pytest.raises(ValueError, match=message):
            viz.deleted_bytes(rows, **options)


class TestShadedTokens:
    def test_the_colour_tells_the_share(self):
        full, half, none = (
            viz.shaded_tokens([("a", ["one", " two"], np.full(2, share))], fonts=()) for share in (1.0, 0.5, 0.0)
        )
        blue = np.array((86, 180, 233))
        assert full.dtype == np.uint8 and full.shape == half.shape == none.shape
        assert (full == blue).all(-1).sum() > 500 > 0 == (none == blue).all(-1).sum()
        assert (np.abs(half - (blue + 255.0) / 2) <= 0.5).all(-1).sum() > 500
        one = viz.shaded_tokens([("a", ["one", " two"], np.array([1.0, 0.0]))], fonts=())
        np.testing.assert_allclose((one == blue).all(-1).sum(), 3 / 7 * (full == blue).all(-1).sum(), rtol=0.1)

    def test_lines(self):
        one, two = (viz.shaded_tokens([("a", ["é\n"] * n, np.ones(n))], columns=16, fonts=()) for n in (8, 9))
        assert two.shape[0] > one.shape[0] and two.shape[1] == one.shape[1]
        assert viz.shaded_tokens([("nothing", [], np.zeros(0))], fonts=()).ndim == 3

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            ([], {}, "rows must hold at least one text"),
            ([("a", ["b", "c"], np.ones(1))], {}, r"share of 'a' must be \[2\] in 0..1, got \[1\]"),
            ([("a", ["b"], np.array([1.5]))], {}, "in 0..1"),
            ([("a", ["b"], np.ones(1))], {"columns": 9}, "columns and font_size must be at least 16 and 6, got 9"),
        ],
    )
    def test_errors(self, rows, options, message):
        with pytest.raises(ValueError, match=message):
            viz.shaded_tokens(rows, **options)
