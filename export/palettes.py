"""Palettes: a few rows' weights → the table of 2^bits values that is nearest to them, by k-means.

In one dimension clusters are intervals of the sorted weights, whose sums are differences of running sums: an
iteration costs a search for each border, however many weights there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mobilemm.export.quantization import QuantizedWeight, WeightScheme, rows_of_table
from mobilemm.export.quantizers import check_finite

# Weights that are sorted at once.
CHUNK_ELEMENTS = 2**22
ITERATIONS = 100
# Borders that are tried for clusters, of so many tables at once; and bins that those are found by.
BINS, DYNAMIC_TABLES, FINE_BINS = 128, 64, 1024
# Of an input's energy, what is added of their mean: a column that calibration does not reach counts as well.
DAMPING = 0.01


def palettize(
    weight: Tensor, scheme: WeightScheme, importance: Tensor | None = None, name: str = "weight"
) -> QuantizedWeight:
    """Codes and tables of least squared error, nearly.

    Args:
        weight: floating point (rows, columns).
        scheme: bits, and the rows that share a table.
        importance: float32 (columns,), a weight on the squared error, such as the inputs' mean square.
        name: of the layer, for errors.

    Raises MobileMMError for NaN and infinite weights.
    Source: Lloyd 1982, "Least squares quantization in PCM", method I.
    """
    check_finite(weight, name)
    rows, columns = weight.shape
    size = rows_of_table(scheme, rows)
    if importance is not None:
        importance = importance + DAMPING * importance.mean().clamp(min=1e-12)
    palette = torch.empty(rows // size, 2**scheme.bits)
    codes = torch.empty(rows // size, size * columns, dtype=torch.uint8)
    step = max(1, CHUNK_ELEMENTS // (size * columns))
    for start in range(0, len(palette), step):
        chosen = slice(start, start + step)
        values = weight[start * size : (start + step) * size].float().reshape(-1, size * columns)
        counts = None if importance is None else importance.repeat(size)
        # The table is stored in float16, and codes are found for what is stored.
        palette[chosen] = table = k_means(values, 2**scheme.bits, counts).half().float()
        codes[chosen] = torch.searchsorted(_borders(table), values, out_int32=True).to(torch.uint8)
    return QuantizedWeight.from_palette(codes.view(rows, columns), palette, scheme.bits)


def k_means(values: Tensor, entries: int, counts: Tensor | None = None) -> Tensor:
    """Rows of values, float32 (tables, n), each counted `counts` (n,) times → (tables, entries), rising.

    The optimum over borders of bins is where iterations begin: from elsewhere they end in tables that are
    half as good, where there are outliers.
    """
    values, order = values.sort(-1)
    often = torch.ones_like(values) if counts is None else counts[order]
    sums = Sums.of(values, often.double())
    table = torch.cat([_first_table(piece, entries) for piece in sums.split(DYNAMIC_TABLES)])
    for _ in range(ITERATIONS):
        found = sums.means(_ends(torch.searchsorted(values, _borders(table)), values.shape[1]), table)
        if torch.equal(found, table):
            break
        table = found
    return table


@dataclass(frozen=True)
class Sums:
    """Running sums over sorted values, float64 (tables, n + 1): of counts, values and squares."""

    values: Tensor
    mass: Tensor
    moment: Tensor
    square: Tensor

    @classmethod
    def of(cls, values: Tensor, often: Tensor) -> Sums:
        powers = (often, often * values, often * values.double().square())
        return cls(values, *(functional.pad(power.cumsum(-1), (1, 0)) for power in powers))

    def split(self, count: int) -> Iterator[Sums]:
        """A few tables at once."""
        pieces = (one.split(count) for one in (self.values, self.mass, self.moment, self.square))
        return (Sums(*piece) for piece in zip(*pieces, strict=True))

    def at(self, places: Tensor) -> Sums:
        """The sums up to these places (tables, m) alone."""
        return Sums(self.values, *(one.gather(1, places) for one in (self.mass, self.moment, self.square)))

    def means(self, places: Tensor, otherwise: Tensor) -> Tensor:
        """Means, float32, of values between neighbouring places; `otherwise` where there are none."""
        there = self.at(places)
        mass, moment = there.mass.diff(), there.moment.diff()
        return torch.where(mass > 0, moment / mass.clamp(min=1e-300), otherwise.double()).float()


def _borders(table: Tensor) -> Tensor:
    return ((table[:, 1:] + table[:, :-1]) / 2).contiguous()


def _ends(places: Tensor, count: int) -> Tensor:
    """With the first place and the last."""
    return functional.pad(functional.pad(places, (1, 0)), (0, 1), value=count)


def _first_table(sums: Sums, entries: int) -> Tensor:
    """The table of least error whose clusters end where bins do: by dynamic programming over borders.

    Source: Wang and Song 2011, "Ckmeans.1d.dp: Optimal k-means clustering in one dimension".
    """
    centres = _companded(sums, BINS)
    bins = sums.at(_ends(torch.searchsorted(sums.values, _borders(centres)), sums.values.shape[1]))
    mass, moment, square = (one[:, :, None] - one[:, None] for one in (bins.mass, bins.moment, bins.square))
    cost = torch.where(mass > 0, square - moment.square() / mass.clamp(min=1e-300), 0.0).float()
    backwards = torch.ones(BINS + 1, BINS + 1).triu(1).bool()
    cost.masked_fill_(backwards, torch.inf)  # [table, stop, start]
    least, starts = cost[:, :, 0], []
    for _ in range(entries - 1):
        least, start = (least[:, None] + cost).min(-1)
        starts.append(start)
    stop = torch.full((len(centres), 1), BINS)
    places = [stop]
    for start in reversed(starts):
        places.append(stop := start.gather(1, stop))
    ends = torch.cat([torch.zeros_like(stop), *reversed(places)], 1)
    otherwise = centres.gather(1, ends[:, :-1].clamp(max=BINS - 1))
    return bins.means(ends, otherwise)


def _companded(sums: Sums, entries: int) -> Tensor:
    """Values, rising, as dense as the cube root of the weights' density, which is best for many of them.

    Source: Panter and Dite 1951, "Quantization distortion in pulse-count modulation".
    """
    values = sums.values
    low, high = values[:, :1], values[:, -1:]
    edges = low + (high - low) * torch.linspace(0, 1, FINE_BINS + 1)
    places = _ends(torch.searchsorted(values, edges[:, 1:-1].contiguous()), values.shape[1])
    level = sums.at(places).mass.diff().clamp(min=0).pow(1 / 3).cumsum(-1)
    wanted = (torch.arange(entries) + 0.5) / entries * level[:, -1:]
    found = torch.searchsorted(level, wanted.to(level.dtype)).clamp(max=FINE_BINS - 1)
    # Within a bin evenly: many wanted values may lie in one.
    before = functional.pad(level, (1, 0)).gather(1, found)
    inside = (wanted - before) / (level.gather(1, found) - before).clamp(min=1e-300)
    return edges.gather(1, found) + inside.clamp(0, 1).float() * (high - low) / FINE_BINS
