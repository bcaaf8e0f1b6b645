"""The report's files from synthetic runs, and the page in a real browser where there is one."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import saved_runs

from nsa_sel.bench.report import command as report_command
from nsa_sel.bench.report import tables as report_tables
from nsa_sel.bench.saved import run as runs
from nsa_sel.bench.saved.run import Saved
from nsa_sel.bench.suite import cases
from nsa_sel.config import SelConfig

EVIL = 'rows-<script>alert("x")</script>|$x^2$&amp;'
HOT = [c for c in cases.matrix("full") if c.hot or c.family == "prefill"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DEFAULTS = SelConfig()


@pytest.fixture(scope="module")
def gpu_report(tmp_path_factory) -> Path:
    """Return the folder of a report made by the command, from a whole matrix against a baseline."""
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    folder = tmp_path_factory.mktemp("report")
    whole = cases.matrix("full")
    slower = {c.id for c in whole if c.family == "ragged"}
    old = saved_runs.save(saved_runs.run(whole), folder / "0001_old.json")
    data = saved_runs.run(whole, lambda c, kind: 1.0 if (c.family, c.L) == ("rows", 16) else 3.0)
    for entry in data["benchmarks"]:
        if entry["extra_info"]["case"] in slower and entry["extra_info"]["method"] == "triton":
            for name in ("median", "q1", "q3"):
                entry["stats"][name] *= 1.5
    new = saved_runs.save(data, folder / "0002_new.json")
    assert report_command.main([str(old), str(new), "--out", str(folder / "out")]) == 0
    return folder / "out"


def write(tmp_path: Path, data: dict, config: SelConfig = DEFAULTS) -> Path:
    path = saved_runs.save(data, tmp_path / "0001_run.json")
    report_command.write(path, None, tmp_path / "out", config)
    return tmp_path / "out"


def renamed(data: dict, name: str) -> dict:
    """Give the first case of a run another name."""
    first = data["benchmarks"][0]["extra_info"]["case"]
    for entry in data["benchmarks"]:
        if entry["extra_info"]["case"] == first:
            entry["extra_info"] |= {"case": name, "layout": name, "config": name, "gpu_id": name}
    return data


class Page(HTMLParser):
    """Collect what a browser would run, fetch and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_command_writes_four_files(gpu_report):
    assert sorted(p.name for p in gpu_report.iterdir()) == ["report.html", "results.csv", "results.md", "speedup.svg"]


def test_the_page_is_self_contained_and_says_the_verdict_first(gpu_report):
    page = Page((gpu_report / "report.html").read_text())
    assert page.sources and all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert page.tags.count("script") == 1 and "link" not in page.tags
    verdict = f"On {saved_runs.GPU}, Triton is safe to switch on from L = 32"
    assert verdict in page.text
    assert page.text.index(verdict) < page.text.index("From which length on")


def test_the_page_holds_every_section(gpu_report):
    page = Page((gpu_report / "report.html").read_text())
    for title in (
        "From which length on",
        "Speed-up against length",
        "Time against bytes",
        "Decode",
        "Prefill",
        "Summary",
        "What changed since the baseline",
        "Environment",
        "All configurations",
    ):
        assert title in page.text
    assert page.tags.count("img") == 4
    assert "verdict: FAIL, 9 slower" in page.text
    assert re.search(r"ragged-bf16-\S+ triton .*\+50\.0 %", page.text)
    for value in (*saved_runs.IDENTITY.values(), "device: 2.8, graph: 1.1", "540 MB: 121.0"):
        assert value in page.text


def test_the_csv_holds_a_line_per_configuration(gpu_report):
    with (gpu_report / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(c.methods) for c in cases.matrix("full"))
    line = next(x for x in lines if x["case"] == "rows-bf16-H8-D128-Dv128-L512-N1024-many" and x["method"] == "triton")
    assert float(line["speedup"]) == pytest.approx(3.0, rel=1e-4)  # over the faster form, not over the eager one
    assert float(line["ci_low_ms"]) < float(line["ms"]) < float(line["ci_high_ms"])
    eager = next(x for x in lines if x["case"] == line["case"] and x["method"] == "packed_sdpa")
    assert float(eager["speedup"]) == pytest.approx(1 / 1.4, rel=1e-4)


def test_the_markdown_holds_the_same_lines(gpu_report):
    text = (gpu_report / "results.md").read_text()
    table = text.split("## All")[1]
    assert table.count("\n| ") == 1 + sum(len(c.methods) for c in cases.matrix("full"))
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {len(report_tables.COLUMNS) + 1}


def test_core_and_op_speedups_are_not_mixed():
    case = HOT[0]
    rows = {r["method"]: r for r in report_tables.table(saved_of(saved_runs.run([case])))}
    assert rows["triton"]["speedup"] == pytest.approx(3.0)
    assert rows["triton_core"]["speedup"] == pytest.approx(1.3)


def saved_of(data: dict) -> Saved:
    run = runs.from_entries("a/b.json", data["benchmarks"], data["machine_info"])
    extras = {(e["extra_info"]["case"], e["extra_info"]["method"]): e["extra_info"] for e in data["benchmarks"]}
    return Saved(run, extras, data["machine_info"], "", {})


def test_names_in_a_run_are_data(tmp_path):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    out = write(tmp_path, renamed(saved_runs.run(HOT), EVIL))
    text = (out / "report.html").read_text()
    assert EVIL not in text
    page = Page(text)
    assert page.tags.count("script") == 1
    assert EVIL in page.text  # shown as it is
    assert "<script" not in (out / "results.md").read_text()
    assert "<script" not in (out / "speedup.svg").read_text()
    with (out / "results.csv").open(newline="") as file:
        assert EVIL in {line["case"] for line in csv.DictReader(file)}


def test_numbers_that_are_none_are_left_out(tmp_path):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    data = saved_runs.run(HOT)
    data["benchmarks"][0]["extra_info"] |= {"L": "<b>", "N": None, "bytes": -1, "gbps": float("nan"), "family": ["x"]}
    data["machine_info"]["calibration"]["read_limit_us"] = ["<i>", [1], [2.0, "x"]]
    text = (write(tmp_path, data) / "report.html").read_text()
    assert "<b>" not in text and "<i>" not in text


def test_a_cpu_run_renders_and_says_that_it_has_no_gpu_figures(tmp_path):
    out = write(tmp_path, saved_runs.cpu_run(cases.matrix("smoke")))
    page = Page((out / "report.html").read_text())
    assert report_command.NO_GPU in page.text
    assert "Wall-clock time" in page.text and "img" not in page.tags
    assert report_command.NO_GPU in (out / "results.md").read_text()
    assert not (out / "speedup.svg").exists()


def test_a_hot_run_renders_without_a_verdict(tmp_path):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    page = Page((write(tmp_path, saved_runs.run([c for c in HOT if c.hot])) / "report.html").read_text())
    assert "support no threshold" in page.text
    assert "No such case with a time of the kernel in this run." in page.text  # no prefill
    assert page.tags.count("img") == 3


def test_the_page_names_opponents_and_what_was_not_judged(tmp_path):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    whole = cases.matrix("full")
    large = next(c for c in whole if c.family == "prefill")
    reasons = {(large.id, method): "needs <30> GB" for method in large.methods}
    folder = write(tmp_path, saved_runs.run(whole, not_timed=reasons))
    page, hot = Page((folder / "report.html").read_text()), sum(c.hot for c in whole)
    said = f"The opponent was packed SDPA with fused packing in {len(whole) - hot - 1} cases, compiled in {hot}."
    for text in (page.text, (folder / "results.md").read_text()):
        assert f"{said} Not judged, because no SDPA form ran: 1 case." in text
    rows = [case for case in whole if case.family in ("rows", "ragged")]
    compiled = sum(case.hot for case in rows)
    assert f"packed_sdpa_fused {len(rows) - compiled}, packed_sdpa_compiled {compiled}" in page.text
    assert re.search(rf"not judged\s*why\s*{large.id}\s*needs <30> GB", page.text)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    data = saved_runs.run(HOT)
    first = {p.name: p.read_bytes() for p in write(tmp_path, data).iterdir()}
    assert {p.name: p.read_bytes() for p in write(tmp_path, data).iterdir()} == first


@pytest.mark.parametrize("entry, said", [(96, "on from L = 96"), (None, "says never")])
def test_the_configured_threshold_is_shown(entry, said):
    config = SelConfig(sel_triton_min_L={"default": 64, saved_runs.GPU: entry})
    _, decided = report_command.judge(saved_of(saved_runs.run(HOT)))
    value, source = report_command.chosen_length(saved_runs.GPU, decided, config)
    assert value == entry and said in source


def test_a_damaged_run_ends_in_one_line_and_exit_code_2(tmp_path, capsys):
    path = tmp_path / "0001_broken.json"
    path.write_text('{"benchmarks": [')
    assert report_command.main([str(path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "0001_broken.json" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_works_in_a_browser(gpu_report, tmp_path):
    """Let the page's own script filter and sort, and read back what it made of it."""
    text = (gpu_report / "report.html").read_text()
    # A second page, without the policy that would forbid this test's script.
    text = re.sub(r"<meta http-equiv.*>", "", text)
    steps = """<script>addEventListener("load", () => {
      const filterBox = document.getElementById("filter");
      filterBox.value = "L512 prefill core"; filterBox.dispatchEvent(new Event("input"));
      document.querySelectorAll("#all th")[3].click();
      const left = [...document.querySelectorAll("#all tbody tr")].filter(row => !row.hidden);
      document.title = JSON.stringify([left.map(row => Number(row.cells[3].textContent)),
        document.documentElement.scrollWidth <= innerWidth,
        [...document.images].map(image => image.naturalWidth > 0)]);
    })</script>"""
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", f"{steps}</body>"))
    said = browse(tmp_path, page)
    title = re.search(r"<title>(.*?)</title>", said.stdout)
    assert title
    times, fits, drawn = json.loads(title[1])
    assert len(times) == 2 * sum(c.family == "prefill" and c.L == 512 for c in cases.matrix("full"))
    assert times == sorted(times)
    assert fits and drawn == [True] * 4


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_has_no_console_message(gpu_report, tmp_path):
    assert "CONSOLE" not in browse(tmp_path, gpu_report / "report.html").stderr


def browse(folder: Path, page: Path) -> subprocess.CompletedProcess[str]:
    """Open a page headless and return the DOM that its script left (stdout) and the browser's log (stderr)."""
    assert BROWSER is not None
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    more = f"--disable-component-update --user-data-dir={folder / 'profile'} --enable-logging=stderr --dump-dom"
    command = [BROWSER, *options.split(), *more.split(), page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
