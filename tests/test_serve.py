"""smca-serve: what the server answers, and the page in a browser."""

import contextlib
import io
import itertools
import json
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from PIL import Image

from helpers import CLASS_NAMES, make_image, make_smca, write_image, write_smca_config
from smca import Predictor
from smca.analysis import draw_gaussians, modulation_maps
from smca.analysis.detections import class_color
from smca.cli import serve
from smca.errors import UserError

_TIMEOUT = 600  # seconds, of which a loaded machine may need many


def make_viewer(folder, **decoder):
    model = make_smca(write_smca_config(folder, **decoder))
    predictor = Predictor.from_model(model, class_names=CLASS_NAMES)
    write_image(folder / "example.png")
    return serve.Viewer(predictor, [str(folder / "example.png")], 0.2)


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    return make_viewer(tmp_path_factory.mktemp("viewer"))


@contextlib.contextmanager
def served(viewer):
    """The address of the page."""
    with serve.make_server(viewer, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def address(viewer):
    with served(viewer) as url:
        yield url


def as_png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def ask(url, content=None):
    with urllib.request.urlopen(url, content, timeout=_TIMEOUT) as reply:
        return reply.read()


def detect(address, image):
    return json.loads(ask(f"{address}/detect", as_png(image)))


def refused(url, content=None):
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(url, content)
    return caught.value.code, caught.value.read().decode()


# What the server answers


def test_an_image_gets_its_detections_with_center_and_scale_weights_of_each_layer(viewer, address):
    image = make_image()
    found = detect(address, image)
    assert (found["height"], found["width"]) == image.shape[:2]
    expected = viewer.predictor(image, threshold=0).to_coco()
    for row, other in zip(found["detections"], expected, strict=True):
        assert row["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
        assert row["category_name"] == other["category_name"] == CLASS_NAMES[row["class"]]
    for layer in (0, 1):
        (maps,) = modulation_maps(viewer.predictor, image, indices=[2], layer=layer)
        factor = image.shape[1] / maps.image.shape[1]
        row = found["detections"][2]
        assert row["centers"][layer] == pytest.approx(maps.center * factor, abs=0.01)
        assert row["shares"][layer] == pytest.approx(maps.scale_weights, abs=1e-4)


@pytest.mark.parametrize("layer, scale", [(0, None), (1, 2)])
def test_the_picture_is_that_of_the_chosen_detection_layer_and_scale(viewer, address, layer, scale):
    image = make_image()
    url = f"{address}/maps?number={detect(address, image)['id']}&index=3&layer={layer}"
    picture = Image.open(io.BytesIO(ask(url if scale is None else f"{url}&scale={scale}")))
    maps = modulation_maps(viewer.predictor, image, indices=[3], layer=layer)
    file = io.BytesIO()
    draw_gaussians(maps, CLASS_NAMES, scale).savefig(file)
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(file)))


def test_classes_have_the_colors_of_all_pictures_and_examples_their_thumbnails(viewer, address):
    settings = json.loads(ask(f"{address}/settings"))
    assert settings["classes"] == CLASS_NAMES and settings["examples"] == ["example.png"]
    assert settings["colors"][1] == "rgb({:.0%} {:.0%} {:.0%})".format(*class_color(1))
    assert Image.open(io.BytesIO(ask(f"{address}/example?number=0"))).format == "JPEG"
    found = json.loads(ask(f"{address}/detect?number=0", b""))
    shown = Image.open(io.BytesIO(ask(f"{address}/image?number={found['id']}")))
    assert shown.size == (found["width"], found["height"])


def test_detr_has_detections_and_no_maps(tmp_path):
    viewer = make_viewer(tmp_path, base="detr")
    assert (viewer.settings()["num_layers"], viewer.settings()["strides"]) == (0, [])
    (first, *_) = viewer.detect(make_image())["detections"]
    assert first["centers"] == first["shares"] == []


def test_what_the_server_cannot_answer_is_said(viewer, address, monkeypatch):
    status, text = refused(f"{address}/detect", b"no image")
    assert status == 400 and text.startswith("Image that was sent is empty, no image ")
    for length in ("abc", "-1", "200000001"):
        headers = {"Content-Length": length}
        request = urllib.request.Request(f"{address}/detect", method="POST", headers=headers)
        status, text = refused(request)
        assert status == 400 and text.startswith("The Content-Length is no number of bytes up to")
    for path in ("/nothing", "/maps", "/image?number=a"):
        assert refused(address + path) == (404, "There is no such page.")
    monkeypatch.setattr(viewer, "examples", ["caf\udce9.png"])  # not UTF-8
    status, text = refused(f"{address}/example?number=0")
    assert status == 400 and r"caf\udce9.png does not exist" in text
    monkeypatch.setattr(serve, "_MAX_IMAGES", 1)
    number = detect(address, make_image())["id"]
    for key, value in itertools.product(("index", "layer"), (-1, 9999)):
        query = urllib.parse.urlencode({"index": 0, "layer": 0, "number": number, key: value})
        status, text = refused(f"{address}/maps?{query}")
        assert status == 400 and text.startswith("There is no ") and f" {value}:" in text
    detect(address, make_image())
    status, text = refused(f"{address}/image?number={number}")
    assert status == 400 and "give it again" in text
    wide = serve._as_jpeg(np.zeros((2, 70000, 3), np.uint8))[1]  # more than JPEG holds
    assert Image.open(io.BytesIO(wide)).size == (65500, 2)


@pytest.mark.parametrize("host, port", [("192.0.2.1", 7860), ("127.0.0.1", 70000)])
def test_what_cannot_be_served_is_one_sentence(viewer, host, port):
    words = f"served at http://{host}:{port} .*: give another --host or --port"
    with pytest.raises(UserError, match=words):
        serve.make_server(viewer, host, port)


# In a browser


def chromium():
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def browser(downloads):
    """Chromium without a window, that keeps and asks for nothing."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium()
        for argument in (
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={profile}", "--no-proxy-server", "--disable-dev-shm-usage"),
        ):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        size = dict(width=1280, height=1500, deviceScaleFactor=1, mobile=False)
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            yield driver
        finally:
            driver.quit()


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


def find(driver, selector):
    return driver.find_elements("css selector", selector)


def give(driver, *paths):
    """Give the page images, and wait for the last one's detections and maps."""
    count = len(find(driver, "#images button")) + len(paths)
    upload = until(lambda: find(driver, "#files"), "the page")[0]
    upload.send_keys("\n".join(map(str, paths)))
    until(lambda: len(find(driver, "#images button")) == count, "the images")
    loaded = "return [...document.images].every(image => image.naturalWidth || !image.src)"
    until(lambda: driver.execute_script(loaded), "all pictures")


def labels(driver):
    return [element.text for element in find(driver, "#list button")]


def test_in_a_browser_images_get_boxes_to_filter_click_and_save(viewer, address, tmp_path):
    pytest.importorskip("selenium", reason="selenium is missing (pip install selenium)")
    if not chromium() or not shutil.which("chromedriver"):
        pytest.skip("Chromium and its driver are missing (apt-get install chromium-driver)")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, path in enumerate(paths):
        write_image(path, seed=seed)
    found = viewer.predictor(paths[1], threshold=0.2)
    names = [f"{name} {100 * score:.0f}%" for name, score in zip(found.names, found.scores)]
    with browser(tmp_path) as driver:
        driver.get(address)
        give(driver, *paths)
        assert labels(driver) == names
        first = find(driver, "#maps")[0].get_attribute("src")
        assert "layer=1" in first  # the last of two
        find(driver, ".box")[-1].click()  # the smallest box lies above the others
        (chosen,) = find(driver, "#list [aria-pressed=true]")
        assert names[int(found.pred_boxes.area().argmin())] == chosen.text
        find(driver, "#classes button")[0].click()
        kept = [name for name in found.names if name != find(driver, ".chip")[0].text]
        assert len(labels(driver)) == len(kept)
        find(driver, "#json")[0].click()
        saved = until(lambda: list(tmp_path.glob("detections.json")), "the file")[0]
        rows = json.loads(saved.read_text())
        assert [row["category_name"] for row in rows if row["file_name"] == "b.png"] == kept
        found = {"file_name": "ü", "category_id": "a,b", "category_name": 'c"', "bbox": [1]}
        text = driver.execute_script("return asCsv([arguments[0]])", found)
        assert text.startswith("\ufeff") and '"ü",,"a,b","c""",1,\n' in text
