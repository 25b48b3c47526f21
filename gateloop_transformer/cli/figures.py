"""The figures of `gateloop eval` as text."""

from __future__ import annotations

from typing import Any

_HEAD = f"{'tokens':>12} {'nats/token':>11} {'bits/byte':>10} {'right':>7}"


def suite(result: dict[str, Any]) -> str:
    """Describe what a suite found."""
    from gateloop_transformer.data.documents import count

    found = result["length_generalisation"]
    token, byte = (
        "beyond 1e308" if value is None else f"{value:,.4f}"
        for value in (result["perplexity_per_token"], result["perplexity_per_byte"])
    )
    lines = [
        f"{'perplexity':>14}  {token} per token, {byte} per byte",
        f"{'bits per byte':>14}  {result['bits_per_byte']:.4f}",
        f"{'text':>14}  {result['tokens']:,} tokens, {result['bytes']:,} bytes",
        "",
        f"loss by position: {count(found['windows'], 'window')}, from an empty state, of {found['length']:,} tokens, "
        f"{found['reached']:.4g} x the training context of {found['context']:,}",
    ]
    if found["reached"] < found["up_to"]:
        lines.append(
            f"DATA is too short for {found['up_to']} x: its longest document has {found['length'] + 1:,} tokens, "
            f"but {found['up_to'] * found['context'] + 1:,} are needed"
        )
    lines.append(f"{'tokens read before':>22} {_HEAD}")
    return "\n".join([*lines, *(f"{_span(row):>22} {_figures(row)}" for row in found["by_position"])])


def positions(result: dict[str, Any]) -> str:
    """Describe losses by position and by distance."""
    windows = f"{result['windows']:,} windows, each from an empty state, of {result['up_to']} x {result['context']:,}"
    lines = [f"{windows} tokens", "", f"{'tokens read before':>22} {_HEAD}"]
    lines += [f"{_span(row):>22} {_figures(row)}" for row in result["by_position"]]
    same = f"the same {result['same_tokens']} tokens, ago"
    lines += ["", f"{same:>22} {_HEAD} {'again':>7}"]
    lines += [f"{_span(row):>22} {_figures(row)} {row['again']:>7.1%}" for row in result["by_distance"]]
    return "\n".join(lines)


def _span(row: dict[str, Any]) -> str:
    if row["from"] is None:
        return "never"
    return f"{row['from']:,}" if row["from"] == row["to"] else f"{row['from']:,} to {row['to']:,}"


def _figures(row: dict[str, Any]) -> str:
    bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
    return f"{row['tokens']:>12,} {row['loss']:>11.4f} {bits:>10} {row['accuracy']:>7.1%}"
