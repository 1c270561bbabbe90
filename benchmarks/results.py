"""The race's results for people: tables, RESULTS.md, race.svg."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

WIDTH = 110
PHASES = {"prefill": "prefill of 256", "decode": "decode"}
TITLES = {
    "default": "The default model: SmolLM2-135M",
    "mobilellama-1.4b": "MobileLLaMA-1.4B's shape, random weights",
    "tiny": "A tiny model, to try the script",
}

UNKNOWN = "Why is not known."
# Why a peer is ahead, as far as it was measured: (size, our system, phase).
BF16 = (
    "Products in bf16 (AVX512-BF16), measured alone on this machine: of 256 rows, 576 → 1536, 328 and 352"
    " GFLOP/s in two runs, MatMulNBits in blocks of 128 does 260 and 297; a third run was disturbed."
)
REASONS = {
    ("default", "mobilemm ONNX int4", "prefill"): BF16,
    ("default", "mobilemm ExecuTorch int4", "prefill"): f"{BF16} XNNPACK's were not measured alone.",
    ("mobilellama-1.4b", "mobilemm ONNX int4", "prefill"): (
        "Not the linear layers, measured alone on this machine: of 256 rows, 2048 → 5632, bf16 (AVX512-BF16)"
        " did no more than MatMulNBits in blocks of 128, three runs (both 387 GFLOP/s in the fastest)."
        " What it is, is not known."
    ),
}


def best_peer(result: Mapping[str, Any], phase: str) -> str:
    """The peer with the highest median."""
    peers = {name: one for name, one in result["systems"].items() if not one["ours"]}
    return max(peers, key=lambda name: np.median(peers[name][phase]))


def ratio(result: Mapping[str, Any], name: str, phase: str) -> tuple[float, float, float]:
    """To the best peer in the same round: median, least, most."""
    systems = result["systems"]
    ratios = np.array(systems[name][phase]) / np.array(systems[best_peer(result, phase)][phase])
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def fraction(result: Mapping[str, Any], name: str, phase: str) -> float:
    """Of what the machine does a second: fp32 operations in prefill, bytes read in decode."""
    system = result["systems"][name]
    speed = float(np.median(system[phase]))
    if phase == "prefill":
        return speed * result["operations_per_position"] / result["operations"]
    return speed * system["bytes_per_token"] / result["bandwidth"]


def table(result: Mapping[str, Any]) -> str:
    """In Markdown, one row a system."""
    head = [
        "",
        "prefill, tok/s",
        "× best peer",
        "of fp32 peak",
        "decode, tok/s",
        "× best peer",
        "of bandwidth",
    ]
    head += ["MB a token", "resident, MB"]
    known_kl = any("kl" in one for one in result["systems"].values())
    rows = [[*head, "KL to fp32"] if known_kl else head]
    rows.append(["---"] * len(rows[0]))
    for name, one in result["systems"].items():
        row = [name]
        for phase in PHASES:
            median, least, most = ratio(result, name, phase)
            row += [_speed(float(np.median(one[phase]))), f"{median:.2f} ({least:.2f}–{most:.2f})"]
            row.append(f"{100 * fraction(result, name, phase):.0f} %")
        row += [f"{one['bytes_per_token'] / 1e6:,.0f}", f"{one['resident'] / 1e6:,.0f}"]
        if known_kl:
            row.append(f"{one['kl']:.3f}" if "kl" in one else "")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def behind(size: str, result: Mapping[str, Any]) -> Iterator[str]:
    """A line for each of our figures that a peer's median is above."""
    for name, one in result["systems"].items():
        for phase, label in PHASES.items():
            median, least, most = ratio(result, name, phase)
            if not one["ours"] or median >= 1:
                continue
            reason = REASONS.get((size, name, phase), UNKNOWN)
            if most >= 1:
                reason = f"Ours is ahead in some rounds: this may be noise. {reason}"
            peer = best_peer(result, phase)
            yield f"{size}, {name}, {label}: {median:.2f} ({least:.2f}–{most:.2f}) of {peer}. {reason}"


def write_results(results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """RESULTS.md and race.svg, of sizes by name."""
    (folder / "race.svg").write_text(_chart(results), encoding="utf-8")
    (folder / "RESULTS.md").write_text(_page(results), encoding="utf-8")


def _page(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [line for size, result in results.items() for line in behind(size, result)]
    ahead = (
        "\n".join(fill(f"- {line}", WIDTH, subsequent_indent="  ") for line in lines)
        or "Nowhere in these tables."
    )
    sections = "\n\n".join(_section(size, result) for size, result in results.items())
    return f"""# The decoders' race

Ours beside other projects' decoders over the same weights, on one machine, interleaved in one run; written
by `python -m benchmarks.race`, whose head says what is measured. Figures are medians over the rounds.
`× best peer` is the ratio to the peer with the highest median, taken in each round: median, least and most.
`of fp32 peak` is of the fp32 operations a second that the machine was measured at, so that kernels in int8 or
bf16 can be above 100 %; `of bandwidth` is of measured bytes a second, for the weights, keys and values that a
token reads. `resident` is a process with Python in it, mapped files included; transformers eager and compiled
share one. No round is left out, not even where other work may have taken the machine. Core ML runs on Apple's
systems alone and is not in this race.

![Tokens a second of each system](race.svg)

{sections}

## Where a peer is ahead

{ahead}
"""


def _section(size: str, result: Mapping[str, Any]) -> str:
    memory = f"{result['memory'] / 2**30:.1f} GiB"
    rates = f"{result['bandwidth'] / 1e9:.1f} GB/s read, {result['operations'] / 1e9:.0f} fp32 GFLOP/s"
    versions = fill(", ".join(f"{name} {version}" for name, version in result["versions"].items()), WIDTH)
    return f"""## {TITLES.get(size, size)}

{table(result)}

{result["processor"]}, {result["cores"]} cores, {memory}; measured, the best of the rounds: {rates}.
{result["threads"]} threads, {result["rounds"]} rounds, {result["date"]}.
{versions}

    {result["command"]}"""


def _speed(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _chart(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a size, a column a phase; bars are medians, lines go from the slowest round to the fastest."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    from mobilemm.bench.charts import COLORS

    rows = [len(result["systems"]) for result in results.values()]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mobilemm", "font.size": 8}):
        figure = Figure(figsize=(9, 0.6 * len(rows) + 0.25 * sum(rows)), layout="constrained")
        grid = figure.subplots(len(rows), 2, squeeze=False, height_ratios=rows)
        for line, (size, result) in zip(grid, results.items(), strict=True):
            for axes, phase in zip(line, PHASES, strict=True):
                systems = result["systems"]
                runs = [np.array(one[phase]) for one in systems.values()]
                medians = np.array([np.median(one) for one in runs])
                spread = [medians - [one.min() for one in runs], [one.max() for one in runs] - medians]
                colors = [COLORS[0] if one["ours"] else "#999999" for one in systems.values()]
                axes.barh(list(systems), medians, xerr=spread, color=colors, error_kw={"elinewidth": 0.8})
                axes.invert_yaxis()
                axes.set_title(f"{size}: {PHASES[phase]}, tok/s")
                for side in ("top", "right"):
                    axes.spines[side].set_visible(False)
            line[1].tick_params(labelleft=False)
        with io.StringIO() as file:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            return file.getvalue()
