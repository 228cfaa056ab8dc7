"""Costs of compiled programs are their closed forms, to the last FLOP and byte."""

import importlib.metadata
import json
import re

import pytest

from hetmoe.errors import InputError
from hetmoe.parallel.hlo_text import Shape
from hetmoe.parallel.program_costs import ProgramCosts, Traffic, program_costs
from tests.checkpoint.test_loading import run
from tests.parallel.compiled import SINGLE, SPREAD, TPU_ONLY
from tests.parallel.hlo_module import PARAMETER, module

TPUS = ["tpu:v5e:2x4", "tpu:v6e:2x4", "tpu:tpu7x:2x2x1"]


def compiled(devices):
    return json.loads(run("from tests.parallel.compiled import main; main()", devices))


@pytest.fixture(scope="module")
def cpu_texts():
    return compiled("cpu:8")


@pytest.fixture(scope="module", params=TPUS)
def tpu_texts(request):
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    wanted = re.search(r"libtpu==([\d.]+)\*", " ".join(importlib.metadata.requires("jax"))).group(1)
    if not (found := importlib.metadata.version("libtpu")).startswith(wanted):
        pytest.skip(f"libtpu is {found}, this JAX needs {wanted}*")
    return compiled(request.param)


def assert_costs(text, program, kinds=None):
    costs = program_costs(text)
    assert costs.flops == program.flops
    assert (costs.unknown_loops, costs.opaque_calls) == ((), {})
    expected = {kind: Traffic(*numbers) for kind, numbers in program.traffic.items()}
    if kinds is None:
        assert costs.collectives == expected
    for kind in kinds or ():
        assert costs.collectives[kind] == expected[kind]


@pytest.mark.parametrize("name", [*SINGLE, *SPREAD])
def test_programs_of_cpus(cpu_texts, name):
    assert_costs(cpu_texts[name], (SINGLE | SPREAD)[name])


@pytest.mark.slow
def test_programs_of_tpus(tpu_texts):
    """Those that the compiler leaves as they are: it rewrites convolutions."""
    for name, text in tpu_texts.items():
        if name not in ("convolution", "sharded_layers"):
            assert_costs(text, (SINGLE | SPREAD | TPU_ONLY)[name])


@pytest.mark.slow
def test_collectives_beside_matmuls(tpu_texts):
    """Where gathers go on in the background (the text of v5e holds one three times), and sums are cut in fusions."""
    text = tpu_texts["sharded_layers"]
    # On v5e the compiler takes the sum apart into permutations.
    assert_costs(text, TPU_ONLY["sharded_layers"], ["all-gather"] + ["reduce-scatter"] * ("all-reduce-scatter" in text))
    assert "AsyncCollectiveStart" in text or "all-reduce-scatter" in text or "call-start" in text


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("{{0,1,2,3,4,5,6,7}}", 8),
        ("{}", 8),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=2,'b'=4] {'a'}", 2),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
    ],
)
def test_groups(groups, size):
    text = module(
        [PARAMETER, f"ROOT %r = f32[64]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"]
    )
    assert program_costs(text).collectives == {"all-reduce": Traffic(1, 256, 256, 512 * (size - 1) / size)}


def test_groups_of_replicas():
    text = module([PARAMETER, "ROOT %r = f32[64]{0} all-reduce(%p), replica_groups={}"], header="replica_count=4")
    assert program_costs(text).sent_bytes == 2 * 256 * 3 / 4


ASYNC = [
    PARAMETER,
    "%s = (f32[64]{0}, f32[256]{0}) all-gather-start(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}",
    "%d = f32[256]{0} all-gather-done(%s)",
    "%t = ((f32[64]{0}), f32[64]{0}, u32[]) async-start(%p), calls=%wrapped",
    "%u = ((f32[64]{0}), f32[64]{0}, u32[]) async-update(%t)",
    "%v = f32[64]{0} async-done(%u)",
    "%w = (f32[64]{0}, f32[16]{0}) all-reduce-start(%p, %q), replica_groups=[2,4]<=[8], to_apply=%add",
    "%x = (f32[64]{0}, f32[16]{0}) all-reduce-done(%w)",
    "ROOT %q = f32[16]{0} constant({...})",
]  # fmt: skip
WRAPPED = """%wrapped (q: f32[64]) -> f32[64] {
  %q.1 = f32[64]{0} parameter(0)
  ROOT %r = f32[64]{0} all-to-all(%q.1), channel_id=2, replica_groups=[4,2]<=[8], dimensions={0}
}, execution_thread="x"
"""


def test_asynchronous_collectives_count_once():
    """As GPUs write them."""
    assert program_costs(module(ASYNC, others=WRAPPED)).collectives == {
        "all-gather": Traffic(1, 256, 1024, 768.0),
        "all-to-all": Traffic(1, 256, 256, 128.0),
        "all-reduce": Traffic(1, 320, 320, 480.0),
    }


GATHER = "all-gather(%p.NUMBER), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}"
TPU_FUSIONS = f"""%async_collective_fusion.1 (p: f32[64]) -> (f32[64], f32[256]) {{
  %p.1 = f32[64]{{0}} parameter(0)
  %g.1 = f32[256]{{0}} {GATHER.replace("NUMBER", "1")}
  ROOT %c = (f32[64]{{0}}, f32[256]{{0}}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.2 (p: f32[64]) -> f32[256] {{
  %p.2 = f32[64]{{0}} parameter(0)
  ROOT %g.2 = f32[256]{{0}} {GATHER.replace("NUMBER", "2")}
}}

%async_collective_fusion.3 (p: f32[64]) -> f32[256] {{
  %p.3 = f32[64]{{0}} parameter(0)
  %g.3 = f32[256]{{0}} {GATHER.replace("NUMBER", "3")}
  ROOT %d = f32[256]{{0}} custom-call(%p.3, %g.3), custom_call_target="AsyncCollectiveDone"
}}

%all-reduce-scatter.4 (p: f32[64]) -> f32[16] {{
  %p.4 = f32[64]{{0}} parameter(0)
  %g.4 = f32[64]{{0}} all-reduce(%p.4), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %s.4 = f32[16]{{0}} slice(%g.4), slice={{[0:16]}}
}}

%reduce-scatter.5 (p: f32[64]) -> f32[16] {{
  %p.5 = f32[64]{{0}} parameter(0)
  ROOT %g.5 = f32[16]{{0}} reduce-scatter(%p.5), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%add
}}
"""


def test_collectives_in_fusions_of_tpus():
    """A gather in three parts beside others' work, and one of the same channel; a reduce-scatter written as a sum."""
    text = module([
        PARAMETER,
        "%a = (f32[64]{0}, f32[256]{0}) fusion(%p), kind=kCustom, calls=%async_collective_fusion.1",
        "%b = f32[256]{0} fusion(%p), kind=kOutput, calls=%async_collective_fusion.2",
        "%c = f32[256]{0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.3",
        "%d = f32[16]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.4",
        "%e = ((f32[64]{0}), f32[16]{0}) call-start(%p), to_apply=%reduce-scatter.5",
        "%f = f32[16]{0} call-done(%e)",
        "%h = f32[16]{0} call(%p), to_apply=%reduce-scatter.5",
        "ROOT %g = f32[256]{0} all-gather(%p), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}",
    ], others=TPU_FUSIONS)  # fmt: skip
    assert program_costs(text) == ProgramCosts(collectives={
        "all-gather": Traffic(2, 512, 1024 + 512, 768.0 + 256.0), "reduce-scatter": Traffic(3, 768, 192, 576.0),
    })  # fmt: skip


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "flops"),
    [
        ("96,160", "160,224", "96,224", "dim_labels=bf_io->bf", 2 * 96 * 160 * 224),
        ("8,96,160", "8,160,224", "8,96,224", "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
         2 * 8 * 96 * 160 * 224),
        ("96,4,160", "4,160,224", "96,224,1", "window={size=4}, dim_labels=b0f_0io->bf0", 2 * 96 * 4 * 160 * 224),
        # 10 outputs from inputs 2 before, at, and 2 behind them; 5 x 4 of every second one, padded in front.
        ("2,10,3", "3,3,7", "2,10,7", "window={size=3 pad=2_2 rhs_dilate=2}, dim_labels=b0f_0io->b0f",
         2 * 2 * 7 * 3 * (8 + 10 + 8)),
        ("10,8,3,1", "3,2,3,7", "5,4,7,1", "window={size=3x2 stride=2x2 pad=1_0x0_0}, dim_labels=01fb_01io->01fb",
         2 * 7 * 3 * (4 + 5 + 5) * (4 + 4)),
    ],
)  # fmt: skip
def test_convolutions_of_tpus(left, right, result, attributes, flops):
    text = module([
        f"%x = f32[{left}]{{0}} parameter(0)", f"%y = f32[{right}]{{0}} parameter(1)",
        f"ROOT %r = f32[{result}]{{0}} convolution(%x, %y), {attributes}",
    ])  # fmt: skip
    assert program_costs(text) == ProgramCosts(flops=flops)


@pytest.mark.parametrize(
    ("opcode", "name", "flops"),
    [
        ("multiply", "jit(f)/dot_general", 2 * 160 * 224),
        ("add", "jit(f)/dot_general", 0),
        ("multiply", "jit(f)/sum", 0),
    ],
)
def test_products_with_vectors_of_tpus(opcode, name, flops):
    text = module([
        "%x = f32[160,224]{1,0} parameter(0)", f"%y = f32[160,224]{{1,0}} {opcode}(%x, %x)",
        f'ROOT %r = f32[224]{{0}} reduce(%y, %z), dimensions={{0}}, to_apply=%add, metadata={{op_name="{name}"}}',
    ])  # fmt: skip
    assert program_costs(text) == ProgramCosts(flops=flops)


def test_ragged_exchange():
    """Only the first operand is sent; the second is where the result goes."""
    operands = [f"%{name} = s32[4]{{0}} parameter({number})" for number, name in enumerate("abcd", start=2)]
    text = module([
        PARAMETER, "%out = f32[96]{0} parameter(1)", *operands,
        "ROOT %r = f32[96]{0} ragged-all-to-all(%p, %out, %a, %b, %c, /*index=5*/%d), replica_groups=[2,4]<=[8]",
    ])  # fmt: skip
    assert program_costs(text).collectives == {"ragged-all-to-all": Traffic(1, 256, 384, 192.0)}


GEMM = """{"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":
{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}""".replace("\n", "")
ESTIMATE = '{"custom_call_config":{"body":"...","cost_estimate":{"flops":"1234","transcendentals":"0"}}}'
LIBRARY = {
    "__cublas$gemm": ("(f32[8,32]{1,0}, s8[4194304]{0})", GEMM, 2 * 8 * 32 * 16),
    "__onednn$matmul": ("f32[16,32]{1,0}", '{"onednn_matmul_config":{}}', 2 * 16 * 32 * 8),
    "__onednn$matmul transposed": ("f32[8,32]{1,0}", '{"onednn_matmul_config":{"transpose_a":true}}', 2 * 8 * 32 * 16),
    "tpu_custom_call": ("f32[8,32]{1,0}", ESTIMATE, 1234),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_library_calls(name):
    """With a left operand [16, 8], or with FLOPs that their author states."""
    result, config, flops = LIBRARY[name]
    text = module([
        "%x = f32[16,8]{1,0} parameter(0)",
        "%y = f32[16,32]{1,0} parameter(1)",
        f'ROOT %r = {result} custom-call(%x, %y), custom_call_target="{name.split()[0]}", backend_config={config}',
    ])  # fmt: skip
    assert program_costs(text) == ProgramCosts(flops=flops)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("pred", 3), ("s4", 2), ("u8", 3), ("f8e4m3fn", 3), ("bf16", 6), ("f32", 12), ("c64", 24), ("token", 0)],
)
def test_bytes(dtype, size):
    assert Shape(dtype, (3, 1)).bytes == size


@pytest.mark.parametrize(
    "text",
    [
        "", "module @jit_f {\n}", "HloModule m\n\n%f (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}",
        module([PARAMETER]), module([PARAMETER, "ROOT %r = f32[64]{0} 7"]),
        module([PARAMETER, "ROOT %r = f32[64]{0} negate(%p"]),
    ],
)  # fmt: skip
def test_other_texts(text):
    with pytest.raises(InputError, match=r"^HLO text: "):
        program_costs(text)


def test_unknown_types():
    with pytest.raises(InputError, match=r"^HLO text: type 'opaque' is not known$"):
        _ = Shape("opaque", ()).bytes
