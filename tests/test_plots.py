"""Figures show the data that their titles name, and are written completely or not at all."""

import json
import math
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_results import FAMILIES, write_results

from unsloth_spectral.errors import InvalidArgumentError, SpectralError
from unsloth_spectral.eval.results import Point, Results, read_results
from unsloth_spectral.plots import (
    allocation_figure,
    check_figure_target,
    comparison_figure,
    drift_figure,
    frontier_figure,
    heatmap_figure,
    inline_svg,
    length_of,
    lengths_figure,
    place_of,
    save_figure,
    spectrum_figure,
)
from unsloth_spectral.plots.style import PALETTE, setting_of

pytest.importorskip("matplotlib")


def side(singular_values: list[float], effective_rank: int) -> dict[str, Any]:
    return {"singular_values": singular_values, "effective_rank": effective_rank, "entropy": 1.0, "top16_share": 0.5}


def spectrum_report(layers: tuple[int, ...] = (0, 1, 2), num_heads: int = 2, head_dim: int = 64) -> dict[str, Any]:
    """Keys fall off fast, values slowly; the effective rank tells layer, head and side."""
    fast = [math.exp(-i / 10) for i in range(head_dim)]
    slow = [math.exp(-i / 60) for i in range(head_dim)]
    heads = [
        {
            "layer_idx": layer,
            "head_idx": head,
            "keys": side(fast, 10 * layer + head),
            "values": side(slow, 10 * layer + head + 5),
        }
        for layer in layers
        for head in range(num_heads)
    ]
    return {"model": "owner/model", "heads": heads, "head_dim": head_dim, "num_tokens": 2048, "block_size": 512}


class TestSpectrumFigure:
    def test_titles_and_labels(self) -> None:
        figure = spectrum_figure(spectrum_report())
        curves, keys, values, bar = figure.axes
        assert figure.get_suptitle() == "owner/model: spectra of keys and values on 2,048 tokens, in blocks of 512"
        assert curves.get_title() == "Variance kept at each rank"
        assert (curves.get_xlabel(), curves.get_ylabel()) == ("rank (of 64)", "share of the variance kept")
        assert keys.get_title() == "Keys: rank that keeps 95% of the variance, by head"
        assert values.get_title() == "Values: rank that keeps 95% of the variance, by head"
        assert (keys.get_ylabel(), values.get_ylabel(), values.get_xlabel()) == ("head", "head", "layer")
        assert bar.get_ylabel() == "rank (of 64)"
        assert tuple(figure.get_size_inches() * figure.dpi) == (1400, 600)

    def test_curves_are_the_variance_kept(self) -> None:
        report = spectrum_report()
        axes = spectrum_figure(report).axes[0]
        lines = {line.get_label().split(",")[0]: line.get_ydata() for line in axes.lines}
        for name in ("keys", "values"):
            squares = np.square(report["heads"][0][name]["singular_values"])
            assert lines[name] == pytest.approx([0, *(squares.cumsum() / squares.sum())])
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        # exp(-i / 10) keeps 1 - exp(-r / 5) at rank r, which reaches 0.95 at 14.98.
        assert legend[0] == "keys, median head: 95% at rank 15"
        assert legend[2] == "shaded: 10th to 90th percentile of heads"

    def test_ranks_16_and_32_are_marked(self) -> None:
        axes = spectrum_figure(spectrum_report()).axes[0]
        keys = [f"{1 - math.exp(-rank / 5):.0%}" for rank in (16, 32)]
        assert [text.get_text() for text in axes.texts][::2] == keys
        assert {16, 32} <= set(axes.get_xticks())
        small = spectrum_figure(spectrum_report(head_dim=24)).axes[0]
        assert len(small.texts) == 2, "there is no rank 32"

    def test_heat_maps_show_layer_by_head(self) -> None:
        _, keys, values, _ = spectrum_figure(spectrum_report()).axes
        (key_map,), (value_map,) = keys.images, values.images
        assert key_map.get_array().tolist() == [[0, 10, 20], [1, 11, 21]]
        assert value_map.get_array().tolist() == [[5, 15, 25], [6, 16, 26]]
        assert key_map.get_clim() == value_map.get_clim() == (0, 64)

    def test_layers_left_out_and_uneven_heads(self) -> None:
        report = spectrum_report(layers=(5, 11), num_heads=2)
        report["heads"].pop()
        _, keys, _, _ = spectrum_figure(report).axes
        assert [label.get_text() for label in keys.get_xticklabels()] == ["5", "11"]
        assert keys.images[0].get_array().mask.tolist() == [[False, False], [False, True]]

    def test_heads_of_other_widths_and_of_zeros(self, tmp_path: Path) -> None:
        report = spectrum_report(layers=(0,), head_dim=16)
        report["heads"][0]["keys"] = side([0.0] * 8, 0)
        report["heads"][1]["values"] = side([1.0] * 40, 38)
        figure = spectrum_figure(report)
        assert figure.axes[0].get_xlabel() == "rank (of 40)"
        save_figure(figure, tmp_path / "a.png")

    @pytest.mark.parametrize("model", ["C:/some$where/$else/" + "x" * 200, "$x_", "naïve"])
    def test_awkward_names(self, tmp_path: Path, model: str) -> None:
        figure = spectrum_figure({**spectrum_report(), "model": model})
        assert model[-40:] in figure.get_suptitle()
        assert len(figure.get_suptitle()) < 120
        save_figure(figure, tmp_path / "a.svg")

    def test_from_a_results_file_and_without_a_name(self) -> None:
        report = json.loads(json.dumps(spectrum_report()))
        del report["model"]
        assert spectrum_figure(report).get_suptitle().startswith("KV cache: ")

    @pytest.mark.parametrize("report", [{}, {"heads": []}, {"caches": [1], "model": "x"}])
    def test_other_results_are_refused(self, report: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgumentError, match=r"needs results with 'heads'.*unsloth-spectral spectrum --json"):
            spectrum_figure(report)

    def test_global_state_stays(self) -> None:
        import matplotlib

        before = dict(matplotlib.rcParams)
        spectrum_figure(spectrum_report())
        assert dict(matplotlib.rcParams) == before
        assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


class TestSave:
    @pytest.mark.parametrize(
        ("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.PNG", b"\x89PNG")]
    )
    def test_formats(self, tmp_path: Path, name: str, start: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(b"an older figure")
        save_figure(spectrum_figure(spectrum_report()), path)
        assert path.read_bytes().startswith(start)
        assert list(tmp_path.iterdir()) == [path]

    def test_pixels(self, tmp_path: Path) -> None:
        from matplotlib.image import imread

        save_figure(spectrum_figure(spectrum_report()), tmp_path / "a.png")
        assert imread(tmp_path / "a.png").shape == (600, 1400, 4)

    @pytest.mark.parametrize("name", ["a", "a.jpg", "a.png.txt", ".png"])
    def test_unknown_suffix(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        for refuse in (check_figure_target, lambda path: save_figure(spectrum_figure(spectrum_report()), path)):
            with pytest.raises(InvalidArgumentError) as caught:
                refuse(path)
            assert repr(str(path)) in str(caught.value)
            assert ".png or .svg or .pdf" in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_missing_folder(self, tmp_path: Path) -> None:
        for refuse in (check_figure_target, lambda path: save_figure(spectrum_figure(spectrum_report()), path)):
            with pytest.raises(InvalidArgumentError) as caught:
                refuse(tmp_path / "missing" / "a.png")
            assert repr(str(tmp_path / "missing")) in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_failure_leaves_the_older_figure(self, tmp_path: Path) -> None:
        class Broken:
            def savefig(self, path: Path, **options: object) -> None:
                Path(path).write_bytes(b"half a fig")
                raise OSError(28, "No space left on device")

        path = tmp_path / "a.png"
        path.write_bytes(b"an older figure")
        with pytest.raises(OSError, match="No space left"):
            save_figure(Broken(), path)
        assert path.read_bytes() == b"an older figure"
        assert list(tmp_path.iterdir()) == [path]

    def test_target_is_checked(self, tmp_path: Path) -> None:
        assert check_figure_target(str(tmp_path / "a.svg")) == tmp_path / "a.svg"
        assert list(tmp_path.iterdir()) == []


class TestWithoutMatplotlib:
    def test_error_names_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        for use in (lambda: spectrum_figure(spectrum_report()), lambda: check_figure_target(tmp_path / "a.png")):
            with pytest.raises(SpectralError, match=r'`pip install "unsloth-spectral\[plot\]"`'):
                use()

    def test_importing_takes_none(self) -> None:
        import subprocess

        code = "import sys; sys.modules['matplotlib'] = None; import unsloth_spectral.plots"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestComparisonFigure:
    @staticmethod
    def result(ranks: int = 3) -> dict[str, Any]:
        lengths = [256 * step for step in range(1, 17)]
        dense = {
            "name": "dense",
            "stored_bytes": 4096 * 46_080,
            "context_bytes": [length * 46_080 for length in lengths],
            "compression_factor": 1.0,
            "bits_per_element": 32.0,
            "fidelity": {"kl": 0.0, "top1_agreement": 1.0, "perplexity": 13.9, "perplexity_change": 0.0},
        }
        others = [
            {
                **dense,
                "name": f"spectral {8 * (step + 2)}/{8 * (step + 4)}",
                "stored_bytes": (4 + step) * 10_000_000,
                "context_bytes": [length * (4 + step) * 2_441 for length in lengths],
                "compression_factor": 4.4 - step,
                "bits_per_element": 7.3 + step,
                "fidelity": {"kl": 0.1 / (step + 1), "top1_agreement": 0.9, "perplexity": 15, "perplexity_change": 0.4},
            }
            for step in range(ranks)
        ]
        return {
            "model": "owner/model",
            "dtype": "float32",
            "context_length": 4096,
            "lengths": lengths,
            "caches": [dense, *others],
        }

    def test_curves_are_the_bytes(self) -> None:
        result = self.result()
        left, _ = comparison_figure(result).axes
        for line, cache in zip(left.lines, result["caches"], strict=True):
            assert list(line.get_xdata()) == result["lengths"]
            assert list(line.get_ydata()) == pytest.approx([count / 1e6 for count in cache["context_bytes"]])
        assert left.get_ylim()[0] == 0
        assert (left.get_xlabel(), left.get_ylabel()) == ("context length, tokens", "stored bytes, MB")

    def test_bars_are_the_divergences(self) -> None:
        result = self.result()
        figure = comparison_figure(result)
        right = figure.axes[1]
        assert [bar.get_width() for bar in right.patches] == [cache["fidelity"]["kl"] for cache in result["caches"][1:]]
        names = [label.get_text() for label in right.get_yticklabels()]
        assert names[0] == "spectral 16/32\n4.4x smaller, 7.3 bits"
        assert figure.get_suptitle() == "owner/model: KV cache of 4,096 tokens, dense (float32) and spectral"

    def test_no_label_overlaps_another_or_leaves_the_figure(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = comparison_figure(self.result())
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        boxes = [text.get_window_extent(renderer) for axes in figure.axes for text in axes.texts]
        width, height = figure.get_size_inches() * figure.dpi
        for i, box in enumerate(boxes):
            assert box.x0 >= 0
            assert box.x1 <= width
            assert box.y0 >= 0
            assert box.y1 <= height
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])

    def test_one_cache_alone(self) -> None:
        assert len(comparison_figure(self.result(0)).axes[1].patches) == 0

    def test_colours_differ(self) -> None:
        left, _ = comparison_figure(self.result(5)).axes
        assert len({line.get_color() for line in left.lines}) == 6

    def test_not_a_comparison(self) -> None:
        with pytest.raises(InvalidArgumentError, match="needs results with 'caches', got 'heads'"):
            comparison_figure({"heads": []})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return read_results(write_results(tmp_path_factory.mktemp("results")))


def points(scale: float = 1.0) -> list[Point]:
    return [
        Point(method, family, bits, kl * scale)
        for family, members in FAMILIES.items()
        for method, (bits, kl) in members.items()
    ]


def assert_texts_are_apart(figure: Any) -> None:
    """No text of the figure covers another or leaves it: labels, titles and ticks alike."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for axes in figure.axes for text in axes.texts]
    texts += [axes.title for axes in figure.axes] + [axes._left_title for axes in figure.axes]
    texts += [label for axes in figure.axes if axes.get_legend() for label in axes.get_legend().get_texts()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text().strip()]
    width, height = figure.get_size_inches() * figure.dpi
    assert boxes
    for name, box in boxes:
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, name
    for (name, box), (other_name, other) in combinations(boxes, 2):
        assert not box.overlaps(other), (name, other_name)


class TestFrontierFigure:
    @pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])
    @pytest.mark.parametrize("lower", [True, False])
    @pytest.mark.parametrize("dense", [None, 0.0, 0.5])
    def test_labels_are_there_and_apart(self, scale: float, lower: bool, dense: float | None) -> None:
        figure = frontier_figure(points(scale), title="a title", metric="KL", lower_is_better=lower, dense=dense)
        assert_texts_are_apart(figure)
        texts = {text.get_text() for text in figure.axes[0].texts}
        assert set(FAMILIES) <= texts, "every family has its name"

    def test_lines_are_the_points(self) -> None:
        axes = frontier_figure(points(), title="a", metric="KL", lower_is_better=True).axes[0]
        lines = {line.get_gid(): line for line in axes.lines if line.get_gid()}
        assert set(lines) == set(FAMILIES)
        for family, members in FAMILIES.items():
            assert sorted(map(tuple, lines[family].get_xydata())) == sorted(members.values())
        assert len({line.get_color() for line in lines.values()}) == len(FAMILIES)
        assert (axes.get_yscale(), axes.get_title(loc="left"), axes.get_ylabel()) == ("log", "a", "KL")
        assert "16 bits: 0" in " ".join(text.get_text() for text in axes.texts)

    def test_each_setting_is_named(self) -> None:
        axes = frontier_figure(points(), title="a", metric="KL", lower_is_better=True).axes[0]
        texts = [text.get_text() for text in axes.texts]
        for family, members in FAMILIES.items():
            for method in members:
                assert setting_of(method, family) in ("", *texts)

    def test_one_point_alone_and_many_in_one_place(self, tmp_path: Path) -> None:
        save_figure(frontier_figure(points()[:1], title="a", metric="KL", lower_is_better=True), tmp_path / "a.png")
        same = [Point(f"f{index} x", f"f{index}", 2.0, 0.01) for index in range(12)]
        figure = frontier_figure(same, title="a", metric="KL", lower_is_better=True)
        assert_texts_are_apart(figure)

    def test_a_line_for_the_dense_cache(self) -> None:
        axes = frontier_figure(points(), title="a", metric="retrieved", lower_is_better=False, dense=0.2).axes[0]
        assert any(list(line.get_ydata()) == [0.2, 0.2] for line in axes.lines)
        assert axes.get_yscale() == "linear"

    def test_awkward_names(self, tmp_path: Path) -> None:
        names = ["$x_", "<script>alert(1)</script>", "a" * 200, "naïve\n2"]
        odd = [Point(name, name, 2 + index, 0.1) for index, name in enumerate(names)]
        figure = frontier_figure(odd, title="$t_", metric="$m_", lower_is_better=True)
        save_figure(figure, tmp_path / "a.png")
        assert "<script" not in inline_svg(figure, "a")

    def test_nothing_to_draw(self) -> None:
        with pytest.raises(InvalidArgumentError, match="at least one method"):
            frontier_figure([], title="a", metric="b", lower_is_better=True)


class TestHeatmapFigure:
    def test_cells(self) -> None:
        dense_cells = {"length=1024 depth=0.00": 1.0, "length=1024 depth=1.00": 0.0, "length=2048 depth=1.00": 0.5}
        kivi_cells = {"length=2048 depth=0.00 seed=0": 1.0, "length=2048 depth=0.00 seed=1": 0.0, "other": 1.0}
        shares = {"dense": dense_cells, "kivi 2": kivi_cells}
        figure = heatmap_figure(shares, title="a", metric="retrieved")
        dense, kivi = figure.axes[:2]
        assert dense.get_title() == "dense\n50%"
        assert dense.collections[0].get_array().tolist() == [[1.0, None], [0.0, 0.5]]
        assert kivi.collections[0].get_array().tolist() == [[None, 0.5], [None, None]]
        assert [label.get_text() for label in dense.get_xticklabels()] == ["1k", "2k"]
        assert [label.get_text() for label in dense.get_yticklabels()] == ["0%", "100%"]
        assert dense.get_ylim() == (2, 0), "the beginning of the text is above"

    def test_all_methods(self, results: Results) -> None:
        shares: dict[str, dict[str, float]] = {}
        for record in results.of("needle-depth"):
            shares.setdefault(record.method, {})[record.case] = record.metrics["retrieved"]
        figure = heatmap_figure(shares, title="a", metric="retrieved")
        assert_texts_are_apart(figure)

    def test_names_of_cases(self) -> None:
        assert place_of("length=2048 depth=0.30") == (2048, 0.3)
        assert place_of("length=2048 seed=1 depth=1") == (2048, 1.0)
        assert place_of("depth=0.3") is None
        with pytest.raises(InvalidArgumentError, match="cases named"):
            heatmap_figure({"dense": {"a": 1.0}}, title="a", metric="b")


class TestDriftFigure:
    def test_all_methods(self, results: Results) -> None:
        rows = [(mean.method, mean.family, mean.series["kl"]) for mean in results.means("drift")]
        figure = drift_figure(rows, title="a")
        assert_texts_are_apart(figure)
        assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == list(FAMILIES)

    def test_windows_are_means(self) -> None:
        figure = drift_figure([("a 1", "a", [1.0, 3.0] * 32), ("a 2", "a", [0.5]), ("a 3", "a", [0.0])], title="a")
        lines = {line.get_gid(): line.get_xydata().tolist() for line in figure.axes[0].lines}
        assert lines["a 1"] == [[2 * window + 0.5, 2.0] for window in range(32)]
        assert lines["a 2"] == [[0.0, 0.5]]
        assert "a 3" not in lines
        with pytest.raises(InvalidArgumentError, match="KL above 0"):
            drift_figure([("a", "a", []), ("b", "b", [0.0, math.nan])], title="a")


class TestAllocationFigure:
    def test_lines_are_the_bits(self) -> None:
        bits = {"spectral small": {"keys": [1.0, 2.0], "values": [3.0, 4.0]}, "spectral quality": {"keys": [2.0, 2.0]}}
        figure = allocation_figure(bits, title="a")
        assert_texts_are_apart(figure)
        for axes, (method, sides) in zip(figure.axes, bits.items(), strict=True):
            assert axes.get_title() == method
            assert {line.get_gid(): list(line.get_ydata()) for line in axes.lines} == sides
        assert "mean: keys 1.50, values 3.50" in [text.get_text() for text in figure.axes[0].texts]
        with pytest.raises(InvalidArgumentError, match="bits by layer"):
            allocation_figure({}, title="a")

    def test_variants_stand_beside_their_method(self) -> None:
        names = ["spectral small", "spectral balanced", "spectral small rotated", "spectral balanced without profile"]
        names += ["spectral smaller", "spectral small without profile"]
        figure = allocation_figure({name: {"keys": [1.0, 2.0]} for name in names}, title="a")
        assert_texts_are_apart(figure)
        grid = [axes for axes in figure.axes if axes.get_visible()]
        assert [axes.get_title() for axes in grid] == [
            "spectral small", "spectral small rotated", "spectral small without profile", "spectral balanced",
            "spectral balanced without profile", "spectral smaller",
        ]  # fmt: skip
        places = [axes.get_subplotspec() for axes in grid]
        assert [(place.rowspan.start, place.colspan.start) for place in places] == [
            (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0),
        ]  # fmt: skip
        numbered = [any(label.get_visible() for label in axes.get_xticklabels()) for axes in grid]
        assert numbered == [False, False, True, False, True, True], "the lowest panel of each column"

    def test_a_layer_without_bits_is_a_gap(self) -> None:
        figure = allocation_figure({"a": {"keys": [1.0, math.nan, 3.0]}}, title="a")
        (axes,) = figure.axes
        assert "mean: keys 2.00" in [text.get_text() for text in axes.texts]
        assert axes.get_ylim() == (0, pytest.approx(3.3))


class TestLengthsFigure:
    @staticmethod
    def curve(method: str, family: str, scale: float) -> tuple[str, str, dict[int, float], dict[int, float]]:
        return method, family, {512: scale, 1024: 2 * scale}, {512: 0.0, 1024: scale / 100}

    def test_lines_are_the_figures(self) -> None:
        curves = [self.curve("a 1", "a", 1.0), self.curve("a 2", "a", 3.0), self.curve("b", "b", 2.0)]
        figure = lengths_figure(curves, title="a title")
        left, right = figure.axes
        lines = {line.get_gid(): line.get_xydata().tolist() for line in left.lines}
        assert lines == {
            "a 1": [[512, 1], [1024, 2]], "a 2": [[512, 3], [1024, 6]], "b": [[512, 2], [1024, 4]]
        }  # fmt: skip
        # A KL of 0 has no place on a logarithmic axis.
        assert [line.get_xydata().tolist() for line in right.lines] == [[[1024, 0.03]], [[1024, 0.02]], [[1024, 0.01]]]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a 2", "b", "a 1"]
        assert (left.get_xscale(), right.get_xscale(), right.get_yscale()) == ("log", "log", "log")
        assert [label.get_text() for label in left.get_xticklabels()] == ["512", "1,024"]
        looks = {(line.get_color(), line.get_marker()) for line in left.lines}
        assert len(looks) == 3
        assert len({color for color, _ in looks}) == 2

    def test_all_methods(self, results: Results, tmp_path: Path) -> None:
        def by_length(value: float) -> dict[int, float]:
            return {512: value, 8064: 2 * value}

        means = results.means("lengths")
        curves = [(m.method, m.family, by_length(m.metrics["factor"]), by_length(m.metrics["kl"])) for m in means]
        figure = lengths_figure(curves, title="a")
        save_figure(figure, tmp_path / "a.png")
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        renderer = FigureCanvasAgg(figure).get_renderer()
        legend, (_, height) = figure.legends[0].get_window_extent(renderer), figure.get_size_inches() * figure.dpi
        assert 0 <= legend.y0 < legend.y1 <= height, "every method has its place in the legend"
        assert len(figure.legends[0].get_texts()) == len(curves)
        assert all(axes.get_window_extent(renderer).x1 <= legend.x0 for axes in figure.axes)

    def test_nothing_lossy(self, tmp_path: Path) -> None:
        save_figure(lengths_figure([("dense", "dense", {512: 1.0}, {512: 0.0})], title="a"), tmp_path / "a.png")
        for nothing in ([], [("a", "a", {}, {512: 1.0})]):
            with pytest.raises(InvalidArgumentError, match="factors by length, got none"):
                lengths_figure(nothing, title="a")

    def test_names_of_cases(self) -> None:
        assert length_of("length=512") == 512
        assert length_of("length=512 start=20000") == 512
        for case in ("length=512 depth=0.30", "start=20000", "length=", "seed=0 length=512"):
            assert length_of(case) is None


class TestInline:
    def test_colours_are_the_pages(self) -> None:
        svg = inline_svg(frontier_figure(points(), title="a", metric="KL", lower_is_better=True), "x")
        assert svg.startswith("<svg ")
        assert svg.endswith("</svg>")
        for index, color in enumerate(PALETTE[: len(FAMILIES)]):
            assert f"var(--plot-series-{index}, {color})" in svg
            assert not [part for part in svg.split(color)[:-1] if not part.endswith(", ")]

    def test_equal_figures_give_equal_bytes(self) -> None:
        bits = {"spectral small": {"keys": [1.0, 2.0]}}
        assert inline_svg(allocation_figure(bits, title="a"), "x") == inline_svg(
            allocation_figure(bits, title="a"), "x"
        )
