"""Which expert matrix of a model lies on which grid: what a file must say beside the numbers."""

import dataclasses
from typing import Any

import jax
import numpy as np

from hetmoe.errors import InputError
from hetmoe.models.hf_fields import Fields
from hetmoe.models.params import FeedForward
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.grid import BITS, GROUPS, Grid
from hetmoe.quantize.mixed import MixedMatrix, is_mixed
from hetmoe.quantize.packed import PLANES, Packed

METHOD, FORMAT = "hetmoe", 1  # quant_method and version in config.json
AS_IT_WAS = -1  # in place of a grid

Table = tuple[tuple[int, ...], ...]  # [layers][experts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedLayout:
    """The grid of every expert matrix.

    Attributes:
        grids: those in use.
        gate: for each layer with experts and each expert the index of its grid, or `AS_IT_WAS`.
        up: likewise.
        down: likewise.
    """

    grids: tuple[Grid, ...]
    gate: Table
    up: Table
    down: Table

    def table(self, name: str) -> np.ndarray:
        """The grids of one of `EXPERT_MATRICES`, int `[layers, experts]`."""
        return np.array(getattr(self, name), np.int64)

    def bits(self) -> np.ndarray:
        """Bits of every matrix `[layers, experts, matrices]`, 0 where it is not quantized."""
        of = np.array([*(grid.bits for grid in self.grids), 0])
        return np.stack([of[self.table(name)] for name in EXPERT_MATRICES], axis=-1)

    def pools(self, name: str) -> list[tuple[Grid | None, np.ndarray]]:
        """Pools of a matrix, as `arranged` takes them: grid (None = as it was), and the experts `[n, 2]` in it.

        Grids that no expert has make no pool.
        """
        table = self.table(name)
        numbered = [(index, grid) for index, grid in enumerate(self.grids)]
        found = [(grid, np.argwhere(table == index)) for index, grid in [*numbered, (AS_IT_WAS, None)]]
        return [(grid, where) for grid, where in found if len(where)]

    def to_json(self) -> dict[str, Any]:
        """As `quantization_config` of config.json."""
        grids = [dataclasses.asdict(grid) for grid in self.grids]
        experts = {name: [list(row) for row in getattr(self, name)] for name in EXPERT_MATRICES}
        return {"quant_method": METHOD, "format": FORMAT, "grids": grids, "experts": experts}


def layout_of(experts: FeedForward) -> QuantizedLayout | None:
    """The layout of experts in memory, None if they are not quantized."""
    matrices = {name: getattr(experts, name) for name in EXPERT_MATRICES}
    if not any(is_mixed(matrix) for matrix in matrices.values()):
        return None
    grids: list[Grid] = []
    tables: dict[str, Table] = {}
    for name, matrix in matrices.items():
        if not isinstance(matrix, MixedMatrix):
            raise InputError(f"experts' {name} is not quantized beside matrices that are: make all of them mixed")
        numbers: list[int] = []
        for pool in matrix.pools:
            grid = pool.grid if isinstance(pool, Packed) else None
            if grid is not None and grid not in grids:
                grids.append(grid)
            numbers.append(AS_IT_WAS if grid is None else grids.index(grid))
        table = np.array(numbers)[np.asarray(matrix.places.pool)]
        tables[name] = tuple(tuple(row) for row in table.tolist())
    return QuantizedLayout(grids=tuple(grids), **tables)


def layout_from_json(content: dict[str, Any], source: str) -> QuantizedLayout:
    """Reads what `to_json` wrote; other fields than those that decide what is loaded are for people.

    Raises:
        InputError: naming the source and the field that is malformed.
    """
    fields = Fields(content, source)
    fields.only("quant_method", METHOD)
    fields.only("format", FORMAT)
    fields.get(int, "format")
    fields.ignore("made_by")
    grids = tuple(_grid(grid, f"{source}: grids[{i}]") for i, grid in enumerate(fields.get(list, "grids")))
    experts = Fields(fields.get(dict, "experts"), f"{source}: experts")
    fields.refuse_unread()
    tables = {
        name: _table(experts.get(list, name), len(grids), f"{source}: experts.{name}") for name in EXPERT_MATRICES
    }
    experts.refuse_unread()
    return QuantizedLayout(grids=grids, **tables)


def _grid(content: Any, source: str) -> Grid:
    fields = Fields(content, source)
    fields.only("bits", *BITS)
    fields.only("group", *GROUPS)
    grid = Grid(bits=fields.get(int, "bits"), group=fields.get(int, "group"), symmetric=fields.get(bool, "symmetric"))
    fields.refuse_unread()
    return grid


def _table(rows: list[Any], grids: int, source: str) -> Table:
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(rows[0]):
            raise InputError(f"{source}[{layer}] must be a list of one grid for each expert")
        for expert, index in enumerate(row):
            if type(index) is not int or not AS_IT_WAS <= index < grids:
                raise InputError(
                    f"{source}[{layer}][{expert}]={index!r} must be one of the {grids} grids, or {AS_IT_WAS} for none"
                )
    return tuple(tuple(row) for row in rows)


def check_layout(layout: QuantizedLayout, experts: FeedForward, source: str) -> None:
    """Raises InputError unless a layout is of a model whose experts have these shapes `[layers, experts, K, N]`."""
    for name in EXPERT_MATRICES:
        shape = getattr(experts, name).shape
        table = getattr(layout, name)
        found = [len(table), len(table[0]) if table else 0]
        if found != list(shape[:2]):
            raise InputError(
                f"{source}: experts.{name} places {found[0]} layers of {found[1]} experts; this model has "
                f"{shape[0]} of {shape[1]}"
            )
        for grid, _ in layout.pools(name):
            if grid is not None:
                try:
                    grid.groups_of(shape[2])
                except InputError as error:
                    raise InputError(f"{source}: experts.{name}: {error}") from None


def abstract_packed(count: int, rows: int, columns: int, grid: Grid, sharding: Any = None) -> Packed:
    """Shapes and dtypes of the arrays of `count` packed matrices."""

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=sharding)

    groups = grid.groups_of(rows)
    return Packed(
        planes=tuple(array((rows * bits // 8, columns), np.uint8) for bits in PLANES[grid.bits]),
        scale=array((groups, columns), np.float16),
        zero=None if grid.symmetric else array((groups, columns), np.float16),
        grid=grid,
    )
