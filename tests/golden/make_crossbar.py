"""Makes `crossbar.npz`: outputs of aihwkit-lightning's AnalogLinear that the crossbar matmul must agree with.

Command, from the repository root, in an environment with numpy 2, torch 2.13 (CPU) and aihwkit-lightning 2.1
(checked with 2.1.0, torch 2.13.0, numpy 2.4.6):

    python -m tests.golden.make_crossbar

Cost: a few seconds on one thread. Running it again gives the same arrays, up to the last bits of `output_*` on a
machine whose float32 matmul sums in another order.

The layer runs on the CPU in float32 and eval mode. There its weights act unmodified and nothing is random. Settings:
`inp_res` and `out_res` are `2**bits - 2`, or -1 for a converter that is off; `out_bound` is lambda; the bound's
maximum is per column if `clip.type` is LAYER_GAUSSIAN_PER_CHANNEL (which clips in the optimiser, not in forward).

File layout: `x_*` `[..., K]`, `w_*` `[K, N]` (transpose of torch's), `range_*` `[row-blocks]`, `output_*` `[..., N]`,
all float32, and `metadata`, a JSON string: `versions` and `cases`. A case names its arrays, the arguments of the
matmul, lightning's split of K (`in_sizes`), what it exercises (`counts`: ties and clipped values at either
converter), `exact` (every sum is exact in float32 whatever its order, so outputs must match bit for bit) and
`moved_codes` (elements where the numpy reference lies a code away from lightning; their number when it was made).
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from tests.numpy_reference import BoundAxis, Float32, Tile, boundary_distance, crossbar_tiles, largest_adc_step

with contextlib.redirect_stdout(sys.stderr):  # it prints when it is imported without triton
    import aihwkit_lightning  # pyright: ignore[reportMissingImports]
    from aihwkit_lightning.nn import AnalogLinear  # pyright: ignore[reportMissingImports]
    from aihwkit_lightning.simulator.configs import (  # pyright: ignore[reportMissingImports]
        TorchInferenceRPUConfig,
        WeightClipType,
    )

OUTPUT = pathlib.Path(__file__).with_name("crossbar.npz")
MAX_BYTES = 400_000
QUOTIENT_LAMBDA = 0.3
# A float32 sum of 512 products moved codes that were at most 1.3e-5 codes from a boundary (2 million outputs tried).
MAX_DISTANCE_OF_MOVED_CODE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call; `x`, `w` and `input_range` name arrays (None: dynamic ranges), `None` bits mean no converter."""

    name: str
    x: str
    w: str
    input_range: str | None
    tile_rows: int
    adc_bound: float = 12.0
    bound_axis: BoundAxis = "tile"
    dac_bits: int | None = 8
    adc_bits: int | None = 8
    exact: bool = False
    must_have: tuple[str, ...] = ()


def make_arrays() -> dict[str, Float32]:
    """All inputs, weights and ranges."""
    rng = np.random.default_rng(20260101)

    def normal(*shape: int, scale: float = 1.0) -> Float32:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    arrays: dict[str, Float32] = {
        # K = 1000 at 512: blocks of 500, 500. K = 88 at 32: 30, 29, 29, as 1408 at 512 gives 470, 469, 469.
        "x_1000": normal(6, 1000),
        "w_1000": normal(1000, 16, scale=0.05),
        "range_1000": np.array([2.7, 2.1], np.float32),
        "x_88": normal(2, 3, 88),
        "w_88": normal(88, 12, scale=0.2),
        "range_88": np.array([1.9, 2.3, 3.1], np.float32),
        "range_88_wide": np.array([5.3, 6.1, 4.7], np.float32),
        "range_88_zero": np.array([1.9, 0.0, 3.1], np.float32),
    }
    # Token 0 is all zero; token 1 is zero in the middle row-block only; column 5 is zero; column 7 in one block.
    zero_x, zero_w = arrays["x_88"][0].copy(), arrays["w_88"].copy()
    zero_x[0], zero_x[1, 30:59] = 0, 0
    zero_w[:, 5], zero_w[59:, 7] = 0, 0
    arrays |= {"x_88_zero": zero_x, "w_88_zero": zero_w}

    # Power-of-two steps: range 127/16 is a DAC step of 1/16, and inputs are odd multiples of 1/32, that is half codes
    # (some beyond the range). Weights are multiples of 1/4 with largest magnitude 1 in every column, so an ADC step is
    # 1/16 * lambda, and with lambda = 8 a sum is a multiple of 1/32 ADC codes: one in 32 is a tie.
    half_codes = (2 * rng.integers(-130, 130, (24, 32)) + 1).astype(np.float32) / np.float32(32)
    quarters = rng.integers(-4, 5, (32, 8)).astype(np.float32) / np.float32(4)
    quarters[0], quarters[16] = 1, -1
    arrays |= {"x_ties": half_codes, "w_ties": quarters, "range_ties": np.array([127 / 16, 127 / 16], np.float32)}
    # The same with per-column maxima 1/4 ... 4, and one dynamic range per token and block: the entry that sets the
    # range is 127 DAC codes, and the other inputs are half codes.
    arrays["w_ties_column"] = quarters * np.exp2(rng.integers(-2, 3, 8)).astype(np.float32)
    dynamic = np.clip(half_codes, -253 / 32, 253 / 32)
    dynamic[:, 3], dynamic[:, 20] = 127 / 16, -127 / 16
    arrays["x_ties_dynamic"] = dynamic * np.exp2(rng.integers(-3, 4, (24, 1))).astype(np.float32)

    # Steps that are no power of two, and inputs whose IEEE quotient by the step is an exact half. Multiplying by the
    # reciprocal of the step, or multiplying range, lambda, maximum and 2/254 in another order, moves many of them by
    # one code: ranges and lambda are chosen so. With K = 1 every sum is one product, the same in any implementation.
    halves = np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)
    dac_range, adc_range, largest = np.float32(6.5), np.float32(7.5), np.float32(1.7)
    adc_bound = adc_range * np.float32(QUOTIENT_LAMBDA) * largest
    arrays |= {
        "x_quotient_dac": (halves * (np.float32(2) * dac_range / np.float32(254)))[:, None],
        "range_quotient_dac": np.array([dac_range], np.float32),
        "w_quotient_dac": np.ones((1, 1), np.float32),
        "x_quotient_adc": (halves * (np.float32(2) * adc_bound / np.float32(254)))[:, None],
        "range_quotient_adc": np.array([adc_range], np.float32),
        "w_quotient_adc": np.array([[1, largest]], np.float32),
    }
    return arrays


def make_cases() -> list[Case]:
    """All cases; every product of static or dynamic ranges with a bound per tile or column stands for both sizes."""
    cases = []
    for size, tile_rows in ((1000, 512), (88, 32)):
        for ranges in ("static", "dynamic"):
            for axis in ("tile", "column"):
                cases.append(  # noqa: PERF401 (three loops read better)
                    Case(
                        name=f"k{size}_{ranges}_{axis}",
                        x=f"x_{size}",
                        w=f"w_{size}",
                        input_range=f"range_{size}" if ranges == "static" else None,
                        tile_rows=tile_rows,
                        bound_axis=axis,
                        must_have=("dac_clipped",) if ranges == "static" else (),
                    )
                )
    both_ties = ("dac_ties", "adc_ties")
    static = Case(name="", x="x_88", w="w_88", input_range="range_88", tile_rows=32)
    dynamic = dataclasses.replace(static, input_range=None)
    zeros = dataclasses.replace(dynamic, x="x_88_zero", w="w_88_zero")
    ties = Case(
        name="",
        x="x_ties",
        w="w_ties",
        input_range="range_ties",
        tile_rows=16,
        adc_bound=8.0,
        exact=True,
        must_have=both_ties,
    )
    dynamic_ties = dataclasses.replace(ties, x="x_ties_dynamic", input_range=None)
    variants: list[tuple[str, Case, dict[str, Any]]] = [
        ("input_saturation", static, {"adc_bound": 30.0, "must_have": ("dac_clipped",)}),
        ("output_saturation_tile", static, {"adc_bound": 0.3, "must_have": ("adc_clipped",)}),
        (
            "output_saturation_column",
            dynamic,
            {"adc_bound": 0.7, "bound_axis": "column", "must_have": ("adc_clipped",)},
        ),
        ("bits_5_10", static, {"dac_bits": 5, "adc_bits": 10}),
        ("bits_10_5_dynamic", dynamic, {"dac_bits": 10, "adc_bits": 5, "bound_axis": "column"}),
        ("dac_only_static", static, {"adc_bits": None, "must_have": ("dac_clipped",)}),
        ("dac_only_dynamic", dynamic, {"adc_bits": None}),
        ("adc_only_static", static, {"dac_bits": None, "input_range": "range_88_wide"}),
        ("adc_only_dynamic", dynamic, {"dac_bits": None}),
        ("zeros_dynamic_tile", zeros, {}),
        ("zeros_dynamic_column", zeros, {"bound_axis": "column"}),
        ("zeros_static_column", zeros, {"input_range": "range_88", "bound_axis": "column"}),
        ("zero_range", static, {"input_range": "range_88_zero"}),
        ("ties_static_tile", ties, {}),
        ("ties_static_column", ties, {"w": "w_ties_column", "bound_axis": "column"}),
        ("ties_dynamic_tile", dynamic_ties, {}),
        ("ties_dynamic_column", dynamic_ties, {"w": "w_ties_column", "bound_axis": "column"}),
        ("ties_output_saturation", ties, {"adc_bound": 2.0, "must_have": (*both_ties, "adc_clipped")}),
    ]
    cases += [dataclasses.replace(base, name=name, **changes) for name, base, changes in variants]
    cases.append(
        Case(
            name="quotient_ties_dac",
            x="x_quotient_dac",
            w="w_quotient_dac",
            input_range="range_quotient_dac",
            tile_rows=512,
            adc_bits=None,
            exact=True,
            must_have=("dac_ties",),
        )
    )
    cases.append(
        Case(
            name="quotient_ties_adc",
            x="x_quotient_adc",
            w="w_quotient_adc",
            input_range="range_quotient_adc",
            tile_rows=512,
            dac_bits=None,
            adc_bound=QUOTIENT_LAMBDA,
            exact=True,
            must_have=("adc_ties",),
        )
    )
    return cases


def run_lightning(case: Case, x: Float32, w: Float32, input_range: Float32 | None) -> tuple[Float32, list[int]]:
    """The layer's output and its split of K."""
    config = TorchInferenceRPUConfig()
    config.forward.inp_res = -1 if case.dac_bits is None else 2**case.dac_bits - 2
    config.forward.out_res = -1 if case.adc_bits is None else 2**case.adc_bits - 2
    config.forward.out_bound = 0.0 if case.adc_bits is None else case.adc_bound
    config.mapping.max_input_size = case.tile_rows
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.dynamic = input_range is None
    config.pre_post.input_range.learn_input_range = False
    if case.bound_axis == "column":
        config.clip.type = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL
    layer = AnalogLinear(w.shape[0], w.shape[1], bias=False, dtype=torch.float32, rpu_config=config)
    layer.set_weights(torch.from_numpy(np.ascontiguousarray(w.T)))
    if input_range is not None:
        layer.input_range.data.copy_(torch.from_numpy(input_range))
    layer.eval()
    with torch.no_grad():
        output = layer(torch.from_numpy(x.copy())).numpy()
    return output, [int(size) for size in layer.in_sizes]


def count_events(case: Case, x: Float32, tiles: list[Tile], sizes: list[int]) -> dict[str, int]:
    """How many values tie or clip at each converter, summed over the tiles."""
    counts = {"dac_ties": 0, "dac_clipped": 0, "adc_ties": 0, "adc_clipped": 0}
    for tile, inputs in zip(tiles, np.split(x, np.cumsum(sizes)[:-1], axis=-1), strict=True):
        if case.dac_bits is not None:
            full_scale = 2 ** (case.dac_bits - 1) - 1
            position = inputs / np.where(tile.dac_step > 0, tile.dac_step, np.float32(1))
            counts["dac_ties"] += int(np.sum(np.abs(position - np.floor(position)) == 0.5))
            counts["dac_clipped"] += int(np.sum(np.abs(position) > full_scale + 0.5))
        if case.adc_bits is not None and tile.adc_position is not None:
            full_scale = 2 ** (case.adc_bits - 1) - 1
            position = tile.adc_position
            counts["adc_ties"] += int(np.sum(np.abs(position - np.floor(position)) == 0.5))
            counts["adc_clipped"] += int(np.sum(np.abs(position) > full_scale + 0.5))
    return counts


def check_against_reference(case: Case, output: Float32, tiles: list[Tile]) -> int:
    """Compares lightning with the numpy arithmetic; returns how many elements lie a code apart.

    Raises:
        AssertionError: They differ by more than float32 rounding where no code lies next to a boundary.
    """
    expected = tiles[0].output
    for tile in tiles[1:]:
        expected = expected + tile.output
    difference = np.abs(output - expected)
    if case.exact:
        assert np.array_equal(output, expected), (case.name, difference.max())
        return 0
    if case.adc_bits is None:
        assert np.all(difference <= 1e-6 * sum(np.abs(tile.sums).max() for tile in tiles)), (
            case.name,
            difference.max(),
        )
        return 0
    moved = difference > np.finfo(np.float32).eps * len(tiles) * sum(np.abs(tile.output) for tile in tiles)
    assert np.all(boundary_distance(tiles)[moved] < MAX_DISTANCE_OF_MOVED_CODE), case.name
    one_code_each = 1.001 * len(tiles) * largest_adc_step(tiles)
    assert np.all(~moved | (difference <= one_code_each)), case.name
    return int(moved.sum())


def main() -> None:
    """Makes and checks every case, prints a line for each and writes the file."""
    torch.set_num_threads(1)
    arrays = make_arrays()
    described = []
    for case in make_cases():
        x, w = arrays[case.x], arrays[case.w]
        input_range = None if case.input_range is None else arrays[case.input_range]
        arguments: dict[str, Any] = {
            key: getattr(case, key) for key in ("tile_rows", "adc_bound", "bound_axis", "dac_bits", "adc_bits")
        }
        tiles = crossbar_tiles(x, w, input_range=input_range, **arguments)
        output, in_sizes = run_lightning(case, x, w, input_range)
        assert output.shape == (*x.shape[:-1], w.shape[1]), (case.name, output.shape)
        counts = count_events(case, x, tiles, in_sizes)
        assert all(counts[key] > 0 for key in case.must_have), (case.name, counts)
        moved = check_against_reference(case, output, tiles)
        arrays[f"output_{case.name}"] = output
        described.append(
            {
                "name": case.name,
                "x": case.x,
                "w": case.w,
                "input_range": case.input_range,
                "output": f"output_{case.name}",
                "arguments": arguments,
                "in_sizes": in_sizes,
                "counts": counts,
                "exact": case.exact,
                "moved_codes": moved,
            }
        )
        print(f"{case.name:28s} split {in_sizes} {counts} moved codes {moved} of {output.size}")
    versions = {"aihwkit-lightning": aihwkit_lightning.__version__, "torch": torch.__version__, "numpy": np.__version__}
    metadata = json.dumps({"versions": versions, "cases": described})
    np.savez_compressed(OUTPUT, allow_pickle=False, metadata=np.array(metadata), **arrays)
    size = OUTPUT.stat().st_size
    assert size < MAX_BYTES, size
    print(f"{OUTPUT.name}: {len(described)} cases, {size} bytes, {versions}")


if __name__ == "__main__":
    main()
