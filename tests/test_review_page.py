"""The review page in a real headless Chromium."""

import json
from dataclasses import dataclass, field

import pytest
from PIL import Image

from benchmarks.page import find_chromium
from sampling.review import add_to_manifest, write_review

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if not find_chromium():
    pytest.skip("no chromium here; tests/install_chromium.sh installs Debian's", allow_module_level=True)

EVIL = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"
PROMPTS = ["a red star", "a blue ring", "a green circle", EVIL]
# The score of each prompt in epochs 1, 2 and 3; None: the scorer failed; "no picture": drawing it failed.
HEALTH = {0: (0.2, 0.9, 0.8), 1: (0.9, 0.95, 0.4), 2: (0.5, "no picture", 0.6), 3: (0.3, 0.7, None)}
WARNINGS = ["contrast is 25% of the teacher's", "health failed for 1 of 4 pictures"]  # of epoch 3
EPOCHS = ["teacher", "epoch 3", "epoch 2", "epoch 1"]  # as the columns stand
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


def make_row(index: int, epoch: int, **changes) -> dict:
    prefix = f"epoch_{epoch:04d}" if epoch else "teacher"
    return {
        "file": f"{prefix}_rank_0_sample_{index:02d}.png", "prompt": PROMPTS[index], "prompt_index": index,
        "epoch": epoch, "step": 10 * epoch, "rank": 0, "seed": 100 + index, "sampler": "ddim",
        "num_inference_steps": 4 if epoch else 50, "eta": 0.0, "shift": 3.0, "weights": "ema" if epoch else "teacher",
        "height": 64, "width": 64, "phase": "1 dmd" if epoch else "", "seconds": 0.25, "ok": True, "error": None,
        "scores": {},
    } | changes  # fmt: skip


def scored_row(index: int, epoch: int, health) -> dict:
    done = {"ok": True, "error": None, "latency_s": 0.003}
    if health == "no picture":
        return make_row(index, epoch, ok=False, error="OutOfMemoryError: <b>2 GiB</b>")
    if health is None:
        late = {"score": 0.0, "ok": False, "error": "TimeoutError: 60 s", "latency_s": 60.0}
        return make_row(index, epoch, scores={"health": late})
    contrast = 0.05 if epoch == 3 else 0.2  # a quarter of the teacher's: a warning
    scores = {"health": done | {"score": health, "contrast": contrast}}
    return make_row(index, epoch, scores=scores | ({"fidelity": done | {"score": 0.5, "psnr": 21.5}} if epoch else {}))


def save(folder, rows):
    folder.mkdir(exist_ok=True)
    for row in rows:
        if row["ok"]:
            colour = (60 * row["epoch"], 80 * row["prompt_index"], 90)
            Image.new("RGB", (row["width"], row["height"]), colour).save(folder / row["file"])
    add_to_manifest(folder, rows)
    write_review(folder, [])
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    run = tmp_path_factory.mktemp("run # 1")  # a name that has to be escaped in an address
    metrics = [
        {"step": step, "phase": 1, "objective": "dmd", "loss": 1 / step, "samples_per_second": 9.5} for step in (5, 30)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    rows = [scored_row(index, 0, 1.0) for index in HEALTH]
    rows += [scored_row(index, epoch, health[epoch - 1]) for epoch in (1, 2, 3) for index, health in HEALTH.items()]
    return save(run / "samples", rows)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tabs(browser):
    """Of one window: a new one would take longer than most tests here."""
    return browser.new_context()


@dataclass
class Visit:
    """A page, and what must not happen on it."""

    page: "playwright.Page"
    problems: list[str] = field(default_factory=list)

    def prompts(self) -> list[str]:
        return self.page.locator("#rows .prompt p").all_inner_texts()

    def picture(self, prompt: int, column: int):
        return self.page.locator(f".picture[data-p='{prompt}'][data-r='{column}']").first

    def place(self) -> tuple[str, str]:
        """The prompt in the viewer, and the round."""
        inside = self.page.locator("#viewer")
        return inside.locator("h2").inner_text(), inside.locator("figcaption").first.inner_text()

    def focused(self) -> list[int]:
        """Prompt and column of the picture that has the focus."""
        return self.page.evaluate("Object.values(document.activeElement.dataset).map(Number)")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)


@pytest.fixture
def visit(tabs):
    """folder → its page. Whatever goes wrong on the page fails the test."""
    visits = []

    def go(folder, viewport=DESKTOP, colors="light", context=tabs) -> Visit:
        page = context.new_page()
        page.set_viewport_size(viewport)
        page.emulate_media(color_scheme=colors)
        visits.append(seen := Visit(page))
        page.on("console", lambda message: seen.problems.append(message.text))
        page.on("pageerror", lambda error: seen.problems.append(str(error)))
        page.on("dialog", lambda dialog: (seen.problems.append(f"alert {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith("file://") else seen.problems.append(r.url))
        page.goto((folder / "index.html").as_uri())
        return seen

    yield go
    for seen in visits:
        seen.page.close()
        assert not seen.problems


def test_prompts_down_and_rounds_across(visit, samples):
    seen = visit(samples)
    page = seen.page
    assert page.get_by_role("table").count() == 1
    heads = page.get_by_role("columnheader").all_inner_texts()
    assert [head.split("\n")[0] for head in heads] == ["Prompt", *EPOCHS]
    assert seen.prompts() == PROMPTS and page.locator("#count").inner_text() == "4 prompts"
    cell = page.get_by_role("row").nth(1).get_by_role("cell").nth(1)
    playwright.expect(cell).to_contain_text("seed 100 · 4 steps")
    assert cell.inner_text().split("\n")[1:3] == ["health", "0.80"]
    assert cell.locator(".score").nth(1).text_content() == "likeness to the teacher0.50"
    image = cell.get_by_role("img", include_hidden=True)
    assert image.get_attribute("alt") == "epoch 3: a red star" and image.get_attribute("loading") == "lazy"
    page.wait_for_function("() => [...document.images].every(i => i.complete && i.naturalWidth)")
    assert image.bounding_box()["width"] == 128
    assert image.evaluate("i => getComputedStyle(i).imageRendering") == "pixelated"


def test_failures_and_warnings_are_told(visit, samples):
    page = visit(samples).page
    failed = page.locator(".failed")
    assert failed.inner_text() == "failed\nOutOfMemoryError: <b>2 GiB</b>" and failed.locator("img").count() == 0
    score = page.locator(".picture[data-p='3'][data-r='1'] ~ .score")
    assert score.inner_text().split("\n") == ["health", "score failed"]
    assert page.locator("#warnings li").all_inner_texts() == WARNINGS
    marks = [head.locator(".mark").count() for head in page.get_by_role("columnheader").all()]
    assert marks == [0, 0, 1, 0, 0] and page.locator(".mark").inner_text() == f"⚠ {'; '.join(WARNINGS)}"


def test_a_click_shows_a_picture_large_beside_the_teachers(visit, samples):
    seen = visit(samples)
    seen.picture(0, 1).click()
    viewer = seen.page.get_by_role("dialog", name="a red star")
    assert viewer.locator("figcaption").all_inner_texts() == ["epoch 3", "teacher"]
    seen.page.wait_for_function("() => [...document.querySelectorAll('#viewer img')].every(i => i.naturalWidth)")
    widths = [image.bounding_box()["width"] for image in viewer.locator("img").all()]
    assert widths[0] == widths[1] >= 448 and widths[0] % 64 == 0
    known = viewer.locator("#known").inner_text().split("\n")
    for words in ("100", "ddim, eta 0, shift 3", "step 30, phase 1 dmd", "ema", "64 × 64", "on rank 0, in 0.25 s"):
        assert words in known
    assert "0.8 (−0.100 since epoch 2)" in known and "contrast 0.05 · latency 0.003 s" in known
    assert "likeness to the teacher" in known and "; ".join(WARNINGS) in known


def test_arrow_keys_flick_and_escape_closes_where_one_was(visit, samples):
    seen = visit(samples)
    seen.picture(0, 1).click()
    flicked = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowDown", "ArrowUp"):
        seen.press(key)
        flicked.append(seen.place())
    assert flicked == [
        (PROMPTS[0], "epoch 2"), (PROMPTS[0], "epoch 1"), (PROMPTS[0], "epoch 1"), (PROMPTS[0], "epoch 2"),
        (PROMPTS[1], "epoch 2"), (PROMPTS[2], "epoch 2"), (PROMPTS[1], "epoch 2"),
    ]  # fmt: skip
    seen.press("Escape")
    playwright.expect(seen.page.locator("#viewer")).to_be_hidden()
    seen.page.wait_for_function("() => document.activeElement.dataset.p === '1'")
    assert seen.focused() == [1, 2]
    seen.press("Enter", "ArrowLeft", "ArrowLeft")
    assert seen.place() == (PROMPTS[1], "teacher")
    assert seen.page.locator("#viewer figure").count() == 1  # not the teacher's beside itself


def test_buttons_do_what_the_keys_do(visit, samples):
    seen = visit(samples)
    seen.picture(0, 1).click()
    seen.page.get_by_role("button", name="older").click()
    seen.page.get_by_role("button", name="below").click()
    assert seen.place() == (PROMPTS[1], "epoch 2")
    seen.page.get_by_role("button", name="Close").click()
    playwright.expect(seen.page.locator("#viewer")).to_be_hidden()


def test_the_keyboard_reaches_everything_in_order(visit, samples):
    seen = visit(samples)
    reached = []
    for _ in range(8):
        seen.press("Tab")
        where = "(e => e.id || e.tagName + Object.values(e.dataset))(document.activeElement)"
        reached.append(seen.page.evaluate(where))
        # Styles follow the focus a moment later on a busy machine.
        seen.page.wait_for_function("getComputedStyle(document.activeElement).outlineStyle == 'solid'", timeout=5000)
    assert reached == ["SUMMARY", "filter", "sort", "only-failed", "BUTTON0,0", "BUTTON0,1", "BUTTON0,2", "BUTTON0,3"]
    seen.press("ArrowLeft", "ArrowDown", "ArrowDown")
    assert seen.focused() == [2, 2]
    seen.press("Enter")
    assert seen.place() == (PROMPTS[2], "epoch 2")
    assert seen.page.locator("#viewer .failed").inner_text().startswith("failed\nOutOfMemoryError")


def test_filters(visit, samples):
    seen = visit(samples)
    page = seen.page
    page.get_by_label("Filter").fill("RED a")
    assert seen.prompts() == ["a red star"] and page.get_by_role("status").inner_text() == "1 of 4 prompts"
    page.get_by_label("Filter").fill("purple")
    assert seen.prompts() == [] and page.locator("#none").is_visible()
    page.get_by_label("Filter").fill("")
    page.get_by_label("Only failed").check()
    assert seen.prompts() == ["a green circle"] and "failed in epoch 2" in page.locator("#rows .prompt").inner_text()
    page.get_by_label("Only failed").uncheck()
    assert seen.prompts() == PROMPTS


def test_sorting_by_a_score_and_by_its_change(visit, samples):
    seen = visit(samples)
    sort = seen.page.get_by_label("Sort by")
    sort.select_option("health")
    # In epoch 3 worst first; a score that failed is no number, and last.
    assert seen.prompts() == [PROMPTS[i] for i in (1, 2, 0, 3)]
    assert seen.page.locator("#rows .prompt small:first-child").all_inner_texts()[0] == "health 0.40"
    sort.select_option("change of health")
    assert seen.prompts() == [PROMPTS[i] for i in (1, 0, 2, 3)]  # −0.55, −0.1, none, none
    assert seen.page.locator("#rows .prompt small").first.inner_text() == "health −0.55"
    seen.picture(1, 1).click()
    seen.press("ArrowDown")
    assert seen.place() == (PROMPTS[0], "epoch 3")  # the keys follow what is seen
    seen.press("Escape")
    sort.select_option("prompt order")
    assert seen.prompts() == PROMPTS


def test_a_hostile_prompt_is_only_text(visit, samples):
    seen = visit(samples)
    seen.picture(3, 1).click()
    assert seen.place()[0] == EVIL
    assert seen.page.locator("img[src=x], [onerror]").count() == 0 and seen.page.locator("script").count() == 2


def test_dark_and_light(visit, samples):
    dark, light = (
        visit(samples, colors=scheme).page.evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("dark", "light")
    )
    assert light == "rgb(255, 255, 255)" and dark == "rgb(20, 23, 26)"


def test_on_a_phone_only_the_table_scrolls_sideways(visit, samples):
    seen = visit(samples, PHONE)
    page = seen.page
    wide = "[document.documentElement.scrollWidth, document.getElementById('scroller').scrollWidth > innerWidth]"
    assert page.evaluate(wide) == [360, True]
    page.locator("#scroller").evaluate("e => e.scrollLeft = 200")
    first = page.locator("#rows .prompt").first.bounding_box()
    assert first["x"] == 0 and first["width"] <= 110  # stays, and leaves the room to the pictures
    page.locator("summary").click()
    assert page.evaluate(wide) == [360, True]
    seen.picture(1, 2).click()
    viewer = page.locator("#viewer").bounding_box()
    assert viewer["x"] == 0 and viewer["width"] == 360
    assert page.locator("#viewer").evaluate("e => e.scrollWidth <= e.clientWidth")


def test_curves(visit, samples):
    page = visit(samples).page
    names = page.locator(".curve svg").evaluate_all("all => all.map(svg => svg.getAttribute('aria-label'))")
    assert names[0] == "loss, from 0.2 at step 5 to 0.03333 at step 30"
    assert names[1] == "health, from 0.475 at step 10 to 0.6 at step 30; the teacher's: 1"
    assert [name.split(",")[0] for name in names[2:]] == ["likeness to the teacher", "speed"]
    page.locator(".plot").first.hover(position={"x": 1, "y": 5})
    assert page.locator(".curve .value").first.inner_text() == "step 5: 0.2"


def test_large_pictures_show_thumbnails_and_a_missing_one_says_so(visit, tmp_path):
    rows = [make_row(i, 1, width=300, height=600) for i in range(3)]
    folder = save(tmp_path / "samples", rows)
    (folder / "thumbnails" / "epoch_0001_rank_0_sample_01.jpg").unlink()
    for i in (0, 2):  # the table shows picture 0 all the same
        (folder / rows[i]["file"]).unlink()
    (folder / "thumbnails" / "epoch_0001_rank_0_sample_02.jpg").unlink()
    seen = visit(folder)
    playwright.expect(seen.picture(2, 0)).to_have_text("missingepoch_0001_rank_0_sample_02.png is not in this folder")
    seen.page.wait_for_function("() => [...document.images].every(i => i.complete && i.naturalWidth)")
    assert [seen.picture(i, 0).locator("img").evaluate("i => i.naturalWidth") for i in (0, 1)] == [128, 300]
    seen.picture(1, 0).click()
    assert seen.page.locator("#viewer img").get_attribute("src") == rows[1]["file"]
    seen.problems = [problem for problem in seen.problems if "ERR_FILE_NOT_FOUND" not in problem]


def test_a_folder_without_pictures_and_without_javascript(visit, browser, samples, tmp_path):
    page = visit(save(tmp_path / "samples", [])).page
    assert "no pictures yet" in page.locator("header").inner_text()
    assert not page.locator("#scroller").is_visible() and not page.locator("#controls").is_visible()
    page = visit(samples, context=browser.new_context(java_script_enabled=False)).page
    assert "needs JavaScript" in page.locator("body").inner_text()
