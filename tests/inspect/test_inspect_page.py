"""The page of a data set is one file, and a browser shows one pack of it at a time."""

from __future__ import annotations

import html.parser
import io
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import step37_kernels
from step37_inspect.cli import main
from tests.inspect.browser import CHROMEDRIVER, CHROMIUM, MISSING, Window, browser
from tests.limits import HANGS_AFTER_S

pytest.importorskip("matplotlib", reason="pictures need the extra plots")

EXAMPLES = Path(__file__).parents[2] / "examples"
BROWSER = CHROMIUM


class Outline(html.parser.HTMLParser):
    """Collects elements that are not closed, packs, cells, and everything that is fetched."""

    VOID = frozenset({"meta", "img", "br", "source"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.packs: list[str] = []
        self.sources: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.packs.append(given["id"] or "")
        if tag == "td":
            self.cells.append("")
        self.sources += [given[name] or "" for name in ("src", "href") if name in given]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["td"]:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def folder_of_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight samples, one picture broken, one caption that looks like markup; and one too long.

    The picture of the last has to be turned. A row without a caption follows.
    """
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(EXAMPLES / "flickr8k_mini" / "train", folder / "data" / "train")
    metadata = folder / "data" / "train" / "metadata.csv"
    text = metadata.read_text(encoding="utf-8")
    metadata.write_text(text.replace("A tabby cat", "A <b>tabby</b> & cat"), encoding="utf-8")
    (folder / "data" / "train" / "rocket.jpg").write_bytes(b"no picture")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "data" / "train" / "turned.jpg", exif=exif)
    with metadata.open("a", encoding="utf-8") as file:
        file.write(f"turned.jpg,A {'long ' * 300} one.\nturned.jpg,\n")
    return folder / "data"


@pytest.fixture(scope="module")
def page(folder_of_page: Path) -> Path:
    """The page of it, in packs of two samples."""
    out = folder_of_page.parent / "made" / "page.html"
    arguments = ["--tokenizer", str(EXAMPLES / "tokenizer"), "--quiet", "--max-length", "450"]
    arguments += ["--sampling", "sequential", "--html", str(out), "--html-packs", "3"]
    assert main(["inspect", str(folder_of_page), *arguments]) == 0
    return out


def test_the_page_is_well_formed_and_fetches_nothing(page: Path) -> None:
    outline = Outline()
    text = page.read_text(encoding="utf-8")
    outline.feed(text)
    outline.close()
    assert outline.open == []
    assert outline.packs == ["pack-0", "pack-1", "pack-2"]
    # The data set's picture and one of each pack, all of them inside.
    assert len(outline.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in outline.sources)
    assert "http://" not in text
    assert "https://" not in text
    assert any("A <b>tabby</b> & cat" in cell for cell in outline.cells)
    assert any(cell.startswith("UnidentifiedImageError") for cell in outline.cells)
    assert outline.cells[:2] == ["next_fit", "4"]


def test_the_page_tells_how_it_was_made_and_what_was_left_out(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    told = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert told["version"] == f"step37 {step37_kernels.__version__}"
    assert re.fullmatch(r"\d\d \w+ 20\d\d, \d\d:\d\d UTC", told["date"])
    assert told["tokenizer"] == str(EXAMPLES / "tokenizer")
    assert told["packs"] == "450 tokens, padded to a multiple of 64"
    assert told["sampling"] == "sequential"
    assert told["packing"] == "next_fit"
    assert told["rows skipped"] == "1, without a file name or a caption"
    assert told["longer than a pack"].startswith("1 of 9 samples have more than 450 tokens")
    assert "turned by EXIF" in text


def test_every_title_stands_once_and_as_text(page: Path) -> None:
    text = re.sub(r'(src|alt)="[^"]*"', "", page.read_text(encoding="utf-8"))
    name = re.search("<title>(.*)</title>", text)
    assert name is not None
    assert text.count(name[1]) == 2  # the window's title, and the page's
    titles = re.findall("<h[123]>(.*?)</h[123]>", text)
    assert len(titles) == len(set(titles)) > 5


def test_the_page_is_fit_for_the_dark_and_for_a_telephone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "@media (prefers-color-scheme: dark)" in text
    assert "color-scheme: light dark" in text
    style = text[text.index("<style>") : text.index("</style>")]
    # Colours are named once, so that none is forgotten in the dark.
    rules = re.sub(r"--\w+: #\w+;", "", style)
    assert "#" not in rules
    assert "img { max-width: 100%; height: auto;" in style
    # Every table scrolls within a box of its own.
    assert text.count("<table>") == text.count('<div class="wide"><table>') > 3


def test_a_page_of_a_set_that_fits_in_no_pack_says_so(folder_of_page: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["--tokenizer", str(EXAMPLES / "tokenizer"), "--quiet", "--max-length", "99"]
    assert main(["inspect", str(folder_of_page), *arguments, "--html", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "9 of 9 samples have more than 99 tokens: dropped" in text
    assert "0 of 0 packs" in text


def test_a_page_of_one_pack_cannot_be_asked_for(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", "folder", "--tokenizer", "t", "--html", str(page)]
    for other in ("--pack", "--picture"):
        with pytest.raises(SystemExit) as exit_of_usage:
            main([*arguments, other, "1"])
        assert exit_of_usage.value.code == 2
        told = f"argument {other}: not allowed with argument --html"
        assert told in capsys.readouterr().err


def browse(page: Path, *options: str, place: str = "") -> str:
    assert BROWSER is not None
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--window-size=1160,2600",
             "--virtual-time-budget=3000", *options, f"{page.as_uri()}{place}"],
            capture_output=True, text=True, check=True, timeout=HANGS_AFTER_S,
        )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: the page is not looked at")
def test_a_browser_shows_one_pack_and_leafs_to_the_next(page: Path, tmp_path: Path) -> None:
    def shown(place: str, at: Path) -> list[str]:
        dom = browse(at, "--dump-dom", place=place)
        return re.findall(r'<section class="pack" id="([^"]*)">', dom)

    assert shown("", page) == ["pack-0"]
    assert shown("#pack-2", page) == ["pack-2"]
    # As a reader does it: the button, then the key.
    text = page.read_text(encoding="utf-8")
    steps = "document.getElementById('on').click();"
    steps += (
        "setTimeout(() => dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'})), 99);"
    )
    clicked = tmp_path / "clicked.html"
    clicked.write_text(text.replace("</script>", f"{steps}</script>"), encoding="utf-8")
    assert shown("", clicked) == ["pack-2"]
    assert "3 of 3" in browse(clicked, "--dump-dom")


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: the page is not looked at")
def test_a_browser_draws_the_pictures_within_the_width_of_the_page(
    page: Path, tmp_path: Path
) -> None:
    def pixels(source: Path, name: str) -> np.ndarray:
        browse(source, f"--screenshot={tmp_path / name}")
        with Image.open(io.BytesIO((tmp_path / name).read_bytes())) as picture:
            return np.asarray(picture.convert("RGB")).astype(int)

    whole = pixels(page, "whole.png")
    # Blue of the images' rows, amber of what is trained: the pack's picture is drawn.
    for colour in ((86, 180, 233), (240, 192, 90)):
        assert (np.abs(whole - colour).max(-1) <= 2).sum() > 1000
    assert (whole[:, -4:] == 255).all(), "something reaches the right edge"
    measured = tmp_path / "measured.html"
    script = "document.title = document.documentElement.scrollWidth + '/' + innerWidth;</script>"
    text = page.read_text(encoding="utf-8").replace("</script>", script)
    measured.write_text(text, encoding="utf-8")
    title = re.search("<title>(.*)/(.*)</title>", browse(measured, "--dump-dom"))
    assert title is not None
    assert int(title[1]) <= int(title[2])


# What is written in the page, and its contrast to what is behind it as WCAG counts: 1 to 21.
CONTRASTS = """
const channel = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const light = colour => {
  const [red, green, blue] = colour.match(/[\\d.]+/g).map(value => channel(value / 255));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const clear = colour => colour === "rgba(0, 0, 0, 0)";
const paper = element => getComputedStyle(element).backgroundColor;
const behind = element => {
  while (element && clear(paper(element))) element = element.parentElement;
  return element ? paper(element) : "rgb(255, 255, 255)";
};
const written = [...document.body.querySelectorAll("*")].filter(element =>
  element.checkVisibility() && !element.disabled && element.tagName !== "SCRIPT" &&
  [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
return written.map(element => {
  const levels = [getComputedStyle(element).color, behind(element)].map(light);
  const ratio = (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05);
  return [element.textContent.slice(0, 40), ratio];
});
"""
BEYOND = """
return [...document.body.querySelectorAll("*")]
  .filter(element => !element.closest(".wide *"))
  .filter(element => element.getBoundingClientRect().right > innerWidth)
  .map(element => element.outerHTML.slice(0, 60));
"""
PICTURES = """
return [...document.images].filter(image => image.checkVisibility())
  .map(image => [image.complete, image.naturalWidth, image.clientWidth]);
"""


@pytest.fixture(scope="module")
def window() -> Iterator[Window]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip(MISSING)
    with browser() as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1280])
def test_the_page_fits_the_screen_and_can_be_read_in_both_schemes(
    page: Path, window: Window, width: int, scheme: str
) -> None:
    window.show(page, width=width, scheme=scheme)
    assert window.run("return innerWidth") == width
    assert window.run("return document.documentElement.scrollWidth") <= width
    assert window.run(BEYOND) == []
    contrasts = window.run(CONTRASTS)
    assert len(contrasts) > 60
    assert [each for each in contrasts if each[1] < 4.5] == []
    paper = {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}[scheme]
    assert window.run("return getComputedStyle(document.body).backgroundColor") == paper
    pictures = window.run(PICTURES)
    assert len(pictures) == 2  # the data set, and the first pack
    for complete, drawn, shown in pictures:
        assert complete
        # The lettering of a picture keeps its size on a telephone, and two thirds of it elsewhere.
        assert shown >= (0.9 if width == 390 else 0.66) * drawn
