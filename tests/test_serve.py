"""smca-serve: what the page shows, and the page in a browser.

The picture in the documentation is the last test's, of the demo's model:

    python tests/test_serve.py output/demo/model_best.pth IMAGE docs/serve.png 0.4
"""

import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import CLASS_NAMES, make_image, make_smca, write_smca_config
from smca import Predictor
from smca.analysis import draw_gaussians, modulation_maps
from smca.cli import serve
from smca.errors import UserError

_TIMEOUT = 600  # seconds, of which a loaded machine may need many


def make_viewer(folder, **decoder):
    model = make_smca(write_smca_config(folder, **decoder))
    return serve.Viewer(Predictor.from_model(model, class_names=CLASS_NAMES))


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    return make_viewer(tmp_path_factory.mktemp("viewer"))


# What it shows


def test_the_list_has_the_detections_from_the_score_on(viewer):
    seen = viewer.detect(make_image())
    names = viewer.names(seen, 0)
    assert len(names) == 6 and len(viewer.names(seen, 1)) == 0
    first, score = seen.detections.names[0], float(seen.detections.scores[0])
    assert names[0] == f"1: {first} {100 * score:.0f}%"
    assert len(viewer.names(seen, float(seen.detections.scores[2]))) == 3


@pytest.mark.parametrize("layer, scale", [(0, None), (1, 2)])
def test_the_picture_is_that_of_the_chosen_detection_layer_and_scale(
    viewer, tmp_path, layer, scale
):
    image = make_image()
    picture = np.asarray(viewer.draw_maps(viewer.detect(image), 3, layer, scale))
    maps = modulation_maps(viewer.predictor, image, select=lambda found: [3], layer=layer)
    figure = draw_gaussians(maps, CLASS_NAMES, scale)
    figure.savefig(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as expected:
        assert np.array_equal(picture, np.asarray(expected))


def test_the_table_has_the_center_and_the_scale_weights_of_each_layer(viewer):
    image = make_image()
    rows = viewer.layer_rows(viewer.detect(image), 2)
    assert [row[0] for row in rows] == [1, 2]
    for layer, row in enumerate(rows):
        (maps,) = modulation_maps(viewer.predictor, image, select=lambda found: [2], layer=layer)
        factor = image.shape[1] / maps.image.shape[1]
        assert [float(value) for value in row[1:3]] == pytest.approx(maps.center * factor, abs=0.51)
        shares = [float(value) for value in row[3:]]
        assert shares == pytest.approx(100 * maps.scale_weights, abs=0.51)


def test_a_click_takes_the_smallest_box_around_it(viewer):
    seen = viewer.detect(make_image())
    assert viewer.draw(seen, 0).width == seen.drawn_width > seen.image.shape[1]
    boxes = [[0.0, 0, 100, 80], [10, 10, 40, 40], [5, 5, 60, 60], [90, 70, 99, 79]]
    for index in range(4, len(seen.detections)):
        boxes.append([200.0 + index, 200, 201 + index, 201])
    seen.detections.pred_boxes.tensor[:] = torch.tensor(boxes)
    for point, expected in (((20, 20), 1), ((50, 50), 2), ((80, 50), 0), ((150, 50), None)):
        assert viewer.at(seen, 0, *point) == expected
    assert viewer.at(seen, float(seen.detections.scores[0]), 20, 20) == 0  # alone left


def test_detr_has_detections_and_no_maps(tmp_path):
    viewer = make_viewer(tmp_path, base="detr")
    seen = viewer.detect(make_image())
    assert (viewer.num_layers, viewer.strides, seen.layers) == (0, [], [])
    assert len(viewer.names(seen, 0)) == 6 and viewer.layer_rows(seen, 0) == []


def test_without_gradio_the_page_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    args = serve.get_parser().parse_args(["--weights", "a.pth"])
    with pytest.raises(UserError, match="The page needs Gradio: run pip install gradio"):
        serve.run(args)


@pytest.mark.parametrize(
    "error", [OSError("the address is in use"), OverflowError("port must be 0-65535")]
)
def test_what_cannot_be_served_is_one_sentence(viewer, monkeypatch, error):
    gradio = pytest.importorskip("gradio", reason="the extra 'serve' is missing")

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(gradio.Blocks, "launch", refuse)
    monkeypatch.setattr(serve, "predictor_of", lambda args: viewer.predictor)
    words = "served at http://127.0.0.1:7999: give another --host or --port"
    with pytest.raises(UserError, match=words):
        serve.run(serve.get_parser().parse_args(["--port", "7999"]))


# In a browser


@contextlib.contextmanager
def served(viewer, threshold=0.5):
    """The address of the page."""
    gradio = serve.import_gradio()
    page = serve.build_page(viewer, threshold)
    _, address, _ = page.launch(prevent_thread_lock=True, **serve.launch_options(gradio))
    try:
        yield address
    finally:
        page.close()


@contextlib.contextmanager
def browser(width=1280, height=1640):
    """Chromium without a window, that keeps and asks for nothing."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium()
        for argument in (
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={profile}", f"--window-size={width},{height}"),
            *("--no-proxy-server", "--disable-dev-shm-usage", "--hide-scrollbars"),
        ):
            options.add_argument(argument)
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield driver
        finally:
            driver.quit()


def chromium():
    return shutil.which("chromium") or shutil.which("chromium-browser")


def until(condition, what):
    """What `condition` gives as soon as it is true."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + _TIMEOUT
    while time.monotonic() < end:
        with contextlib.suppress(WebDriverException):  # of an element that was just replaced
            if result := condition():
                return result
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen in {_TIMEOUT} s")


def click(driver, x, y):
    """Click on a pixel of the drawing of the detections."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    picture = driver.find_element(By.CSS_SELECTOR, "#drawn img")
    width, height, shown_width, shown_height = driver.execute_script(
        "const i = arguments[0]; return [i.naturalWidth, i.naturalHeight, i.width, i.height]",
        picture,
    )
    scale = min(1, shown_width / width, shown_height / height)  # in the middle, not enlarged
    offset = (round((x - width / 2) * scale), round((y - height / 2) * scale))
    ActionChains(driver).move_to_element_with_offset(picture, *offset).click().perform()


def chosen(driver):
    """The detection that is chosen in the list."""
    from selenium.webdriver.common.by import By

    (label,) = driver.find_elements(By.CSS_SELECTOR, "#chosen label:has(input:checked)")
    return label.text


def visit(driver, address, image, screenshot):
    """Upload an image, wait for its detections, and go through the decoder's layers.

    Returns:
        The list of detections, and of each layer, from the last to the first, the source of the
        picture of its maps.
    """
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def find(selector):
        return driver.find_elements(By.CSS_SELECTOR, selector)

    def source():
        return next((element.get_attribute("src") for element in find("#maps img")), None)

    driver.get(address)
    until(lambda: find("#image input[type=file]"), "the page")[0].send_keys(str(image))
    until(lambda: find("#drawn img"), "the drawing of the detections")
    labels = until(lambda: [e.text for e in find("#chosen label") if e.text], "the detections")
    pictures = [until(source, "the picture of the maps")]
    slider = find("#layer input[type=range]")[0]
    for _ in range(int(slider.get_attribute("max")) - 1):
        slider.send_keys(Keys.ARROW_LEFT)
        until(lambda: source() not in [None, pictures[-1]], "another picture after the slider")
        pictures.append(source())
    until(
        lambda: driver.execute_script(
            "return [...document.images].every(image => image.complete && image.naturalWidth)"
        ),
        "all pictures",
    )
    driver.save_screenshot(str(screenshot))
    return labels, pictures


def test_in_a_browser_an_image_gets_boxes_and_the_slider_another_layer(viewer, tmp_path):
    pytest.importorskip("gradio", reason="the extra 'serve' is missing")
    pytest.importorskip("selenium", reason="the extra 'serve' is missing")
    if not chromium() or not shutil.which("chromedriver"):
        pytest.skip(
            "Chromium and its driver are missing (apt-get install chromium chromium-driver)"
        )
    image = make_image(90, 120)
    Image.fromarray(image).save(tmp_path / "a.png")
    seen = viewer.detect(image)
    names = viewer.names(seen, 0.2)
    other, x, y = next(
        (index, x, y)
        for y in range(5, 90, 5)
        for x in range(5, 120, 5)
        if (index := viewer.at(seen, 0.2, x, y))
    )
    with served(viewer, 0.2) as address, browser() as driver:
        labels, pictures = visit(driver, address, tmp_path / "a.png", tmp_path / "page.png")
        assert chosen(driver) == names[0]
        click(driver, 4 * x, 4 * y)  # for it is drawn with 480 pixels at least
        until(lambda: chosen(driver) == names[other], "the choice of the box that was clicked")
    assert labels == names
    assert len(set(pictures)) == viewer.num_layers == 2
    with Image.open(tmp_path / "page.png") as screenshot:
        assert screenshot.width == 1280


if __name__ == "__main__":
    weights, photo, output, least = sys.argv[1:]
    with served(serve.Viewer(Predictor(weights)), float(least)) as url, browser() as chrome:
        print(*visit(chrome, url, Path(photo).resolve(), output)[0], sep="\n")
