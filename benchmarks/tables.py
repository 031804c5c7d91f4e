"""Results as Markdown: on the terminal and, between markers, in docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from measure import median_interval

START, END = "<!-- figures: written by benchmarks/run.py --docs -->", "<!-- /figures -->"

SECTIONS = {
    "reading": "Reading tiles",
    "store": "Tile stores, 256 px (rates per second of CPU time)",
    "embedding": "Embedding",
    "stain": "Stain normalisation",
    "mil": "Training",
    "memory": "Memory",
}


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _head(*names: str) -> str:
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def rows_of(rows: list[dict[str, Any]]) -> str:
    """Figures beside their limits or peers."""
    lines = [_head("what", "measured", "beside", "that", "ratio", "by CPU time", "interval", "turns", "bar")]
    for row in rows:
        bar = "" if not row["bar"] else f"{row['bar']}: **{row['verdict']}**"
        ratios = [a / b for a, b in zip(row["figures"], row["limits"], strict=True)]
        turns, (low, high) = len(row["figures"]), median_interval(ratios)
        interval = f"{low:.2f} to {high:.2f}" if turns > 1 else ""
        lines.append(
            f"| {row['name']} | {number(row['figure'])} {row['unit']} | {row['beside']} | {number(row['limit'])} "
            f"| {row['ratio']:.2f} | {row['cpu_ratio']:.2f} | {interval} | {turns} | {bar} |"
        )
    return "\n".join(lines)


def sizes_of(results: dict[str, Any]) -> str:
    """Size and speed of the codecs."""
    speeds = {
        (verb, row["name"].removeprefix(f"{verb} ")): row["figure"]
        for row in results["rows"]
        if row["section"] == "store" and row["beside"] == "zarr-python"
        for verb in ("write", "in order", "at random")
        if row["name"].startswith(verb)
    }
    lines = [_head("slide, codec", "kB per tile of 256 px", "write, tiles/s core", "in order", "at random")]
    for entry in results["sizes"]:
        what = f"{entry['slide']} {entry['codec']} 256 px"
        rates = " | ".join(number(speeds[verb, what]) for verb in ("write", "in order", "at random"))
        lines.append(f"| {entry['slide']}, {entry['codec']} | {entry['bytes_per_tile'] / 1000:.1f} | {rates} |")
    return "\n".join(lines)


def jpeg_of(entries: list[dict[str, Any]]) -> str:
    """What JPEG does to features."""
    names = ("quality", "chroma", "kB per tile of 224 px", "cosine, median", "cosine, worst 1 %")
    lines = [_head(*names, "nearest other tile", "finds itself")]
    for e in entries:
        lines.append(
            f"| {e['quality']} | {e['subsampling']} | {e['kb']:.1f} | {e['median']:.4f} | {e['worst_percent']:.4f} "
            f"| {e['nearest_other']:.3f} | {e['finds_itself']:.1%} |"
        )
    return "\n".join(lines)


def machine_of(results: dict[str, Any]) -> str:
    machine = results["machine"]
    packages = {**machine["packages"], **results["peers"]}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version != "absent")
    busy = ", ".join(f"{name} {found['others']:.0%}" for name, found in results["sections"].items())
    return (
        f"{machine['processor']}{', AVX-512' if machine['avx512'] else ''}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB, no GPU; {machine['system']}, Python {machine['python']}; {versions}. "
        f"Other programs meanwhile used, of the machine's CPU time: {busy}."
    )


def everything(results: dict[str, Any]) -> str:
    """All tables, with their headings."""
    parts = [machine_of(results)]
    for section, title in SECTIONS.items():
        rows = [row for row in results["rows"] if row["section"] == section]
        if rows:
            parts += [f"### {title}", rows_of(rows)]
        if section == "store" and results["sizes"]:
            parts.append(sizes_of(results))
    if results["jpeg"]:
        parts += [f"### JPEG and features ({results['jpeg'][0]['tiles']} tiles)", jpeg_of(results["jpeg"])]
    return "\n\n".join(parts)


def write_docs(results: dict[str, Any], path: Path) -> None:
    """Replace the generated part of the page."""
    before, _, rest = path.read_text().partition(START)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{START}\n\n{everything(results)}\n\n{END}{after}")
