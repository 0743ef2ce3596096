"""The page of ``show --html`` in a real browser: what is drawn, told, zoomed and filtered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from support.browser import Browser
from support.peers import requires

pytestmark = requires("chromium")
CLUSTER = 65536
SIZE = 64 << 20


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a snapshot's data, a leak at the end of the file."""
    path = tmp_path_factory.mktemp("image") / "<b>&amp;.qcow2"
    with pyvirtio.create_disk(path, SIZE) as disk:
        disk.write(0, b"x" * (SIZE // 2))
        disk.snapshots.create("</script>first")
        disk.write(0, b"y" * CLUSTER * 100)
    with path.open("r+b") as file:
        clusters = path.stat().st_size // CLUSTER
        file.truncate((clusters + 1) * CLUSTER)
        file.seek(2 * CLUSTER + 2 * clusters)
        file.write(b"\0\1")
    return path


def show(image: Path, page: Path) -> Path:
    code = "from pyvirtio.tools.img import main; exit(main())"
    words = ("show", f"--html={page}", str(image))
    subprocess.run([sys.executable, "-c", code, *words], check=True, timeout=100)
    return page


@pytest.fixture(scope="module")
def page(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return show(image, tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Browser]:
    browser.open(page)
    yield browser
    assert not browser.errors


def centre(browser: Browser, element: str) -> tuple[int, int]:
    box = browser.run(f"{element}.getBoundingClientRect().toJSON()")
    return int(box["x"] + box["width"] / 2), int(box["y"] + box["height"] / 2)


def button(kind: str) -> str:
    buttons = "[...document.querySelectorAll('#kinds button')]"
    return f"{buttons}.find(button => button.innerText.startsWith({kind!r}))"


def pixel(browser: Browser, cluster: int) -> list[int]:
    """The colour in the middle of the cell of a cluster."""
    return browser.run(
        f"""(() => {{
        const cell = Math.floor({cluster} / view.per) - view.top, size = view.cell;
        const scale = window.devicePixelRatio;
        const x = (cell % columns() + .6) * size, y = (Math.floor(cell / columns()) + .6) * size;
        return [...canvas.getContext("2d").getImageData(x * scale, y * scale, 1, 1).data];
        }})()"""
    )


def colour(browser: Browser, kind: str) -> list[int]:
    text: str = browser.run(f"image.colours[image.kinds.indexOf({kind!r})]")
    return [*bytes.fromhex(text[1:]), 255]


def view(browser: Browser) -> Any:
    return browser.run("({...view})")


def test_names_are_text_and_no_markup(opened: Browser, image: Path) -> None:
    assert opened.run("document.querySelector('h1').textContent") == str(image)
    assert opened.run("document.title") == str(image)
    assert opened.run(f"!!{button('snapshot </script>first')}")


def test_each_kind_is_listed_with_how_much_there_is(opened: Browser, image: Path) -> None:
    counts = opened.run("image.totals.map(([kind, count]) => count)")
    assert sum(counts) * CLUSTER == image.stat().st_size
    text = opened.run(f"{button('snapshot </script>first')}.innerText")
    assert "100 (6.25 MiB)" in text
    assert "1 (64 KiB)" in opened.run(f"{button('leaked')}.innerText")


def test_cells_have_the_colours_of_their_clusters(opened: Browser, image: Path) -> None:
    last = image.stat().st_size // CLUSTER - 1
    assert pixel(opened, 0) == colour(opened, "header")
    assert pixel(opened, last) == colour(opened, "leaked")
    with pyvirtio.open_disk(image, read_only=True) as disk:
        data = disk.block_status(SIZE // 4, 1).host_offset
    assert data is not None
    assert pixel(opened, data // CLUSTER) == colour(opened, "data")


def test_pointing_at_a_cell_tells_of_it(opened: Browser) -> None:
    x, y = opened.run("(b => [b.x, b.y])(canvas.getBoundingClientRect())")
    opened.mouse("mouseMoved", x + 5, y + 5)
    told = opened.run("byId('told').textContent")
    assert told.splitlines()[:2] == ["cluster 0 at 0x0", "header"]


def test_the_wheel_zooms_in_and_out(opened: Browser) -> None:
    x, y = centre(opened, "canvas")
    before = view(opened)
    for _ in range(3):
        opened.mouse("mouseWheel", x, y, deltaX=0, deltaY=-100)
    assert view(opened)["cell"] > before["cell"]
    for _ in range(3):
        opened.mouse("mouseWheel", x, y, deltaX=0, deltaY=100)
    assert view(opened) == before


def test_a_click_hides_a_kind_and_shows_it_again(opened: Browser) -> None:
    place = centre(opened, button("header"))
    opened.click(*place)
    assert pixel(opened, 0) != colour(opened, "header")
    assert opened.run(f"{button('header')}.className") == "off"
    opened.click(*place)
    assert pixel(opened, 0) == colour(opened, "header")


def test_a_click_with_shift_shows_a_kind_alone_and_then_all(opened: Browser, image: Path) -> None:
    last = image.stat().st_size // CLUSTER - 1
    place = centre(opened, button("leaked"))
    opened.click(*place, shift=True)
    assert pixel(opened, 0) != colour(opened, "header")
    assert pixel(opened, last) == colour(opened, "leaked")
    opened.click(*place, shift=True)
    assert pixel(opened, 0) == colour(opened, "header")


def test_keys_and_the_bar_move(opened: Browser) -> None:
    opened.run("(canvas.focus(), zoom(1), zoom(1), zoom(1), zoom(1), 0)")
    opened.call("Input.dispatchKeyEvent", type="keyDown", key="Home")
    assert view(opened)["top"] == 0
    opened.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowDown")
    assert view(opened)["top"] == opened.run("columns()")
    opened.click(*centre(opened, "bar"))
    middle = view(opened)["top"] + opened.run("columns() * rows() / 2")
    assert abs(middle - opened.run("total") / 2) <= 2 * opened.run("columns()")


def test_a_terabyte_is_a_small_page_that_goes_down_to_the_cluster(
    browser: Browser, tmp_path: Path
) -> None:
    image = tmp_path / "large.qcow2"
    options = {"preallocation": "metadata", "cluster_size": 2 << 20}
    pyvirtio.create_disk(image, 1 << 40, **options).close()
    page = show(image, tmp_path / "page.html")
    assert page.stat().st_size < 100_000
    browser.open(page)
    assert browser.run("view.per") > 1
    assert browser.run("Math.ceil(cells() / columns()) < rows()")
    x, y = centre(browser, "canvas")
    browser.run("(zoom(1), zoom(1), zoom(1), goTo(total / 2))")
    under = f"cellUnder({{clientX: {x}, clientY: {y}}}) * view.per"
    cluster = browser.run(under)
    for _ in range(2):  # the cluster stays in the row that the pointer is in
        browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-100)
        row = browser.run(f"Math.floor((Math.floor({cluster} / view.per) - view.top) / columns())")
        box = browser.run("canvas.getBoundingClientRect().toJSON()")
        assert row == (y - box["y"]) // browser.run("view.cell")
        cluster = browser.run(under)
    browser.run("(() => { while (view.per > 1) zoom(1); })()")
    browser.run("goTo(total - 1)")
    last = browser.run("view.top + columns() * rows()")
    assert last >= browser.run("total")
    assert not browser.errors
