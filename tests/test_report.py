"""Report pages: what they contain, and that they load, filter and show pictures in a real browser."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detectax_eqx import data, evaluate


ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "</script><script>document.title='taken over'</script>"


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "experiments")
        yield


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A dataset whose first class has an awkward name, and detections with every kind of error."""
    folder = tmp_path_factory.mktemp("report")
    annotations, images = data.write_shapes_dataset(folder, num_images=12, seed=3, image_size=(96, 160))
    content = json.loads(annotations.read_text())
    content["categories"][0]["name"] = NASTY
    content["annotations"][1]["iscrowd"] = 1
    annotations.write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    results = []
    for i, annotation in enumerate(content["annotations"]):
        box = np.array(annotation["bbox"])
        category = 3 if i % 5 == 1 else annotation["category_id"]
        move = 0.25 if i % 5 == 2 else 0.0
        if i % 5 == 3:
            continue  # missed
        for _ in range(2 if i % 5 == 4 else 1):
            x, y, w, h = (box + move * box[[2, 3, 2, 3]] * np.array([1, 1, 0, 0])).tolist()
            mask = np.zeros((96, 160), bool)
            mask[round(y) : round(y + h), round(x) : round(x + w)] = True
            result = {"image_id": annotation["image_id"], "category_id": category, "bbox": [x, y, w, h]}
            results.append({**result, "score": float(rng.uniform(0.4, 1)), "segmentation": evaluate.encode_mask(mask)})
    results.append({**results[0], "bbox": [1.0, 1.0, 6.0, 6.0], "score": 0.95})
    return data.load_coco(annotations, images), results


@pytest.fixture(scope="module")
def report(scripts, shapes, tmp_path_factory):
    from detectax_eqx.report import write_report

    dataset, results = shapes
    metrics = {kind: evaluate.evaluate_coco(dataset, results, iou_type=kind) for kind in ("bbox", "segm")}
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, dataset, results, metrics)
    return path


def content_of(page):
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert match is not None
    return json.loads(match[1])


def test_a_page_needs_nothing_else(report):
    text = report.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", text)
    assert "@import" not in text and "fetch(" not in text and "{{" not in text
    assert NASTY not in text
    assert content_of(report)["classes"][0]["name"] == NASTY


def test_the_report_holds_the_analysis(report, shapes):
    dataset, results = shapes
    content = content_of(report)
    assert [view["name"] for view in content["views"]] == ["boxes", "masks"]
    for view, kind in zip(content["views"], ("bbox", "segm"), strict=True):
        analysis = evaluate.analyze_errors(dataset.annotations_path, results, iou_type=kind)
        assert view["ap"] == analysis.ap and view["costs"] == list(analysis.costs.values())
        assert view["numbers"]["AP50"] == analysis.ap
    assert min(content["views"][0]["counts"]) >= 0 and sum(content["views"][0]["counts"][:6]) >= 8
    rows = evaluate.error_rows(evaluate.analyze_errors(dataset.annotations_path, results))
    wrong_images = {row["image_id"] for row in rows if row["verdict"] not in ("right", "ignored")}
    assert {image["id"] for image in content["images"]} == wrong_images
    # Boxes lie in the thumbnail's pixels, here those of the image; masks are those of the annotations.
    image = content["images"][0]
    objects = dataset.objects(image["id"] - 1)
    np.testing.assert_allclose([entry["box"] for entry in image["objects"]], objects.boxes, atol=0.06)
    assert [entry["crowd"] for entry in image["objects"]] == objects.crowd.tolist()
    assert all(entry["mask"] for entry in image["objects"] + image["detections"])
    with Image.open(dataset.images[0].path) as picture:
        assert (image["width"], image["height"]) == picture.size


def test_the_report_is_kept_small(scripts, shapes, monkeypatch):
    from detectax_eqx.report import _evaluation as evaluation

    dataset, results = shapes
    analysis = evaluate.analyze_errors(dataset, results)
    everything = evaluation.worst_images(dataset, results, [analysis])
    assert len(everything) > 5
    monkeypatch.setattr(evaluation, "IMAGE_BYTES", 20_000)
    limited = evaluation.worst_images(dataset, results, [analysis])
    assert limited == everything[: len(limited)] and 0 < len(limited) < len(everything)
    assert len(json.dumps(limited)) < 21_000
    monkeypatch.setattr(evaluation, "MOST", 2)
    assert len(evaluation.worst_images(dataset, results, [analysis])) == 2


def test_the_worst_come_first(scripts, shapes):
    from detectax_eqx.report import _evaluation as evaluation

    dataset, results = shapes
    analysis = evaluate.analyze_errors(dataset.annotations_path, results)
    badness = dict.fromkeys(range(len(dataset)), 0.0)
    for row in evaluate.error_rows(analysis):
        if row["verdict"] not in ("right", "ignored"):
            badness[row["image_id"] - 1] += 1 if row["verdict"] == "missed" else row["score"]
    expected = sorted((index for index in badness if badness[index]), key=lambda index: -badness[index])
    assert evaluation.ranking(analysis, [image.id for image in dataset.images]) == expected


def test_shrunk_masks(scripts):
    from detectax_eqx.report._picture import mask_size, shrink_mask

    assert mask_size((100, 200)) == (100, 200) and mask_size((480, 960)) == (120, 240)
    mask = np.zeros((8, 12), bool)
    mask[2:6, 4:8] = True
    small = np.zeros((4, 6), bool)
    small[1:3, 2:4] = True
    expected = evaluate.encode_mask(small)["counts"]
    square = np.array([[4.0, 2.0], [8.0, 2.0], [8.0, 6.0], [4.0, 6.0]])
    encoded = evaluate.encode_mask(mask)
    assert shrink_mask({**encoded, "counts": encoded["counts"].encode()}, (8, 12), (4, 6)) == expected
    assert shrink_mask((square,), (8, 12), (4, 6)) == expected
    assert shrink_mask(None, (8, 12), (4, 6)) is None


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as one:
        chromium = one.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, page, width=1200):
    """A page in the browser, offline, and the list that collects its console messages and errors."""
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    tab = context.new_page()
    complaints = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(page.as_uri())
    return tab, complaints


SHOWN = "() => Promise.all([...document.querySelectorAll('.picture image')].map((node) => {"
SHOWN += " const image = new Image(); image.src = node.getAttribute('href');"
SHOWN += " return image.decode().then(() => [image.naturalWidth, image.naturalHeight]); }))"


def test_the_report_in_a_browser(browser, report):
    tab, complaints = opened(browser, report)
    content = content_of(report)
    assert tab.title().startswith("Evaluation")
    sizes = tab.evaluate(SHOWN)
    assert len(sizes) == 2 * tab.locator(".card").count() > 8 and sizes[0] == [160, 96]
    before = tab.locator(".card").count()
    for kind in ("classification", "localization", "duplicate", "missed"):
        tab.select_option("#image-kind", kind)
        chips = tab.locator(".chip").all_inner_texts()
        assert chips and all(chip.startswith(f"{kind}:") for chip in chips)
        assert tab.locator(".card").count() < before
    tab.select_option("#image-kind", "")
    tab.select_option("#image-class", "3")
    assert all("star" in chip for chip in tab.locator(".chip").all_inner_texts())
    assert tab.locator("#classes tr.chosen").inner_text().startswith("star")
    tab.select_option("#image-class", "")
    # A score that few detections reach leaves the missed objects and the confident errors.
    tab.locator("#image-score").fill("0.95")
    assert tab.locator(".picture .wrong").count() > 0
    # Masks: one path per object and detection shown, and none when masks are turned off.
    assert tab.locator(".picture .mask").count() == tab.locator(".picture .box").count() > 0
    tab.locator("#image-masks").uncheck()
    assert tab.locator(".picture .mask").count() == 0
    tab.locator(".picture").first.click()
    assert tab.locator("dialog[open] .picture").count() == 2
    tab.locator("dialog button").click()
    assert tab.locator("dialog[open]").count() == 0
    costs = tab.locator("#costs").inner_text()
    tab.locator("#views button", has_text="masks").click()
    assert tab.locator("#costs").inner_text() != costs
    assert f"{100 * content['views'][1]['ap']:.1f}" == tab.locator("#ap").inner_text()
    tab.locator("#classes th", has_text="objects").click()
    counts = [int(text) for text in tab.locator("#classes tbody td:nth-child(2)").all_inner_texts()]
    assert counts == sorted(counts, reverse=True)
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_on_a_phone(browser, report, scheme):
    tab, complaints = opened(browser, report, width=390)
    tab.emulate_media(color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.locator(".card").first.bounding_box()["width"] <= 390
    assert complaints == []


def test_masks_are_drawn_where_they_are(browser, report):
    """The path of a mask's run lengths covers exactly its pixels."""
    tab, complaints = opened(browser, report)
    mask = np.zeros((7, 9), bool)
    mask[1:5, 2:4] = mask[0, 6] = mask[:, 7] = mask[2:, 8] = True
    path = tab.evaluate("([counts, height]) => maskPath(counts, height)", [evaluate.encode_mask(mask)["counts"], 7])
    drawn = np.zeros_like(mask)
    for x, y, rows in re.findall(r"M(\d+) (\d+)h1v(\d+)h-1z", path):
        drawn[int(y) : int(y) + int(rows), int(x)] = True
    np.testing.assert_array_equal(drawn, mask)
    rng = np.random.default_rng(0)
    mask = rng.random((40, 300)) < 0.5  # long runs of differences, of either sign
    mask[:, 20:250] = True
    path = tab.evaluate("([counts, height]) => maskPath(counts, height)", [evaluate.encode_mask(mask)["counts"], 40])
    assert sum(int(rows) for *_, rows in re.findall(r"M(\d+) (\d+)h1v(\d+)h-1z", path)) == mask.sum()
    assert complaints == []


def test_a_dataset_page_in_a_browser(browser, scripts, shapes, tmp_path):
    from detectax_eqx.report import Suspicion, write_dataset_page

    dataset, _ = shapes
    suspicions = [Suspicion("odd", 0, 0, NASTY), Suspicion("odd", 1, 0, "second"), Suspicion("rare", 2, 0, "third")]
    table = {"title": "Counts", "note": "", "columns": ["what", "share"], "rows": [[NASTY, "50.0 %"]], "bars": 1}
    page = tmp_path / "dataset.html"
    write_dataset_page(page, dataset, [table], suspicions)
    for width in (1200, 390):
        tab, complaints = opened(browser, page, width=width)
        assert tab.title().startswith("Dataset") and NASTY in tab.locator("table").inner_text()
        assert len(tab.evaluate(SHOWN)) == tab.locator(".card").count() == 3
        tab.select_option("#kind", "rare")
        assert tab.locator(".card .chip").all_inner_texts() == ["rare"]
        tab.locator(".picture").first.click()
        assert tab.locator("dialog[open] .picture").count() == 1
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert complaints == []


def test_curves_in_a_browser(browser, tmp_path):
    from detectax_eqx.report import write_curves

    lines = [{"step": k, "rate": 0.01, "loss": 3 / k, NASTY: 1} for k in range(1, 90)] + [{"step": 89, "bbox_AP": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = tmp_path / "curves.html"
    write_curves(page, tmp_path / "metrics.jsonl", total_steps=100, running=False)
    for width in (1200, 390):
        tab, complaints = opened(browser, page, width=width)
        assert tab.locator("h2").all_inner_texts() == ["Loss", "COCO metrics", "Learning rate"]
        assert tab.locator("svg polyline").count() == 3
        assert tab.locator("section").first.locator("p").inner_text() == "loss 0.0337"
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert complaints == []
