import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from dpt.evaluation import pictures
from dpt.evaluation.protocols import PROTOCOLS


def test_depth_colours_are_red_near_blue_far_black_invalid():
    depth = np.array([[1.0, 2.0, 3.0]])
    near, middle, far = pictures.colour_depth(depth, 1.0, 3.0)[0].astype(int)
    assert near[0] > near[2]
    assert far[2] > far[0]
    assert middle.min() > 150
    assert (pictures.colour_depth(depth, 1.0, 3.0, depth > 1.5)[0, 0] == 0).all()


@pytest.mark.parametrize("name", [pictures.DEPTH_COLOURS, pictures.ERROR_COLOURS])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_colours_are_those_of_matplotlib(name, dtype):
    values = np.concatenate((np.linspace(0.0, 1.0, 4001), np.arange(257) / 256, [np.nan] * 2)).astype(dtype).reshape(10, -1)
    expected = (colormaps[name](values)[..., :3] * 255).round().astype(np.uint8)
    assert np.array_equal(pictures._coloured(values, name, None), expected)


def test_flow_wheel():
    assert pictures._colour_wheel().shape == (55, 3)
    directions = np.array([[0.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])[:, None]
    still, right, left, _down = pictures.colour_flow(directions, 1.0)[0].astype(int)
    assert still.tolist() == [255, 255, 255]
    assert right[0] == 255
    assert right[1] < 20
    assert left[2] > left[0]
    half = pictures.colour_flow(directions / 2, 1.0)[0, 1].astype(int)
    assert half == pytest.approx((255 + right) / 2, abs=1)


@pytest.mark.parametrize("name", ["synthetic_depth", "synthetic_flow", "synthetic_amodal"])
def test_pages(name, tmp_path):
    rng = np.random.default_rng(0)
    protocol = PROTOCOLS[name]
    image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    shape = (2, 30, 40) if protocol.task == "flow" else (30, 40)
    truth, prediction = (rng.random(shape) + 1 if protocol.task != "amodal" else rng.random(shape) > 0.5 for _ in range(2))
    further = {"flow": {"second": image}, "amodal": {"visible": truth > 1.5}}.get(protocol.task, {})
    rows = [
        pictures.compare(protocol, f"sample {i}", image, truth, prediction, np.full((30, 40), float(i)), **further)
        for i in range(2)
    ]
    assert list(rows[0].panels) == ["input", *further, "truth", "prediction", "error"]
    assert list(rows[1].panels)[-1] == "uncertainty"
    units = {name: panel.scale.unit for name, panel in rows[1].panels.items() if panel.scale}
    assert (
        units
        == {
            "depth": {"truth": "m", "prediction": "m", "error": "%", "uncertainty": "% of the depth range"},
            "flow": {"truth": "px", "prediction": "px", "error": "px", "uncertainty": "px"},
            "amodal": {"uncertainty": "% of the votes"},
        }[protocol.task]
    )
    pictures.write_page(rows, tmp_path / "deep" / "page.png", "a page")
    page = np.asarray(Image.open(tmp_path / "deep" / "page.png").convert("RGB"))
    assert page.std() > 10


def test_the_flow_wheel_has_each_direction_where_its_arrow_ends():
    wheel = pictures.flow_wheel(65)
    assert (wheel[32, 32] == 255).all()
    assert (wheel[0, 0] == 255).all()
    direct = pictures.colour_flow(np.array([[[0.9]], [[0.0]]]), 1.0)[0, 0]
    np.testing.assert_allclose(wheel[32, 61].astype(int), direct.astype(int), atol=12)
