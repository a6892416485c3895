"""The page in a real browser: pictures appear one by one, and text stays text."""

import shutil

import pytest
from pictures import comfy
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from comfy_executors.devserver import DevServer

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">{{ 7 * 7 }}"

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver (Debian: chromium-driver)"
)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1000,760"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def visit(browser, live_server, settings):
    """Open the page of a site that knows a ComfyUI."""

    def open_page(comfyui):
        settings.COMFY_SERVER = comfyui.address
        browser.get(live_server.url)
        return browser

    yield open_page
    browser.get("about:blank")
    comfy.close()


def fill(browser, prompt, number):
    for name, value in (("prompt", prompt), ("num_samples", number), ("steps", 4)):
        field = browser.find_element(By.NAME, name)
        field.clear()
        field.send_keys(str(value))
    browser.find_element(By.TAG_NAME, "button").click()


def pictures(browser):
    return browser.find_elements(By.CSS_SELECTOR, "#pictures img")


def statuses(server):
    return [prompt.status for prompt in server.prompts]


def wait(browser, condition):
    return WebDriverWait(browser, 60).until(lambda _: condition())


def test_pictures_appear_as_they_finish(visit):
    with DevServer(step_seconds=0.1) as comfyui:
        browser = visit(comfyui)
        fill(browser, HOSTILE, 6)
        wait(browser, lambda: 2 <= len(pictures(browser)) < 6)
        wait(browser, lambda: len(pictures(browser)) == 6)
        assert {image.get_attribute("alt") for image in pictures(browser)} == {HOSTILE}
        sizes = [image.get_property("naturalWidth") for image in pictures(browser)]
        assert sizes == [512] * 6
        assert browser.find_element(By.ID, "status").text == "6 pictures"
        assert browser.title == "Studio"
        texts = {prompt.graph["6"]["inputs"]["text"] for prompt in comfyui.prompts}
        assert texts == {HOSTILE}


def test_leaving_the_page_cancels_its_run(visit):
    with DevServer(step_seconds=5.0) as comfyui:
        browser = visit(comfyui)
        fill(browser, "a fox", 1)
        comfyui.wait_for(lambda server: statuses(server) == ["running"], 30)
        browser.get("about:blank")
        comfyui.wait_for(lambda server: statuses(server) == ["interrupted"], 30)


def test_an_error_is_told_on_the_page(visit):
    with DevServer(checkpoints=["other.safetensors"]) as comfyui:
        browser = visit(comfyui)
        fill(browser, "a fox", 1)
        status = browser.find_element(By.ID, "status")
        wait(browser, lambda: "not set up correctly" in status.text)
        assert pictures(browser) == []
