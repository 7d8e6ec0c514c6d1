"""The pictures of the documentation: drawn from what is there, labels legible at any length."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.row_map import CELL_W, draw_row_map
from step37_inspect import style
from step37_kernels import plan_insert
from tests.inspect.test_inspect import check_lettering
from tools.pictures import (
    draw_all,
    draw_architecture,
    draw_demo_row_map,
    draw_step,
    save_for_day_and_night,
)

pytest.importorskip("matplotlib", reason="pictures need the extra plots")

ROOT = Path(__file__).parents[2]


class Words:
    """Names tokens by their number, some of them long."""

    def decode(self, tokens: list[int]) -> str:
        return "<|im_start|>" if tokens[0] == 7 else "wörter$" * (tokens[0] % 3) + "\n"


def test_architecture_step_and_the_row_map_of_the_demo_have_legible_labels() -> None:
    check_lettering(draw_step())
    check_lettering(draw_architecture())
    check_lettering(draw_demo_row_map())


def test_no_label_of_a_row_map_of_2048_positions_is_wider_than_its_cell() -> None:
    tokens = torch.arange(2048) % 5
    starts = torch.arange(9) * 220
    tokens[starts] = 7
    photograph = str(ROOT / "examples" / "flickr8k_mini" / "train" / "coffee.jpg")
    pack = {
        "tokens": tokens,
        "loss_masks": (torch.arange(2048) % 220 > 190).float(),
        "cu_seqlens": torch.tensor([*starts.tolist(), 1980, 2048]),
        "image_paths": [(photograph, 0)] * 9,
    }
    sheet = draw_row_map(pack, plan_insert(tokens[None], [(7, [169] * 9)], impl="torch"), Words())
    style.png_of(sheet)
    wide = CELL_W * style.DPI
    cells = [text for text in sheet.axes[0].texts if text.get_fontsize() == 6.5]
    assert len(cells) == 2048
    shown = [text for text in cells if text.get_text()]
    assert [text.get_text() for text in shown if text.get_text().isdigit()][-1] == "1520"
    assert max(text.get_window_extent().width for text in shown) <= wide - 2


def test_all_pictures_of_the_docs_can_be_drawn_anew(tmp_path: Path) -> None:
    draw_all(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    docs = (ROOT / "docs").iterdir()
    assert drawn == sorted(path.name for path in docs if path.suffix in (".png", ".svg"))
    for name in drawn:
        if name.endswith(".svg"):
            sizes = [re.findall(r'viewBox="[^"]*"', (at / name).read_text(encoding="utf-8"))[0]
                     for at in (tmp_path, ROOT / "docs")]  # fmt: skip
            assert sizes[0] == sizes[1], f"{name} is not what is drawn today: make pictures"
            continue
        with Image.open(tmp_path / name) as new, Image.open(ROOT / "docs" / name) as old:
            assert new.size == old.size, f"{name} is not what is drawn today: make pictures"


def test_a_drawing_for_the_dark_scheme_has_none_of_the_light_ones_colours(tmp_path: Path) -> None:
    save_for_day_and_night(draw_architecture(), tmp_path, "it")
    light, dark = ((tmp_path / f"it-{kind}.svg").read_text("utf-8") for kind in ("light", "dark"))
    assert len(light.splitlines()) == len(dark.splitlines())
    assert "#ffffff" in light
    for color in ("#ffffff", style.INK, "#9fd8c5", "#f6f6f7"):
        assert color not in dark
