"""The page of `adaattn run --report`, photographed in headless Chromium.

python docs/figures/draw.py report_page
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image
from style import save_image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = (1300, 940)
BUDGETS = ("0.02", "0.1")
"""The earlier run, and the one that is shown beside it."""


def draw_report_page() -> Path:
    """Run the demo's first layer within two budgets, and photograph what compares them."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("report_page: needs Chromium, which draws the page")
    with tempfile.TemporaryDirectory() as folder:
        pages = [Path(folder, f"{budget}.html") for budget in BUDGETS]
        with as_file(files("adaattn_core") / "demo_data/smollm2_layer09.npz") as path:
            layer = Path(shutil.copy(path, Path(folder, "layer09.npz")))
        for number, (budget, page) in enumerate(zip(BUDGETS, pages, strict=True)):
            compared = ["--compare", str(pages[0])] if number else []
            subprocess.run(
                [
                    sys.executable, "-m", "adaattn_core.cli", "run", layer.name, "--backend",
                    "numpy", "--seed", "0", "--budget", budget, "--measure", "--report",
                    str(page), *compared,
                ],
                check=True, stdout=subprocess.DEVNULL, cwd=folder,
            )  # fmt: skip
        shot = Path(folder, "shot.png")
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--user-data-dir={folder}/profile", f"--window-size={SIZE[0]},{SIZE[1]}",
                f"--screenshot={shot}", pages[-1].as_uri(),
            ],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return save_image(Image.open(io.BytesIO(shot.read_bytes())), "report_page")
