"""Write a threshold decision where the run time reads it (YAML) and where people do (PRD.md)."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...config import PACKAGED_FILE, REGIMES, SelConfig, with_inference
from ..saved.run import Saved
from ..saved.speedups import TRITON, geomean
from ..tables import as_markdown, replace_file
from .judged import ThresholdError
from .rule import LAUNCHES, NEEDED_SPEEDUP, Decision, Threshold, Verdict

BEGIN, END = "<!-- threshold:begin -->", "<!-- threshold:end -->"
NEW_PRD = "# From which selected length on Triton is switched on"  # heads a file that is made
# How the verdict calls packed SDPA's forms.
FORMS = {
    "packed_sdpa_fused": "with fused packing",
    "packed_sdpa_compiled": "compiled",
    "packed_sdpa": "eager",
}
_ENTRY = re.compile(r"^<!-- gpu: (?P<gpu>.+?) -->$", re.MULTILINE)


def apply(decision: Decision, config: Path, prd: Path) -> list[Path]:
    """Write this GPU's entry of `runtime.sel_triton_min_L` and its section of PRD.md; return the files that changed.

    Both new texts are made before the first file is replaced. Applying the same runs again changes nothing. A missing
    file is made: the configuration as a copy of the packaged one, which it stands in place of.

    Raises: ThresholdError if the decision is null, ruamel.yaml is missing, or a file does not have the expected form or
    cannot be written.
    """
    if decision.kernel != TRITON["op"]:
        raise ThresholdError(f"--apply: the configuration is of this package's kernel, and not of {decision.kernel}")
    if decision.min_L is None:
        raise ThresholdError(f"{decision.gpu}: the data supports no threshold; nothing is written")
    changes = {
        config: _config_text(config, decision.gpu, decision.min_L),
        prd: _prd_text(prd, decision),
    }
    changed = [file for file, text in changes.items() if not file.exists() or text != _read(file)]
    for file in changed:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, changes[file])
        except OSError as error:
            raise ThresholdError(f"{file}: cannot be written ({error.strerror})") from None
    return changed


def sentence(decision: Decision) -> str:
    """Return the verdict in one sentence, followed by who the opponent was and how many cases were not judged."""
    kernel = shown(decision.kernel)
    if decision.min_L is not None:
        return (
            f"On {decision.gpu}, {kernel} is safe to switch on from L = {decision.min_L}: at every tested length from "
            f"there on, it is at least {NEEDED_SPEEDUP}x as fast as the fastest SDPA form, on the device and per call."
            f"{_opponents(decision)}"
        )
    blocked = [t for t in decision.deciding if t.min_L is None]
    missing = len({v.case for t in blocked for v in t.missing})
    too_slow = len({v.case for t in blocked for v in t.too_slow})
    regimes = ", ".join(dict.fromkeys(t.regime for t in blocked))
    return (
        f"On {decision.gpu}, these runs support no threshold ({regimes}: {missing} missing cases, {too_slow} below "
        f"{NEEDED_SPEEDUP}x), so {kernel} stays off by default.{_opponents(decision)}"
    )


def shown(kernel: str) -> str:
    """Return how sentences call a kernel."""
    return "Triton" if kernel == TRITON["op"] else kernel


def _opponents(decision: Decision) -> str:
    counts = list(decision.opponents.items())
    said = ""
    if counts:
        (first, n), *others = counts
        listed = [f"packed SDPA {FORMS[first]} in {n} cases", *(f"{FORMS[form]} in {n}" for form, n in others)]
        said = f" The opponent was {', '.join(listed)}."
    for why in ("because no SDPA form ran", f"because {decision.kernel} does not support them"):
        declared = why.endswith("them")
        if n := sum(v.declared == declared for v in decision.not_judged):
            said += f" Not judged, {why}: {n} case{'s' if n > 1 else ''}."
    return said


def as_text(decision: Decision, longest_list: int = 20) -> str:
    """Return the decision for a terminal: a line per threshold, the verdict, and what stands in its way."""
    of = "" if decision.kernel == TRITON["op"] else f"{decision.kernel} on "
    what = decision.expected.replace("`", "")
    lines = [f"{of}{decision.gpu}, {decision.date}, {what}, {len(decision.runs)} run(s)"]
    lines.append(
        f"{'regime':<9}{'launch':<8}{'dtype':<7}{'min-L':>6}{'cases':>7}{'slow':>6}{'missing':>9}{'not judged':>12}"
        "  decided by"
    )
    for t in decision.thresholds:
        value = "null" if t.min_L is None else str(t.min_L)
        counts = f"{len(t.verdicts):>7}{len(t.too_slow):>6}{len(t.missing):>9}{len(t.not_judged):>12}"
        lines.append(f"{t.regime:<9}{t.launch:<8}{t.dtype:<7}{value:>6}{counts}  {t.deciding}")
    lines += ["", sentence(decision)]
    for t in decision.deciding:
        if t.min_L is None:
            title = f"{t.regime}, {t.dtype}: {len(t.failing)} of {len(t.judged)} judged cases do not qualify"
            lines += _listed(title, t.failing, longest_list)
        if t.not_judged:
            lines += _listed(f"{t.regime}, {t.dtype}: {len(t.not_judged)} not judged", t.not_judged, longest_list)
    return "\n".join(lines)


def _listed(title: str, verdicts: Sequence[Verdict], longest_list: int) -> list[str]:
    """Return a title and a line per verdict, the longest cases first."""
    first = sorted(verdicts, key=lambda v: (-v.L, v.case))
    more = [f"  and {len(first) - longest_list} more"] if len(first) > longest_list else []
    return [f"{title}{':' if first else ''}", *(f"  {verdict}" for verdict in first[:longest_list]), *more]


def prd_section(decision: Decision) -> str:
    """Return the dated section of PRD.md for one GPU: the value, the case that decides, and the tables behind it."""
    decider = decision.deciding_threshold
    blocks = [
        f"<!-- gpu: {decision.gpu} -->",
        f"### {decision.gpu}: Triton from L = {decision.min_L} ({decision.date})",
        sentence(decision),
        f"{'Decided by' if decider.failing else 'No case is below; the closest is'} `{decider.deciding.case}` "
        f"({decider.regime}, {decider.launch}, L = {decider.deciding.L}): "
        f"{decider.deciding.text}.",
        "Runs: " + "; ".join(_run_line(saved) for saved in decision.runs) + f". {decision.expected.capitalize()}.",
        _summary_table(decision),
        *(f"Not judged: `{v.case}`: {v.not_judged}." for v in decision.not_judged),
    ]
    for t in decision.deciding:
        blocks.append(f"{t.regime}, {t.dtype}, {t.launch} (`op`, each case by its worst run):\n\n{_length_table(t)}")
    return "\n\n".join(blocks)


def _run_line(saved: Saved) -> str:
    return f"`{saved.run.name}` ({saved.run.datetime[:10]}, commit {saved.commit[:10] or 'unknown'})"


def _summary_table(decision: Decision) -> str:
    by_row: dict[tuple[str, str], dict[str, int | None]] = {}
    for t in decision.thresholds:
        by_row.setdefault((t.dtype, t.regime), {})[t.launch] = t.min_L
    lines = [["dtype", "regime", *LAUNCHES]]
    for row, values in by_row.items():
        lines.append([*row, *("null" if values[launch] is None else str(values[launch]) for launch in LAUNCHES)])
    return as_markdown(lines)


def _length_table(threshold: Threshold) -> str:
    lines = [["L", "cases", "worst lower bound", "geomean", "worst case"]]
    for length, verdicts in threshold.by_length():
        worst = min(verdicts, key=lambda v: -math.inf if v.bound is None else v.bound)
        mean = geomean(v.speedup for v in verdicts if v.speedup is not None)
        cells = ["missing" if worst.bound is None else f"{worst.bound:.2f}x", "–" if mean is None else f"{mean:.2f}x"]
        lines.append([str(length), str(len(verdicts)), *cells, f"`{worst.case}`"])
    return as_markdown(lines)


def _config_text(path: Path, gpu: str, min_len: int) -> str:
    """Return the YAML text with this GPU's entry set, comments and order kept."""
    path = path if path.exists() else PACKAGED_FILE
    text = _read(path)
    known = SelConfig.load(path, env={})
    if known.has_entry(gpu) and known.min_len_for(gpu) == min_len:
        return text
    try:
        from ruamel.yaml import YAML
        from ruamel.yaml.comments import CommentedMap
    except ImportError as error:
        raise ThresholdError("--apply needs ruamel.yaml, which keeps comments: pip install ruamel.yaml") from error
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    content = yaml.load(text) or CommentedMap()
    runtime = content.setdefault("runtime", CommentedMap())
    entries = runtime.get("sel_triton_min_L", 64)
    if not isinstance(entries, Mapping) or REGIMES[0] in entries:
        entries = runtime["sel_triton_min_L"] = CommentedMap({"default": entries})
    entries[gpu] = with_inference(entries.get(gpu), min_len)
    out = io.StringIO()
    yaml.dump(content, out)
    return out.getvalue()


def _prd_text(path: Path, decision: Decision) -> str:
    """Return the text of PRD.md with this GPU's entry between the markers replaced, the other GPUs' kept."""
    text = _read(path) if path.exists() else f"{NEW_PRD}\n\n{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ThresholdError(
            f"{path}: expected the lines {BEGIN} and {END}, once each and in this order; add them or give another --prd"
        )
    before, rest = text.split(BEGIN)
    section, after = rest.split(END)
    starts = list(_ENTRY.finditer(section))
    ends = [*(m.start() for m in starts[1:]), len(section)]
    entries = {m["gpu"]: section[m.start() : end].strip() for m, end in zip(starts, ends, strict=False)}
    entries[decision.gpu] = prd_section(decision)
    body = "\n\n".join(entries[gpu] for gpu in sorted(entries))
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ThresholdError(f"{path}: cannot be read: {error}") from error
