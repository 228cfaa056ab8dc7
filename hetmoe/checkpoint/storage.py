"""What `config.json` says about how weights are stored, apart from the architecture."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hetmoe.errors import InputError
from hetmoe.models.hf_fields import Fields
from hetmoe.quantize.layout import METHOD, QuantizedLayout, layout_from_json

FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """`dtype` that the weights are meant to have, block shape of FP8 scales, number of extra prediction layers.

    `layout` says which grids quantized experts lie on, None if there are none.
    """

    dtype: str | None
    fp8_block: tuple[int, int] | None
    extra_layers: int
    layout: QuantizedLayout | None = None


def storage_from_hf(config: Mapping[str, Any], *, source: str) -> Storage:
    """Reads `dtype` (or `torch_dtype`), `quantization_config` and the count of multi-token-prediction layers.

    Raises:
        InputError: for a quantisation other than block-wise FP8 and our own, or malformed fields.
    """
    fields = Fields(config, source)
    dtype = fields.get(str, "dtype", "torch_dtype", default=None)
    dtype = None if dtype is None else dtype.removeprefix("torch.")
    extra = fields.get(int, "num_nextn_predict_layers", "num_mtp_layers", default=0)
    if extra < 0:
        raise InputError(f"{source}: num_nextn_predict_layers={extra} must be at least 0")
    quantization = fields.get(dict, "quantization_config", default=None)
    block = layout = None
    if quantization is not None and quantization.get("quant_method") == METHOD:
        layout = layout_from_json(quantization, f"{source}: quantization_config")
    elif quantization is not None:
        block = _fp8_block(quantization, source)
    if dtype is not None and dtype not in (*FLOATS, "float64", "float8_e4m3fn"):
        raise InputError(f"{source}: dtype {dtype!r} is not supported (supported: {', '.join(FLOATS)})")
    return Storage(dtype=dtype if dtype in FLOATS else None, fp8_block=block, extra_layers=extra, layout=layout)


def _fp8_block(quantization: dict[str, Any], source: str) -> tuple[int, int]:
    fields = Fields(quantization, f"{source}: quantization_config")
    fields.only("quant_method", "fp8")
    fields.only("fmt", "e4m3")
    if fields.get(str, "quant_method", default=None) is None:
        raise InputError(f"{source}: quantization_config without quant_method is not supported (supported: 'fp8')")
    fields.only("activation_scheme", "dynamic")
    fields.ignore("modules_to_not_convert", "ignored_layers", "scale_fmt", "dequantize")
    block = fields.get(list, "weight_block_size")
    fields.refuse_unread()
    if len(block) != 2 or any(type(b) is not int or b < 1 for b in block):
        raise InputError(f"{source}: weight_block_size={block} must be two whole numbers of at least 1")
    return block[0], block[1]
