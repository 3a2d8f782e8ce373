"""Screenshots of the page into docs/images: python docs/make_images.py RUN_DIR [STEP]   (needs Chromium and its driver).

RUN_DIR is a recorded run, such as `make demo RUN_DIR=runs/demo SEED=0` leaves.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support import expected_conditions as ready
from selenium.webdriver.support.ui import WebDriverWait

IMAGES = Path(__file__).with_name("images")
FLAGS = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking hide-scrollbars"
WIDTH = 1280
SHOTS = {
    "run": ("#/run/0", "light", ".u-over", 1330),
    "step": ("#/run/0/step/{step}", "light", ".step-box", 1500),
    "samples": ("#/run/0/step/{step}/samples?sort=-scores", "light", ".samples-figure", 800),
    "token": ("#/run/0/step/{step}/sample/2/token/30", "light", ".token-formula", 1400),
    "token-dark": ("#/run/0/step/{step}/sample/2/token/30", "dark", ".token-formula", 1400),
}
"""name -> (place, theme, what must be there before the picture is taken, height in pixels)."""


def main(run_dir: str, step: str = "14") -> None:
    IMAGES.mkdir(exist_ok=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "pellucid.cli", "view", run_dir], stdout=subprocess.PIPE, text=True
    )
    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        assert server.stdout is not None
        address = re.search(r"http://\S+", server.stdout.readline())
        assert address, "pellucid view printed no address"
        for name, (place, theme, there, height) in SHOTS.items():
            size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.execute_cdp_cmd(
                "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
            )
            browser.get("about:blank")
            browser.get(address[0] + place.format(step=step))
            WebDriverWait(browser, 20).until(ready.presence_of_element_located((By.CSS_SELECTOR, there)))
            browser.execute_async_script("setTimeout(arguments[0], 500)")  # curves draw themselves after they are there
            browser.save_screenshot(str(IMAGES / f"{name}.png"))
            print(IMAGES / f"{name}.png")
    finally:
        browser.quit()
        server.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
