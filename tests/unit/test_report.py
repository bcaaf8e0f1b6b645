"""The report's files from synthetic runs; `test_report_page.py` looks at the page in a browser."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import saved_runs

from nsa_sel.bench.report import command as report_command
from nsa_sel.bench.report import page as report_page
from nsa_sel.bench.report import tables as report_tables
from nsa_sel.bench.saved import run as runs
from nsa_sel.bench.saved.run import Saved
from nsa_sel.bench.suite import cases
from nsa_sel.config import SelConfig

EVIL = 'rows-</script><img src=x onerror="alert(1)"><script>alert("x")</script>|$x^2$&amp;'
HOT = [c for c in cases.matrix("full") if c.hot or c.family == "prefill"]
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
        self.pictures: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.pictures += [value or "" for name, value in attrs if name == "data-picture"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_command_writes_four_files(gpu_report):
    assert sorted(p.name for p in gpu_report.iterdir()) == ["report.html", "results.csv", "results.md", "speedup.svg"]


def test_the_page_is_self_contained_and_says_the_verdict_first(gpu_report):
    page = Page((gpu_report / "report.html").read_text())
    assert all(source in ("results.csv", "results.md") or source.startswith("#") for source in page.sources)
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    assert page.tags.count("script") == 3  # the figures, the library, ours
    assert (gpu_report / "report.html").stat().st_size < 4e6
    verdict = f"On {saved_runs.GPU}, Triton is safe to switch on from L = 32"
    assert verdict in page.text
    assert page.text.index("FAIL, 9 slower") < page.text.index(verdict) < page.text.index("From which length on")


@pytest.mark.parametrize("times_old, state", [(1.0, "pass"), (1.5, "fail")])
def test_the_comparison_stands_at_the_top_in_its_colour(tmp_path, times_old, state):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    old, data = (saved_runs.run([c for c in HOT if c.family == "rows"]) for _ in range(2))
    for entry in data["benchmarks"]:
        if entry["extra_info"]["method"] == "triton":
            entry["stats"] |= {name: entry["stats"][name] * times_old for name in ("median", "q1", "q3")}
    files = saved_runs.save(data, tmp_path / "0002_new.json"), saved_runs.save(old, tmp_path / "0001_old.json")
    report_command.write(*files, tmp_path / "out", DEFAULTS)
    first = (tmp_path / "out/report.html").read_text().split("</h1>")[1].strip()
    assert first.startswith(f'<p class="compared {state}">')


def test_the_page_holds_every_section(gpu_report):
    page = Page((gpu_report / "report.html").read_text())
    for title in (
        "From which length on",
        "Speed-up by shape",
        "Speed-up against length",
        "Time against bytes",
        "Decode",
        "Prefill",
        "History",
        "Summary",
        "What changed since the baseline",
        "Environment",
        "All configurations",
    ):
        assert page.text.count(title) >= 2  # in the contents too
    assert page.pictures == ["heat", "speedup", "bytes", "decode", "prefill", "changes"]
    assert "No other saved run of this GPU was found." in page.text
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
    data = renamed(saved_runs.run(HOT), EVIL)
    data["commit_info"]["id"] = data["datetime"] = EVIL
    data[runs.MARK] = {"not_timed": [{"case": HOT[1].id, "method": "dense", "reason": EVIL}]}
    out = write(tmp_path, data)
    page = Page((out / "report.html").read_text())
    assert page.tags.count("script") == 3 and "img" not in page.tags
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
    assert "Wall-clock time" in page.text and not page.pictures
    assert report_command.NO_GPU in (out / "results.md").read_text()
    assert not (out / "speedup.svg").exists()


def test_a_hot_run_renders_without_a_verdict(tmp_path):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    page = Page((write(tmp_path, saved_runs.run([c for c in HOT if c.hot])) / "report.html").read_text())
    assert "support no threshold" in page.text
    assert "No such case with a time of the kernel in this run." in page.text  # no prefill
    assert page.pictures == ["heat", "speedup", "bytes", "decode"]


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


# --- what the pictures are drawn from ---


def figures(text: str) -> dict:
    """Return the figures in a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def stored(folder: Path, number: int, data: dict, commit: str = "c0ffee", **of_entry: str) -> Path:
    """Save a run as the storage's number so and so, a day later each; of_entry: replaces what every entry says."""
    for entry in data["benchmarks"]:
        entry["extra_info"] |= of_entry
    data |= {"datetime": f"2026-11-{number:02}T10:00:00+00:00", "commit_info": {"id": commit, "dirty": False}}
    return saved_runs.save(data, folder / f"machine-NVIDIA-Synthetic/{number:04}_run.json")


def test_the_history_is_of_the_saved_runs_of_one_gpu(tmp_path):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    some = [c for c in HOT if c.hot]
    stored(tmp_path, 1, saved_runs.run(some[:5], 2.0), "0ld", gpu_id="other")
    stored(tmp_path, 2, saved_runs.run(some), gpu="NVIDIA Synthetic!")  # a name of the same folder
    saved_runs.save({}, tmp_path / "machine-NVIDIA-Synthetic/0003_damaged.json")
    path = stored(tmp_path, 4, saved_runs.run(some), "new")
    report_command.write(path, None, tmp_path / "out", DEFAULTS, tmp_path)
    found = figures((tmp_path / "out/report.html").read_text())
    history, rows = found["history"], [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    assert [(run["commit"], run["card"], run["reported"]) for run in history["runs"]] == [
        ("0ld", "other", False),
        ("new", "0f1e2d", True),
    ]
    ours = [i for i, at in enumerate(history["rows"]) if rows[at]["method"] == "triton"]
    by_case = {rows[history["rows"][i]]["case"]: [of_run[i] for of_run in history["speedup"]] for i in ours}
    assert by_case == {case.id: [2.0 if case in some[:5] else None, 3.0] for case in some}
    assert all(history["time"][1][i] == rows[history["rows"][i]]["device_us"] for i in ours)


def test_prefill_stands_beside_dense_sdpa_and_peers_though_another_run_measured_them(tmp_path):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")
    prefill = [c for c in HOT if c.family == "prefill"][:2]
    beside = saved_runs.run(prefill)
    beside["benchmarks"] += [
        saved_runs.entry_of(case, method, {"device": 50.0}, 0.01, saved_runs.IDENTITY)
        for case in prefill
        for method in ("dense", "fla_nsa")
    ]
    with_peers = stored(tmp_path, 1, beside)
    without = stored(tmp_path, 2, saved_runs.run(prefill[:1]))
    for path, lender, cases_lent in ((with_peers, "", []), (without, "0001_run.json (2026-11-01", [prefill[0].id] * 2)):
        report_command.write(path, None, tmp_path / "out", DEFAULTS, tmp_path)
        found = figures((tmp_path / "out/report.html").read_text())
        assert lender in found["lender"] and bool(lender) == bool(found["lender"])
        assert [row[0] for row in found["lent"]] == cases_lent


def test_operations_per_second_are_given_where_rows_share_k_and_v():
    shared, own = (next(c for c in HOT if c.family == family) for family in ("prefill", "rows"))
    data = saved_runs.run([shared, own])
    data["benchmarks"].append(saved_runs.entry_of(shared, "dense", {"device": 50.0}, 0.01, saved_runs.IDENTITY))
    selected = 369 * shared.N  # tokens of all rows: the causal limit cuts some short
    q_and_out = shared.N * shared.H * (shared.D + shared.Dv) * 2
    for entry in data["benchmarks"]:
        if entry["extra_info"]["case"] == shared.id:
            rows_bytes = selected * (shared.D + shared.Dv) * 2 + q_and_out
            entry["extra_info"] |= {"bytes_rows": rows_bytes, "bytes": rows_bytes / 10}
    rows = {(r["case"], r["method"]): r for r in report_tables.table(saved_of(data))}
    triton = rows[shared.id, "triton"]
    operations = 2 * shared.H * selected * (shared.D + shared.Dv)  # a product for QK, and one for PV
    assert triton["tflops"] == pytest.approx(operations / triton["device_us"] / 1e6)
    assert rows[own.id, "triton"]["tflops"] is None
    assert rows[shared.id, "dense"]["tflops"] is None  # other work
    head, *lines = report_tables.summary(list(rows.values()))
    assert {line[1]: line[head.index("TFLOP/s (op)")] for line in lines}["prefill"].startswith(
        f"{triton['tflops']:.0f}"
    )


@pytest.mark.parametrize(
    ("remote", "page"),
    [
        ("git@example.org:team/nsa.git", "https://example.org/team/nsa/commit/"),
        ("ssh://git@example.org:2222/team/nsa.git", "https://example.org/team/nsa/commit/"),
        ("https://user:secret@example.org/team/nsa", "https://example.org/team/nsa/commit/"),
        ("/srv/nsa.git", None),
        ("javascript://example.org/%0aalert(1)", None),
    ],
)
def test_the_commit_is_linked_where_the_remote_shows_it(remote, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (
        ["init", "-q"],
        [*who, "commit", "-q", "--allow-empty", "-m", "x"],
        ["remote", "add", "origin", remote],
        ["update-ref", "refs/remotes/origin/main", "HEAD"],
    ):
        subprocess.run(["git", *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert report_command.commit_url(commit) == (f"{page}{commit}" if page else "")
    assert report_command.commit_url("0" * 40) == report_command.commit_url("HEAD") == ""
    subprocess.run(["git", "update-ref", "-d", "refs/remotes/origin/main"], check=True)
    assert report_command.commit_url(commit) == ""  # it was not pushed


LIGHT, DARK = (
    dict(re.findall(r"--([\w-]+): (#\w+);", block))
    for block in re.findall(r":root \{(.*?)\}", (report_page.WEB / "report.css").read_text(), re.DOTALL)[:2]
)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_is_legible_on_its_background(colours):
    pairs = [(text, under) for text in ("fg", "soft", "link") for under in ("bg", "panel")]
    pairs += [(state, f"{state}-bg") for state in ("good", "bad", "doubt")] + [
        ("fg", f"{s}-bg") for s in ("good", "doubt")
    ]
    for text, under in [*pairs, ("fg", "mark")]:
        lighter, darker = sorted((luminance(colours[name]) for name in (text, under)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, under)


def luminance(colour: str) -> float:
    """Return the relative luminance of #rgb or #rrggbb, as WCAG defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
