"""The order rule against other Pillows than the installed one, each fetched by pip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import HANGS_AFTER_S

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import sys
import numpy as np, PIL, torch
from PIL import Image
from step37_kernels.pixels import reference as reference_pixels
from step37_kernels.pixels import pillow as resample
from step37_kernels.pixels.resize import resize_clip_normalize

assert PIL.__version__ == sys.argv[1], PIL.__version__
order = tuple(int(n) for n in PIL.__version__.split(".")[:2])
assert resample.installed_pillow() == order
rng = np.random.default_rng(0)
shapes = [(60, 20), (20, 60), (201, 2), (200, 2), (203, 2), (2, 203), (500, 3), (17, 16), (33, 16)]
shapes += [tuple(int(round(e)) for e in np.exp(rng.uniform(0, 6, 2))) for _ in range(120)]
vertical = 0
for height, width in shapes:
    size = int(rng.integers(1, 60))
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
    expected = reference_pixels.clip_normalize(torch.from_numpy(resized)[None])
    got = resize_clip_normalize([torch.from_numpy(image)], size)
    assert torch.equal(got, expected), (height, width, size)
    vertical += reference_pixels.passes_of((height, width), (size, size), order) == (0, 1)
print(vertical)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "turns_round"),
    [("11.3.0", False), ("12.1.1", False), ("12.2.0", True), ("12.3.0", True), ("13.0.0", True)],
)
def test_the_rule_follows_whichever_pillow_is_installed(version, turns_round, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    fetched = subprocess.run(
        [*pip, "--target", str(tmp_path), f"pillow=={version}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_AFTER_S,
    )
    if fetched.returncode != 0:
        pytest.skip(f"pip cannot install pillow=={version}: {fetched.stderr.strip()[-200:]}")
    paths = [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, version],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    vertical_first = int(done.stdout)
    assert (vertical_first > 0) == turns_round
