"""Distances by layer and role, and the picture of them."""

from __future__ import annotations

import re
from html import unescape
from itertools import pairwise
from math import inf, nan, sqrt
from typing import Any

import pytest

from surgery.report.distances import Cell, DistanceMap, distance_maps, unplaced_distances
from surgery.report.heatmap import Scale, common_scale, heat_map
from surgery.report.html import render_report
from surgery.report.svg import RAMP, colour, ink_on

DONOR, THIRD = "org/donor", "org/third"


def drawn_cells(svg: str) -> dict[str, float]:
    """Values in the picture, by the first line of their tooltips."""
    found = re.findall(r'data-rms="([^"]+)"[^>]*><title>([^\n<]*)', svg)
    return {unescape(title): float(value) for value, title in found}


def test_sampled_values_are_those_of_the_manifest(copied_manifest: dict[str, Any]) -> None:
    (found,) = distance_maps(copied_manifest)
    measured = [row for row in copied_manifest["measurements"] if row["rms"] is not None]
    assert {place: cell.rms for place, cell in found.cells.items() if cell.rms is not None} == {
        (row["layer"], row["role"], row["mtp"]): row["rms"] for row in measured
    }
    svg = heat_map(found, common_scale([found]))
    assert drawn_cells(svg) == {
        f"{row['role']}, " + ("outside the layers" if row["layer"] is None else f"layer {row['layer']}")
        + (" (MTP)" if row["mtp"] else ""): row["rms"]
        for row in measured
    }  # fmt: skip


def test_exact_values_are_pooled_by_weights(averaged_manifest: dict[str, Any]) -> None:
    donor, third = distance_maps(averaged_manifest)
    assert (donor.parent, third.parent) == (DONOR, THIRD)
    experts = donor.cells[1, "routed_expert", False]
    # The fifth and sixth tensor: 500 and 600 weights, RMS 0.005 and 0.006.
    assert experts.rms == pytest.approx(sqrt((0.005**2 * 500 + 0.006**2 * 600) / 1100), rel=1e-14)
    assert experts.relative == (0.05, 0.06)
    assert (experts.tensors, experts.weights, experts.read, experts.sampled) == (2, 1100, 1100, False)
    head = averaged_manifest["metrics"]["lm_head.weight"]["distance"][DONOR]["rms"]
    assert donor.cells[None, "head", False].rms == head
    for found in (donor, third):
        svg = heat_map(found, common_scale([donor, third]))
        assert sorted(drawn_cells(svg).values()) == sorted(cell.rms or 0.0 for cell in found.cells.values())


def test_tensors_count_the_same_where_their_sizes_are_unknown(averaged_manifest: dict[str, Any]) -> None:
    for metrics in averaged_manifest["metrics"].values():
        del metrics["weights"]
    cell = distance_maps(averaged_manifest)[0].cells[1, "routed_expert", False]
    assert cell.rms == pytest.approx(sqrt((0.005**2 + 0.006**2) / 2), rel=1e-14)
    assert cell.weights is None and not cell.sampled


def test_a_cell_may_be_part_exact_and_part_sampled(averaged_manifest: dict[str, Any]) -> None:
    averaged_manifest["measurements"] = [{
        "kind": "parent distance", "parent": DONOR, "layer": 1, "role": "routed_expert", "mtp": False,
        "tensors": 3, "weights": 90, "of_weights": 900, "rms": 0.001, "relative": 0.5,
    }]  # fmt: skip
    cell = distance_maps(averaged_manifest)[0].cells[1, "routed_expert", False]
    assert cell.rms == pytest.approx(
        sqrt((0.005**2 * 500 + 0.006**2 * 600 + 0.001**2 * 900) / 2000), rel=1e-14
    )
    assert (cell.tensors, cell.read, cell.weights, cell.sampled) == (5, 1190, 2000, True)
    assert cell.relative == (0.05, 0.5)


def test_exact_distances_without_an_architecture_are_counted(averaged_manifest: dict[str, Any]) -> None:
    del averaged_manifest["model"]
    assert distance_maps(averaged_manifest) == []
    assert unplaced_distances(averaged_manifest) == 11
    assert "distances of 11 tensors" in render_report(averaged_manifest)


def test_tooltips_tell_sampled_from_read_in_full(copied_manifest: dict[str, Any]) -> None:
    page = render_report(copied_manifest)
    assert "routed_expert, layer 1\nRMS 0.001219\nrelative 0.0366\n2 tensors\nsampled: 64 of 640 w" in page
    assert "attention, layer 0\nRMS 0.00025\nrelative 0.0075\n2 tensors\nall 640 weights read" in page
    assert "Sampled in 7 of 9 cells: 1,088 of 5,120 weights were read (21%)." in page
    assert "Farthest: routed_expert, layer 1, RMS 0.00122." in page


def test_unmeasured_is_hatched_and_absent_is_blank(copied_manifest: dict[str, Any]) -> None:
    (found,) = distance_maps(copied_manifest)
    svg = str(heat_map(found, common_scale([found])))
    hatched = re.findall(r'url\(#unmeasured\)" rx="1.5"><title>([^\n]*)\nnot measured', svg)
    assert hatched == ["router, layer 1", "other, layer 2 (MTP)"]
    # 3 layers × 5 roles, of which 7 places hold tensors.
    assert svg.count('class="absent"') == 3 * 5 - 7
    assert ">MTP</text>" in svg
    assert "not measured</text>" in render_report(copied_manifest)


def test_without_an_architecture_every_gap_is_hatched(copied_manifest: dict[str, Any]) -> None:
    del copied_manifest["model"]
    (found,) = distance_maps(copied_manifest)
    svg = str(heat_map(found, common_scale([found])))
    assert "not measured</text>" in render_report(copied_manifest)
    assert 'class="absent"' not in svg and svg.count("url(#unmeasured)") == 3 * 4 - 5


@pytest.mark.parametrize("value", [nan, inf, None])
def test_what_is_not_finite_is_unmeasured(copied_manifest: dict[str, Any], value: float | None) -> None:
    for row in copied_manifest["measurements"]:
        row.update(rms=value, relative=value)
    (found,) = distance_maps(copied_manifest)
    assert all(cell.rms is None and cell.relative is None for cell in found.cells.values())
    assert "data-rms" not in render_report(copied_manifest)


def deep(layers: int, greatest: float = 0.001) -> DistanceMap:
    roles = ("attention", "router", "routed_expert", "shared_expert", "norm")
    cells = {
        (layer, role, layer == layers - 1): Cell(greatest * (layer + 1) / layers, None, 1, 10, 10)
        for layer in range(layers)
        for role in roles
    }
    return DistanceMap(DONOR, cells, None)


@pytest.mark.parametrize("layers", [1, 6, 62, 200])
def test_everything_drawn_lies_within_the_picture(layers: int) -> None:
    found = deep(layers)
    svg = str(heat_map(found, common_scale([found])))
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    assert width <= 1010
    box = r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"'
    for x, y, wide, tall in re.findall(box, svg):
        assert float(x) + float(wide) <= width and float(y) + float(tall) <= height and float(wide) > 2
    ticks = re.findall(r'<text x="([\d.]+)" y="\d+" text-anchor="middle" class="soft">\d', svg)
    assert all(float(right) - float(left) >= 24 for left, right in pairwise(ticks))


def test_the_scale_is_linear_from_zero_to_a_round_number() -> None:
    scale = common_scale([deep(4, 0.00141)])
    assert scale == Scale(0.0, pytest.approx(0.0015), False, -3)
    third = pytest.approx(1 / 3)
    assert scale.ticks() == [(0.0, "0"), (third, "0.5"), (pytest.approx(2 / 3), "1"), (1.0, "1.5")]
    assert (scale.written(0.00141), scale.written(0.0), scale.written(0.001)) == ("1.41", "0", "1.00")
    assert scale.unit == "×10⁻³"


def test_the_scale_is_logarithmic_where_values_lie_far_apart() -> None:
    far = deep(8, 0.0001)
    scale = common_scale([far, DistanceMap(THIRD, {(None, "norm", False): Cell(0.3, None, 1, 1, 1)}, None)])
    assert scale.logarithmic and scale.low <= 0.0001 / 8 and scale.high == pytest.approx(0.5)
    positions = [position for position, _ in scale.ticks()]
    assert positions[0] == 0.0 and positions == sorted(positions) and positions[-1] <= 1.0
    assert scale.position(0.0) == 0.0


@pytest.mark.parametrize("greatest", [0.0, 1e-12, 7.0, 1e9])
def test_scales_of_any_size(greatest: float) -> None:
    found = deep(3, greatest)
    scale = common_scale([found])
    assert all(0 <= scale.position(cell.rms or 0.0) <= 1 for cell in found.cells.values())
    assert scale.ticks() and "data-rms" in heat_map(found, scale)


def test_colours_get_steadily_lighter_and_text_stays_readable() -> None:
    def luminance(fill: str) -> float:
        channels = [int(fill[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    shades = [luminance(colour(step / 100)) for step in range(101)]
    assert shades == sorted(shades)
    assert (colour(-1), colour(0), colour(1), colour(2)) == (RAMP[0], RAMP[0], RAMP[-1], RAMP[-1])
    for step in range(101):
        fill = colour(step / 100)
        light, dark = sorted((luminance(fill), luminance(ink_on(fill))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
