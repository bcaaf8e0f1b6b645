"""The report's page in a headless browser, driven by the events that a person's mouse and keyboard make."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import saved_runs

from nsa_sel.bench.report import command as report_command
from nsa_sel.bench.report import pictures
from nsa_sel.bench.suite import cases
from nsa_sel.config import SelConfig

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine to open the page with")
pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")

CASES = [c for c in cases.matrix("full") if c.family != "rows" or (c.H == 8 and c.L in (64, 512))]
EVIL = "rows-</script><img src=x onerror=\"document.title='ran'\">"
# For steps: `pictures(name)` are the drawn panels of a picture, `choose` sets a filter, `mouse` goes to a point.
TOOLS = """
const panels = [...document.querySelectorAll(".panel > div")];
const drawnFirst = panels.filter(panel => echarts.getInstanceByDom(panel)).length;
dispatchEvent(new Event("beforeprint")); // draws what is not near the window
const pictures = name => [...document.querySelectorAll(`[data-picture=${name}] .panel > div`)];
const chartOf = panel => echarts.getInstanceByDom(panel);
const points = panel => chartOf(panel).getOption().series.flatMap(one => one.data);
const choose = (name, value) => {
  const select = document.getElementById(`choose-${name}`);
  select.value = value;
  select.dispatchEvent(new Event("change"));
  dispatchEvent(new Event("beforeprint"));
};
const mouse = (panel, seriesIndex, value, ...kinds) => {
  const [x, y] = chartOf(panel).convertToPixel({ seriesIndex }, value), box = panel.getBoundingClientRect();
  for (const kind of kinds) panel.querySelector("canvas").dispatchEvent(
    new MouseEvent(kind, { clientX: box.x + x, clientY: box.y + y, bubbles: true, view: window }));
};
const left = () => [...document.querySelectorAll("#all tbody tr")].filter(row => !row.hidden);
const text = row => [...row.cells].map(cell => cell.textContent);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Return the page of a run in which ragged rows got slower, after a baseline and a run of another card."""
    folder = tmp_path_factory.mktemp("page")
    other = saved_runs.run(
        CASES, 2.0, when="2026-11-17T10:00:00+00:00", identity={**saved_runs.IDENTITY, "gpu_id": "b"}
    )
    old = saved_runs.run(CASES, when="2026-11-18T10:00:00+00:00")
    data = saved_runs.run(CASES, lambda case, kind: 2.5 if kind == "call" else 3.0)
    for entry in data["benchmarks"]:
        extra = entry["extra_info"]
        if (extra["family"], extra["method"]) == ("ragged", "triton"):
            entry["stats"] |= {name: entry["stats"][name] * 1.5 for name in ("median", "q1", "q3")}
        if extra["case"] == CASES[0].id:
            extra["case"] = EVIL
    for case in CASES:
        if case.family == "prefill":
            beside = saved_runs.entry_of(case, "dense", {"device": 900.0}, 0.01, saved_runs.IDENTITY)
            data["benchmarks"].append(beside)
    data["commit_info"]["id"] = EVIL
    storage = folder / "storage"
    files = [
        saved_runs.save(run, storage / f"machine-NVIDIA-Synthetic/000{number}_run.json")
        for number, run in enumerate((other, old, data), 1)
    ]
    report_command.write(files[2], files[1], folder / "out", SelConfig(), storage)
    return folder / "out/report.html"


def do(page: Path, folder: Path, steps: str, *options: str, width: int = 1400) -> Any:
    """Let the page's own window run `steps` after it was loaded, and return what they return.

    The page is in a frame, as no window is narrower than 500 pixels.
    """
    text = re.sub(r"<meta http-equiv.*>", "", page.read_text())  # the policy forbids this script
    script = f"addEventListener('load', () => {{ {TOOLS} parent.postMessage((() => {{ {steps} }})(), '*'); }});"
    head, _, tail = text.rpartition("</body>")
    (folder / "driven.html").write_text(f"{head}<script>{script}</script></body>{tail}")
    outer = folder / "frame.html"
    outer.write_text(f"""<script>onmessage = event => {{ document.body.append(JSON.stringify(event.data)); }}</script>
        <body><iframe src="driven.html" width="{width}" height="900"></iframe></body>""")
    said = browse(folder, outer, *options)
    assert "CONSOLE" not in said.stderr, [line for line in said.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(said.stdout.rpartition("</iframe>")[2].partition("</body>")[0]))


def browse(folder: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page headless and return the DOM that its script left (stdout) and the browser's log (stderr)."""
    assert BROWSER is not None
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    more = f"--disable-component-update --user-data-dir={folder / 'profile'} --enable-logging=stderr --dump-dom"
    command = [
        BROWSER,
        *quiet.split(),
        *more.split(),
        "--window-size=1500,1000",
        "--virtual-time-budget=10000",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_the_page_has_no_console_message(page, tmp_path):
    assert "CONSOLE" not in browse(tmp_path, page).stderr


def test_no_script_but_the_pages_own_runs(page, tmp_path):
    head, _, tail = page.read_text().rpartition("</body>")
    (copy := tmp_path / "page.html").write_text(f"{head}<script>document.title = 'ran'</script></body>{tail}")
    said = browse(tmp_path, copy)
    assert "<title>ran</title>" not in said.stdout and "violates" in said.stderr


def test_every_picture_is_drawn_and_the_page_is_as_wide_as_the_window(page, tmp_path):
    steps = """return [[...document.querySelectorAll("[data-picture]")].map(picture => [picture.dataset.picture,
      pictures(picture.dataset.picture).map(points).map(found => found.filter(Boolean).length)]),
      document.documentElement.scrollWidth, innerWidth, document.images.length, document.title]"""
    for width, dark in ((1400, False), (420, True)):
        colours = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        drawn, wide, window, images, title = do(page, tmp_path, steps, colours, width=width)
        assert [name for name, _ in drawn] == ["heat", "speedup", "bytes", "decode", "prefill", "history", "changes"]
        assert all(panels and all(panels) for _, panels in drawn)
        assert wide <= window == width
        assert images == 0 and title != "ran"


def test_the_picture_of_shared_tiles_has_both_kernels_and_the_choice(tmp_path):
    sweep = [case for case in cases.matrix("full", family="shared") if case.layout.startswith("kept") and case.H == 16]
    data = saved_runs.run([case for case in cases.matrix("full") if case.family == "prefill"])
    for union, case in enumerate(sweep, 16):
        made = saved_runs.entry_of(case, "triton", {"device": 10.0 * union}, 0.01, saved_runs.IDENTITY)
        made["extra_info"] |= {"shared": 0.5, "union": union, "rows_us": 500.0, "tiles_us": 11.0 * union}
        data["benchmarks"].append(made)
    storage = tmp_path / "storage/machine-NVIDIA-Synthetic/0001_run.json"
    report_command.write(saved_runs.save(data, storage), None, tmp_path / "out", SelConfig())
    steps = """return pictures("sharing").map(panel => chartOf(panel).getOption().series.map(one =>
      [one.name, one.data.map(found => found.value)]))"""
    (panel,) = do(tmp_path / "out/report.html", tmp_path, steps)
    assert dict(panel) == {
        name: [[union, us(union)] for union in range(16, 16 + len(sweep))]
        for name, us in (
            ("row kernel", lambda union: 500),
            ("shared", lambda union: 11 * union),
            ("Triton", lambda union: 10 * union),
        )
    }


def test_the_colours_follow_the_readers_choice(page, tmp_path):
    steps = """return [getComputedStyle(document.body).backgroundColor,
      chartOf(pictures("bytes")[0]).getOption().title[0].textStyle.color]"""
    light = do(page, tmp_path, steps, "--blink-settings=preferredColorScheme=1")
    dark = do(page, tmp_path, steps, "--blink-settings=preferredColorScheme=0")
    assert light == ["rgb(255, 255, 255)", "#1b1b1b"] and dark == ["rgb(21, 24, 27)", "#e4e6e8"]


def test_filters_choose_rows_and_points(page, tmp_path):
    steps = """choose("family", "decode"); choose("L", "512"); choose("N", "32"); choose("method", "triton");
      return [left().map(row => text(row).slice(0, 2)), ["heat", "speedup", "bytes", "decode", "prefill"].map(name =>
        pictures(name).map(points).map(found => found.length)),
        document.querySelector("[data-picture=prefill] .nothing").hidden, shown.textContent]"""
    named, (heat, speedup, of_bytes, decode, prefill), hidden, said = do(page, tmp_path, steps)
    wanted = [c for c in CASES if (c.family, c.L, c.N) == ("decode", 512, 32)]
    layouts = len({c.layout for c in wanted})
    assert sorted(named) == sorted([c.id, "triton"] for c in wanted) and said.startswith(f"{len(wanted)} of ")
    assert len(heat) == layouts and sum(heat) == len({(c.layout, c.H, c.D, c.Dv) for c in wanted})
    assert sum(speedup) == layouts + len(wanted)  # a point of each line, and every case
    assert sum(of_bytes) == len(wanted) + len(saved_runs.READ_LIMIT_US)
    assert (decode, prefill, hidden) == ([1], [], False)


def test_what_is_far_from_the_window_is_drawn_later(page, tmp_path):
    first, panels = do(page, tmp_path, "return [drawnFirst, panels.length]")
    assert first < panels / 2


def test_words_filter_the_table_and_a_click_on_a_heading_sorts_it(page, tmp_path):
    steps = """filter.value = "L512 prefill core"; filter.dispatchEvent(new Event("input"));
      document.querySelectorAll("#all th")[3].click();
      return left().map(row => Number(text(row)[3]))"""
    times = do(page, tmp_path, steps)
    assert len(times) == 2 * sum(c.family == "prefill" and c.L == 512 for c in CASES)
    assert times == sorted(times)


def test_another_time_gives_other_speedups(page, tmp_path):
    steps = """const before = points(pictures("heat")[0])[0].value; choose("time", "call");
      return [before, points(pictures("heat")[0])[0].value]"""
    device, call = do(page, tmp_path, steps)
    assert (
        device[:2] == call[:2] and device[2] == pytest.approx(3.0, rel=1e-3) and call[2] == pytest.approx(2.5, rel=1e-3)
    )


def test_hovering_names_the_case_and_a_click_finds_its_row(page, tmp_path):
    steps = """return [
        ["heat", p => p.said()[0].includes("L64-N256")],
        ["heat", p => p.said()[0].includes("onerror")],
        ["speedup", p => p.value[0] === 512],
        ["bytes", p => p.said?.()[0].startsWith("long")],
        ["prefill", p => p.said()[1] === "dense SDPA"],
        ["changes", p => p.said().at(-1).endsWith("slower")],
      ].map(([picture, wanted]) => {
        const panel = pictures(picture)[0], series = chartOf(panel).getOption().series;
        const at = series.findIndex(one => one.data.some(wanted)), point = series[at].data.find(wanted);
        mouse(panel, at, point.value, "mousemove");
        const said = [...panel.children].map(box => box.innerText).join("").trim().split("\\n");
        filter.value = "nothing of it"; filter.dispatchEvent(new Event("input"));
        mouse(panel, at, point.value, "mousedown", "mouseup", "click");
        const found = document.querySelector("#all tr.found");
        return [said, text(found), found.hidden];
      })"""
    pointed = do(page, tmp_path, steps)
    names = "rows-bf16-.*-L64-N256-few", re.escape(EVIL), "rows-bf16-.*-L512-.*", "long-.*", "prefill-.*", "ragged-.*"
    for name, (said, row, hidden) in zip(names, pointed, strict=True):
        assert re.fullmatch(name, said[0]) and row[0] == said[0] and not hidden
        assert said[1] == pictures.LABELS.get(row[1]), (said, row)
        assert any(line.startswith("device time: ") for line in said) or said[-1].endswith("slower")


def test_the_history_says_run_commit_and_card(page, tmp_path):
    steps = """const [speedup, time] = pictures("history");
      mouse(speedup, 0, chartOf(speedup).getOption().series[0].data[0].value, "mousemove");
      return [[speedup, time].map(panel => chartOf(panel).getOption().series[0].data.map(point => point.value[1])),
        [...speedup.children].map(box => box.innerText).join("").trim()]"""
    (speedups, times), said = do(page, tmp_path, steps)
    assert speedups == pytest.approx([2.0, 3.0, 3.0], rel=1e-3) and times == pytest.approx([1.0] * 3, rel=1e-3)
    assert "0001_run.json, 2026-11-17T10:00" in said and "commit c0ffee0123" in said and "card b" in said
