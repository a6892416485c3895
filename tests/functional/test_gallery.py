"""The gallery, in a real Chromium, and its commands, in a real shell."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser_kit import chromium
from cli_kit import BENCH, HOSTILE, PATIENCE, Cli
from PIL import Image
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from comfy_executors import (
    ComfyServerWorkflowExecutor,
    DummyWorkflowExecutor,
    OutputFileError,
    WorkflowTemplate,
)
from comfy_executors.devserver import DevServer
from comfy_executors.gallery import write_gallery
from comfy_executors.gallery.model import Batch, File, Run
from comfy_executors.gallery.page import read_page, write_page

MARKUP = '</script><img src=x onerror="window.hacked=1"><b>bold</b>{{ 7*7 }}\u202e" onload=\'1\''
HOSTILE_NAME = "a\"b'<b>#1%41?&amp; \u00e9 \U0001f98a.png"
VIDEO = (
    BENCH.rstrip("}\n")
    + """}}, "3": {"class_type": "SaveWEBM", "inputs": {
  "images": ["1", 0], "filename_prefix": "clip", "codec": "vp9", "fps": 24.0, "crf": 32.0}},
  "4": {"class_type": "PreviewAny", "inputs": {"source": "hello <b>"}}}"""
)


@pytest.fixture(scope="module")
def server() -> Iterator[DevServer]:
    with DevServer() as server:
        yield server


@pytest.fixture
def cli(tmp_path: Path, server: DevServer) -> Cli:
    server.reset()
    return Cli(tmp_path, server)


def gallery_of(cli: Cli, output: str = "out") -> list[Run]:
    return read_page(cli.folder / output)


# The browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture
def page(browser: Chrome, cli: Cli) -> Path:
    """A gallery of two runs with six images, one failure and hostile text, opened from the disk."""
    make = ("run", "bench.jinja", "--gallery")
    assert (
        cli.within(*make, "--num-samples", "4", "--batch-size", "2", "--seed", "7").returncode == 0
    )
    assert cli.within(*make, "--var", "fail=boom <b>").returncode == 1
    assert cli.within(*make, "--num-samples", "2", "--var", f"prompt={MARKUP}").returncode == 0
    path = cli.folder / "out" / "index.html"
    emulate(browser)
    complaints(browser)  # those of the page before
    browser.get(path.as_uri())
    return path


def emulate(browser: Chrome, *, dark: bool = False, width: int = 1280, height: int = 900) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def complaints(browser: Chrome) -> list[Any]:
    """What the page's console says; a breach of its own policy is among that."""
    return list(browser.get_log("browser"))  # type: ignore[no-untyped-call]


def wait_for(browser: Chrome, script: str) -> Any:
    return WebDriverWait(browser, PATIENCE).until(
        lambda chrome: chrome.execute_script(f"return {script}"), script
    )


def press(browser: Chrome, *keys: str) -> None:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


FOCUSED = "[...document.querySelectorAll('.tile')].indexOf(document.activeElement)"


def focused(browser: Chrome) -> int:
    return int(browser.execute_script(f"return {FOCUSED}"))


def shown(browser: Chrome) -> dict[str, str]:
    script = """return Object.fromEntries([...document.querySelectorAll('#facts div')].map(
        row => [row.children[0].textContent, row.children[1].textContent]))"""
    return dict(browser.execute_script(script))


def test_thumbnails_are_decoded_in_order(browser: Chrome, page: Path) -> None:
    wait_for(
        browser, "[...document.querySelectorAll('.tile img')].every(i => i.naturalWidth === 16)"
    )
    sources = browser.execute_script(
        "return [...document.querySelectorAll('.tile img')].map(i => i.getAttribute('src'))"
    )
    made = [file.path for run in read_page(page.parent) for b in run.batches for file in b.files]
    assert sources == made
    assert len(made) == len(set(made)) == 6
    assert browser.title == "6 images \u2013 bench.jinja"
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert all(name.startswith("file:") for name in loaded)
    assert complaints(browser) == []


def test_hostile_text_is_text(browser: Chrome, page: Path) -> None:
    browser.find_element(By.CSS_SELECTOR, ".tile").click()
    assert shown(browser)["prompt"] == MARKUP
    heading = browser.find_element(By.CSS_SELECTOR, ".run dd")
    assert heading.get_property("textContent") == MARKUP
    failure = browser.find_element(By.CSS_SELECTOR, ".failed li span")
    assert str(failure.get_property("textContent")).endswith("failed: RuntimeError: boom <b>")
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_elements(By.CSS_SELECTOR, "main b, dialog b, [onerror], [onload]") == []
    assert complaints(browser) == []


def test_the_keyboard_does_all(browser: Chrome, page: Path) -> None:
    page_origin = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.execute_cdp_cmd("Browser.grantPermissions", page_origin)
    press(browser, Keys.ARROW_RIGHT)
    assert focused(browser) == 0
    press(browser, Keys.ARROW_RIGHT, Keys.END)
    assert focused(browser) == 5
    press(browser, Keys.HOME, Keys.ARROW_DOWN)
    down = focused(browser)
    press(browser, Keys.ARROW_UP)
    assert (down > 0, focused(browser)) == (True, 0)
    press(browser, Keys.ENTER)
    wait_for(browser, "document.getElementById('viewer').open")
    assert shown(browser)["Seed"] == str(read_page(page.parent)[0].batches[0].seed)
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.find_element(By.ID, "position").text == "3 of 6"
    assert shown(browser)["Seed"] == "7"
    assert shown(browser)["Batch"] == "0, file 1 of 2"
    assert shown(browser)["Node"] == "2 (SaveImage)"
    wait_for(browser, "document.querySelector('#facts').textContent.includes('16 \u00d7 16')")
    press(browser, "c")
    wait_for(browser, "document.getElementById('said').textContent === 'Command copied'")
    copied = browser.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0], e => arguments[0](String(e)))"
    )
    assert copied == read_page(page.parent)[2].batches[0].command
    press(browser, Keys.ESCAPE)
    # The dialog's own `close` event comes after it is closed.
    wait_for(browser, "!document.getElementById('viewer').open")
    wait_for(browser, f"{FOCUSED} === 2")


LUMINANCE = """
const parse = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = (rgb) => { const [r, g, b] = rgb.map(v => { v /= 255;
  return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = (node) => { for (; node; node = node.parentElement) {
  const color = getComputedStyle(node).backgroundColor;
  if (!color.endsWith(', 0)') && color !== 'transparent') return color; }
  return 'rgb(255, 255, 255)'; };
const found = [];
for (const node of document.querySelectorAll('body *')) {
  const own = [...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || !node.checkVisibility() || node.disabled) continue;
  const [a, b] = [getComputedStyle(node).color, behind(node)].map(c => light(parse(c)));
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML.slice(0, 80)]);
}
return found;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_in_light_and_dark(browser: Chrome, page: Path, dark: bool) -> None:
    emulate(browser, dark=dark)
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", back)[:3])) < 64) is dark
    found = browser.execute_script(LUMINANCE)
    browser.find_element(By.CSS_SELECTOR, ".tile").click()
    found += browser.execute_script(LUMINANCE)
    assert len(found) > 30
    # The contrast that WCAG asks for at level AA.
    assert [entry for entry in found if entry[0] < 4.5] == []


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_does_not_scroll_sideways(browser: Chrome, page: Path, width: int) -> None:
    emulate(browser, width=width, height=640)
    wide = f"document.scrollingElement.scrollWidth <= {width}"
    assert browser.execute_script(f"return {wide}")
    browser.find_element(By.CSS_SELECTOR, ".tile").click()
    assert browser.execute_script(f"return {wide}")
    inside = "[...document.querySelectorAll('.panel, .panel button, .stage img')]"
    inside += ".map(e => e.getBoundingClientRect())"
    inside += f".every(box => box.left >= 0 && box.right <= {width})"
    wait_for(browser, inside)
    tall = "[...document.querySelectorAll('.panel button')].every(b => b.offsetHeight >= 44)"
    assert browser.execute_script(f"return {tall}") is (width <= 768)


def test_it_can_be_looked_at_without_its_script(page: Path) -> None:
    class Links(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            if tag == "a":
                self.found.append(str(dict(attributes)["href"]))

    links = Links()
    links.feed(page.read_text("utf-8"))
    files = [link for link in links.found if not link.startswith("#")]
    assert len(files) == 6
    assert all((page.parent / link).is_file() for link in files)


def test_hostile_file_names_are_shown(browser: Chrome, tmp_path: Path) -> None:
    with DummyWorkflowExecutor(image_size=32) as executor:
        run = executor.submit_workflow(WorkflowTemplate(BENCH), num_samples=2)
        first, second = run.result()
        first.save(tmp_path / HOSTILE_NAME)
        second.save(tmp_path / "sub #2" / HOSTILE_NAME)
        page = write_gallery(tmp_path, run)
    browser.get(page.as_uri())
    wait_for(
        browser, "[...document.querySelectorAll('.tile img')].every(i => i.naturalWidth === 32)"
    )
    browser.find_elements(By.CSS_SELECTOR, ".tile")[1].click()
    assert browser.find_element(By.ID, "viewer-title").text == f"sub #2/{HOSTILE_NAME}"
    wait_for(browser, "document.querySelector('#stage img').naturalWidth === 32")
    assert browser.find_elements(By.CSS_SELECTOR, "main b, dialog b") == []


def test_high_numbers_are_not_rounded(browser: Chrome, tmp_path: Path) -> None:
    high = 2**64 - 1
    (tmp_path / "a.txt").write_text("a")
    batch = Batch(0, seed=high, variables={"own": high}, files=[File("a.txt", "text", text="a")])
    page = write_page(tmp_path, Run("1", "high", "now", variables={"all": -high}, batches=[batch]))
    browser.get(page.as_uri())
    browser.find_element(By.CSS_SELECTOR, ".tile").click()
    facts = shown(browser)
    assert [facts[name] for name in ("Seed", "own", "all")] == [str(high), str(high), f"-{high}"]
    assert [batch.seed for run in read_page(tmp_path) for batch in run.batches] == [high]


def test_videos_and_texts_have_their_place(browser: Chrome, cli: Cli) -> None:
    (cli.folder / "video.jinja").write_text(VIDEO, "utf-8")
    assert cli.within("run", "video.jinja", "--gallery", "--include-previews").returncode == 0
    emulate(browser)
    browser.get((cli.folder / "out" / "index.html").as_uri())
    assert browser.title == "3 files \u2013 video.jinja"
    assert browser.find_element(By.CSS_SELECTOR, ".tile .text").text == "hello <b>"
    browser.find_element(By.CSS_SELECTOR, ".tile video").click()
    assert browser.find_element(By.CSS_SELECTOR, "#stage video[controls]").is_displayed()


@pytest.mark.slow
def test_two_thousand_images_stay_fluid(browser: Chrome, tmp_path: Path) -> None:
    originals = [tmp_path / f"original-{number}.png" for number in range(10)]
    for number, original in enumerate(originals):
        Image.effect_noise((768, 768), 20 + number).save(original)
    batches = []
    for index in range(2000):
        name = f"image_{index:05d}_.png"
        os.link(originals[index % 10], tmp_path / name)
        batches.append(Batch(index, seed=index, files=[File(name, "image", 400_000)]))
    run = Run("big", "big", "now", variables={"prompt": "many"}, batches=batches)
    page = write_page(tmp_path, run)
    emulate(browser)
    began = time.monotonic()
    browser.get(page.as_uri())
    opened = time.monotonic() - began
    wait_for(browser, "document.querySelector('.tile img').complete")
    loaded = "[...document.querySelectorAll('.tile img')].filter(i => i.complete && i.naturalWidth)"
    at_first = browser.execute_script(f"return {loaded}.length")
    frames = browser.execute_async_script("""
        const done = arguments[0], frames = []; let last = performance.now(), left = 60;
        const step = (now) => { frames.push(now - last); last = now; scrollBy(0, 120);
          if (left--) requestAnimationFrame(step); else done(frames); };
        requestAnimationFrame(step);""")
    ordered = sorted(frames)
    print(
        f"{page.stat().st_size / 1e6:.1f} MB opened in {opened:.2f} s, {at_first} images loaded; "
        f"scrolling: median frame {ordered[len(ordered) // 2]:.1f} ms, "
        f"95 % below {ordered[int(len(ordered) * 0.95)]:.1f} ms, longest {ordered[-1]:.0f} ms"
    )
    # What is far from the screen costs nothing until one comes there.
    assert 0 < at_first < 200
    skipped = "[...document.querySelectorAll('.grid li')].filter(li => !li.querySelector("
    skipped += "'.caption').checkVisibility({contentVisibilityAuto: true})).length"
    assert browser.execute_script(f"return {skipped}") > 1800
    press(browser, Keys.ARROW_RIGHT, Keys.END)
    wait_for(browser, "[...document.querySelectorAll('.tile img')].pop().naturalWidth === 768")
    assert focused(browser) == 1999


# The commands


def run_in_shell(command: str, folder: Path) -> list[Path]:
    """Run a command as somebody does who pastes it, in an empty folder; return what it saved."""
    folder.mkdir()
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return [folder / line for line in done.stdout.splitlines()]


def assert_made_again(cli: Cli, *, output: str = "out") -> None:
    """Run the command of each batch on a server that knows nothing, and compare the bytes."""
    for run in gallery_of(cli, output):
        for batch in run.batches:
            cli.server.reset()
            folder = cli.folder / f"again-{run.id[:8]}-{batch.row}-{batch.index}"
            again = run_in_shell(batch.command, folder)
            images = [cli.folder / output / file.path for file in batch.files]
            assert [path.read_bytes() for path in again] == [path.read_bytes() for path in images]


def test_a_command_makes_the_same_images_again(cli: Cli) -> None:
    options = ("--var", f"prompt={HOSTILE}", "--var-json", "seconds=0.01", "--gallery")
    done = cli.within("run", "bench.jinja", "--num-samples", "7", "--batch-size", "3", *options)
    assert done.returncode == 0
    assert done.stderr.endswith(f"gallery: {(cli.folder / 'out' / 'index.html').as_uri()}\n")
    [run] = gallery_of(cli)
    assert [len(batch.files) for batch in run.batches] == [3, 3, 1]
    assert run.variables == {"prompt": HOSTILE, "seconds": 0.01}
    assert_made_again(cli)


@pytest.mark.parametrize("text", ["\\ud800 half a pair", "a \\u0000 b"])
def test_a_command_says_what_no_argument_can_hold(cli: Cli, text: str) -> None:
    done = cli.within("run", "bench.jinja", "--gallery", "--var-json", f'prompt="{text}"')
    assert (done.returncode, "index.html" in done.stderr) == (0, True)
    assert_made_again(cli)


def test_a_command_of_a_row_makes_its_images_again(cli: Cli) -> None:
    rows = [{"prompt": HOSTILE, "num_samples": 3}, {"prompt": "b", "seed": 5}]
    (cli.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sweep = ("run", "bench.jinja", "--vars", "rows.jsonl", "--batch-size", "2", "--gallery")
    assert cli.within(*sweep, "--var-json", "seconds=0.01").returncode == 0
    [run] = gallery_of(cli)
    assert [(b.row, b.index, len(b.files)) for b in run.batches] == [
        (0, 0, 2),
        (0, 1, 1),
        (1, 0, 1),
    ]
    assert [batch.variables["prompt"] for batch in run.batches] == [HOSTILE, HOSTILE, "b"]
    assert_made_again(cli)


def test_a_command_names_inputs_and_files_of_headers(cli: Cli) -> None:
    (cli.folder / "load.jinja").write_text(
        '{"1": {"class_type": "LoadImage", "inputs": {"image": "{{ input_images[0] }}"}},'
        '"2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], '
        '"filename_prefix": "loaded"}}}'
    )
    Image.new("RGB", (8, 8), "red").save(cli.folder / "it's red.png")
    (cli.folder / "keys.txt").write_text("X-Key: hunter2")
    headers = ("--header", "@keys.txt", "--header", "X-Other: hunter3")
    make = ("run", "load.jinja", "--input", "it's red.png", *headers, "--gallery")
    assert cli.within(*make).returncode == 0
    [run] = gallery_of(cli)
    assert run.note == "Left out of the commands, because they may be keys: --header X-Other"
    assert "hunter" not in (cli.folder / "out" / "index.html").read_text("utf-8")
    assert_made_again(cli)


def test_a_command_from_python(cli: Cli) -> None:
    template = WorkflowTemplate.from_file(cli.folder / "bench.jinja")
    variables = {"prompt": HOSTILE}
    out = cli.folder / "out"
    with ComfyServerWorkflowExecutor(cli.server.address, batch_size=2) as executor:
        run = executor.submit_workflow(template, num_samples=3, variables=variables)
        write_gallery(out, run, template=template, variables=variables)
        rows = executor.map_workflows(template, [{"prompt": "a"}, {"promt": "b"}])
        write_gallery(out, rows, template=template, title="rows")
        keeps = executor.submit_workflow(template, randomize_seed=False)
        write_gallery(out, keeps, template=template)
    kept, sweep, plain = gallery_of(cli)
    assert [batch.command for batch in kept.batches] == [""]
    assert sweep.batches[0].error == ""
    assert "did you mean prompt?" in sweep.batches[1].error
    assert sweep.title == "rows"
    assert [len(batch.files) for batch in plain.batches] == [2, 1]
    for number, batch in enumerate([sweep.batches[0], *plain.batches]):
        cli.server.reset()
        again = run_in_shell(batch.command, cli.folder / f"again-{number}")
        images = [out / file.path for file in batch.files]
        assert [path.read_bytes() for path in again] == [path.read_bytes() for path in images]


# A gallery that is there already


def test_another_run_comes_above_and_what_is_gone_leaves(cli: Cli) -> None:
    make = ("run", "bench.jinja", "--gallery", "--num-samples", "2")
    for _ in range(2):
        assert cli.within(*make).returncode == 0
    second, first = gallery_of(cli)
    assert [len(run.batches) for run in (second, first)] == [2, 2]
    for batch in first.batches:
        (cli.folder / "out" / batch.files[0].path).unlink()
    (cli.folder / "out" / second.batches[0].files[0].path).unlink()
    assert cli.within(*make).returncode == 0
    assert [len(run.batches) for run in gallery_of(cli)] == [2, 1]


def test_a_sweep_that_goes_on_has_one_place(cli: Cli) -> None:
    (cli.folder / "rows.csv").write_text("prompt,fail\na,\nb,boom\n")
    sweep = ("run", "bench.jinja", "--vars", "rows.csv", "--gallery")
    assert cli.within(*sweep).returncode == 1
    [run] = gallery_of(cli)
    assert [(batch.row, bool(batch.error)) for batch in run.batches] == [(0, False), (1, True)]
    (cli.folder / "rows.csv").write_text("prompt,fail\na,\nb,\n")
    assert cli.within(*sweep, "--resume").returncode == 0
    [run] = gallery_of(cli)
    assert [(batch.row, bool(batch.error)) for batch in run.batches] == [(0, False), (1, False)]


@pytest.mark.parametrize("sweep", [(), ("--vars", "rows.csv")])
def test_a_page_that_cannot_be_written_is_told_when_all_was_delivered(
    cli: Cli, sweep: tuple[str, ...]
) -> None:
    (cli.folder / "rows.csv").write_text("prompt\na\n")
    done = cli.with_files_below(5000, "run", "bench.jinja", "--gallery", "--json", *sweep)
    assert (done.returncode, len(cli.saved())) == (1, 1), done.stderr
    *_, end, error = [json.loads(line) for line in done.stdout.splitlines()]
    assert (end["event"], end["delivered"]) == ("end", 1)
    words = "cannot write out/index.html: File too large"
    assert (error["event"], error["message"]) == ("error", words)
    assert done.stderr.splitlines()[-1] == f"error: {words}"
    assert "Traceback" not in done.stderr
    names = {path.name for path in (cli.folder / "out").iterdir()}
    assert {name for name in names if "index" in name} == set()


def test_a_malformed_row_is_shown_beside_the_others(cli: Cli) -> None:
    rows = [{"prompt": "a"}, {"input_images": 5}, {"seconds": float("nan")}, {"prompt": [1]}]
    rows += [{"fail": float("nan")}]
    (cli.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli.within("run", "bench.jinja", "--vars", "rows.jsonl", "--gallery")
    assert (done.returncode, "index.html" in done.stderr) == (1, True)
    [run] = gallery_of(cli)
    assert [(b.row, bool(b.error), bool(b.command)) for b in run.batches] == [
        (0, False, True),
        (1, True, False),
        (2, True, False),
        (3, False, True),
        (4, True, False),
    ]


def test_variables_that_json_does_not_have_are_shown_as_text(tmp_path: Path) -> None:
    nan, day, path = float("nan"), date(2026, 11, 28), Path("a") / "b.png"
    rows: list[Any] = [{"prompt": path}, {"seconds": nan, "fail": [nan, {1: day}]}, "no row"]
    template = WorkflowTemplate(BENCH)
    with DummyWorkflowExecutor() as executor:
        results = list(executor.map_workflows(template, rows, ordered=True))
        page = write_gallery(tmp_path, results, variables={"day": day, "high": -float("inf")})
    found = re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"))
    assert found is not None

    def refuse(word: str) -> None:
        raise AssertionError(f"no browser reads {word}")

    [run] = json.loads(found[1], parse_constant=refuse)
    assert run["variables"] == {"day": "2026-11-28", "high": "-inf"}
    assert [batch["variables"] for batch in run["batches"]] == [
        {"prompt": str(path)},
        {"seconds": "nan", "fail": ["nan", {"1": "2026-11-28"}]},
        {},
    ]
    assert [bool(batch["files"]) for batch in run["batches"]] == [True, False, False]


def test_runs_that_end_at_once_all_have_their_place(tmp_path: Path) -> None:
    ids = [str(number) for number in range(24)]
    start = threading.Barrier(len(ids))

    def write(run_id: str) -> None:
        batch = Batch(0, error="boom")
        start.wait(PATIENCE)
        write_page(tmp_path, Run(run_id, run_id, "now", batches=[batch]))

    with ThreadPoolExecutor(len(ids)) as threads:
        list(threads.map(write, ids))
    assert sorted(run.id for run in read_page(tmp_path)) == sorted(ids)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_somebody_elses_page_is_not_lost(cli: Cli, tmp_path: Path) -> None:
    page = cli.folder / "out" / "index.html"
    page.parent.mkdir()
    page.write_text("<h1>My site</h1>")
    done = cli.within("run", "bench.jinja", "--gallery")
    assert (done.returncode, "is no gallery of comfy-executors" in done.stderr) == (2, True)
    assert (page.read_text(), cli.server.prompts) == ("<h1>My site</h1>", [])
    with DummyWorkflowExecutor() as executor, pytest.raises(OutputFileError, match="no gallery"):
        write_gallery(page.parent, executor.submit_workflow(WorkflowTemplate(BENCH)))
    assert list(page.parent.iterdir()) == [page]


def test_failures_are_named(cli: Cli) -> None:
    failing = ("--num-samples", "3", "--var", "fail=boom", "--ignore-errors", "--gallery")
    assert cli.within("run", "bench.jinja", *failing).returncode == 1
    [run] = gallery_of(cli)
    assert [batch.index for batch in run.failures] == [0, 1, 2]
    assert all("RuntimeError: boom" in batch.error and batch.command for batch in run.failures)
    text = (cli.folder / "out" / "index.html").read_text("utf-8")
    assert text.count("<strong>Batch ") == 3


def test_the_command_of_a_failed_row_asks_for_all_of_it(cli: Cli) -> None:
    row = {"fail": "boom", "num_samples": 5, "seed": 7}
    (cli.folder / "rows.jsonl").write_text(json.dumps(row))
    sweep = ("run", "bench.jinja", "--vars", "rows.jsonl", "--batch-size", "2", "--gallery")
    assert cli.within(*sweep).returncode == 1
    [run] = gallery_of(cli)
    [batch] = run.batches
    assert batch.command.endswith(" --seed 7 --num-samples 5 --batch-size 2")


def test_what_came_before_ctrl_c_is_shown(cli: Cli) -> None:
    arguments = ("run", "bench.jinja", "--num-samples", "2000", "--gallery")
    process = cli.start(*arguments, "--var-json", "seconds=0.05")
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=PATIENCE)
    [run] = gallery_of(cli)
    told = {Path(line).name for line in [first.strip(), *rest.splitlines()]}
    assert told <= {file.path for batch in run.batches for file in batch.files}
    assert all((cli.folder / "out" / name).is_file() for name in told)
    assert process.returncode == 130
