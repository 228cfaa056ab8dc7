"""`hetmoe quantize`: bits for every digital expert, packed weights, and what is certain of them."""

import dataclasses
import hashlib
import shutil
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.checkpoint.load import load_model, parse_dtype
from hetmoe.checkpoint.save import save_model
from hetmoe.commands.common import choose_text, make_console, write_json
from hetmoe.commands.progress import show_progress
from hetmoe.commands.quantize_report import print_guarantees, print_layers, print_sizes
from hetmoe.errors import InputError
from hetmoe.evaluate.prepare import unevaluated_text
from hetmoe.evaluate.provenance import provenance
from hetmoe.files import check_new_directory, check_writable
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.placement.plan import all_digital
from hetmoe.placement.plan_file import BESIDE_MODEL, load_plan, save_plan
from hetmoe.quantize.allocation import EXPECTED_LOSS, UNIFORM, Allocation, BitRule, allocate
from hetmoe.quantize.driver import check_groups, quantize_experts
from hetmoe.quantize.grid import BITS
from hetmoe.quantize.mixed import refuse_quantized
from hetmoe.quantize.partial import FOLDER, Decided, PartialRun
from hetmoe.quantize.recipe import Recipe
from hetmoe.quantize.sizes import sizes
from hetmoe.sweep.setup import model_identity

READ_TEXT = ("activation_frequency", EXPECTED_LOSS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """The options of `hetmoe quantize`, named as there."""

    model: str
    output: Path | None
    bits: float | None
    levels: str | None
    rule: str | None
    quantizer: str
    initial: str | None
    plan: Path | None
    group: int
    zeros: str
    zeta: float
    max_var: str
    alternative: str
    more_bits: str
    max_bytes: int | None
    text: Path | None
    tokens: int
    seq: int
    seed: int
    dtype: str | None
    report: bool
    report_tokens: int
    json_file: Path | None

    def bit_rule(self) -> BitRule:
        """Rule, average and levels. Raises InputError for what is missing, malformed or contradictory."""
        if self.bits is None and self.max_bytes is None:
            raise InputError("give --bits, the average bits per weight, for example --bits 2.5 --levels 1,2,3")
        levels, rule = self._levels(), self.rule
        if rule is None:
            rule = "router_change" if self.initial is not None else UNIFORM if len(levels) == 1 else "router_norm"
        if self.initial is not None and rule != "router_change":
            raise InputError(f"--initial is for --rule router_change; rule {rule!r} does not look at it")
        for option, value, known in (
            ("alternative", self.alternative, ("paper", "fewest_lowest")),
            ("max-var", self.max_var, ("highest_norm", "all")),
            ("more-bits", self.more_bits, ("rare", "frequent")),
        ):
            if value not in known:
                raise InputError(f"--{option} {value!r} must be {' or '.join(known)}")
        named: Any = {"alternative": self.alternative, "variance": self.max_var, "more_bits": self.more_bits}
        zeta = self.zeta or None
        return BitRule(rule=rule, average=self.bits, levels=levels, zeta=zeta, max_bytes=self.max_bytes, **named)

    def recipe(self) -> Recipe:
        """Quantiser and grids. Raises InputError for names that do not exist."""
        named: Any = {"method": self.quantizer, "zeros": self.zeros}
        return Recipe(group=self.group, **named)

    def _levels(self) -> tuple[int, ...]:
        if self.levels is None:
            if self.bits not in BITS:
                raise InputError(
                    f"no grid has exactly {self.bits} bits: use {', '.join(map(str, BITS))}, or give --levels, the "
                    "bits that an expert may get, for example --levels 1,2,3"
                )
            return (int(self.bits),)
        try:
            return tuple(int(part) for part in self.levels.split(","))
        except ValueError:
            raise InputError(f"--levels {self.levels!r} must be whole numbers with commas, such as 1,2,3") from None

    @property
    def reads_text(self) -> bool:
        """Whether rule or quantiser look at text."""
        return self.quantizer == "gptq" or self.rule in READ_TEXT

    def check(self) -> Path:
        """The output. Raises InputError for values that need neither model nor text to be seen wrong."""
        if self.output is None:
            raise InputError("name a directory for the quantized model: -o DIR")
        for name, least in (("seq", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} {getattr(self, name)} must be at least {least}")
        if self.seed >= 2**32:
            raise InputError(f"--seed {self.seed} must be below 2**32")
        used = {"--tokens": self.reads_text, "--report-tokens": self.report}
        for name, value in (("--tokens", self.tokens), ("--report-tokens", self.report_tokens)):
            if used[name] and value < self.seq:
                raise InputError(f"{name} {value} is less than one window of --seq {self.seq}")
        parse_dtype(self.dtype)
        _check_output(self.output)
        if self.json_file is not None:
            check_writable(self.json_file)
        return self.output


def _check_output(output: Path) -> None:
    """A directory that is new, or holds layers of a run that was stopped (and what it had written beside them)."""
    if not (output / FOLDER).is_dir():
        check_new_directory(output)
    check_writable(output / "config.json")


def run(request: QuantizeRequest) -> None:
    """Quantizes, saves, and reports."""
    how, recipe, output = request.bit_rule(), request.recipe(), request.check()
    console, started = make_console(), time.perf_counter()
    model = load_model(request.model, request.dtype)
    refuse_quantized(model.params, "hetmoe cannot quantize again")
    if (request.reads_text or request.report) and request.seq > model.config.max_position_embeddings:
        raise InputError(f"--seq {request.seq} exceeds the model's context of {model.config.max_position_embeddings}")
    check_groups(model.config, recipe, how.levels)
    plan = all_digital(model.config) if request.plan is None else load_plan(request.plan, model)
    initial = None if request.initial is None else load_model(request.initial, request.dtype)
    windows = _windows(request, model, request.tokens) if request.reads_text else None
    # Read before the work, so that text which cannot be used costs nothing.
    report_text = _windows(request, model, request.report_tokens)[:, :-1] if request.report else None
    partial = PartialRun(output)
    settings = {
        "model": model.name,
        "weights": _weights(model),
        "dtype": str(model.params.embed.dtype),
        **_plain(how),
        **_plain(recipe),
        "initial": None if initial is None else _weights(initial),
        "analog_experts": _digest(np.asarray(plan.experts)),
        "text": None if windows is None else _digest(windows),
        "seed": request.seed,
    }
    decided = partial.begin(settings)
    if decided is not None:
        console.print(f"going on with the layers in {partial.folder}")
        allocation = Allocation(bits=decided.bits, notes=decided.notes)
    else:
        allocation = allocate(
            model, how, recipe, key=jax.random.key(request.seed), windows=windows,
            initial=None if initial is None else initial.params.layers.moe.router, digital=~np.asarray(plan.experts),
        )  # fmt: skip
        partial.decide(settings, Decided(bits=allocation.bits, notes=allocation.notes))
    with show_progress(console, recipe.method, "layers with experts", len(model.config.moe_layers)) as advance:
        quantized, facts = quantize_experts(
            model, allocation.bits, recipe, windows=None if windows is None else windows[:, :-1],
            partial=partial, progress=lambda _: advance(1),
        )  # fmt: skip
    made_by = {"rule": how.rule, "quantizer": recipe.method, "average": float(allocation.average)}
    for left in output.glob(".weights-*"):  # of a run that was killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    save_model(output, quantized, made_by=made_by)
    save_plan(output / BESIDE_MODEL, plan, quantized, made_by=made_by)
    partial.remove()

    console.print(f"[bold]{model.name}[/bold] quantized by {recipe.method}, bits by {how.rule}:")
    notes = [_average_note(how, allocation), *allocation.notes]
    for note in notes:
        console.print(f"  {note}")
    found = sizes(quantized.params)
    print_layers(console, model, np.asarray(plan.experts), allocation.bits, facts)
    print_sizes(console, found, sizes(model.params), output)
    record = {
        "format": "hetmoe-quantize-1", "provenance": provenance(), "settings": settings,
        "model": {"name": model.name, "fingerprint": model_fingerprint(model)},
        "notes": notes, "bits": allocation.bits.tolist(), "layers": facts,
        "sizes": dataclasses.asdict(found) | {"averages": found.averages()},
    }  # fmt: skip
    if report_text is not None:
        record["guarantees"] = print_guarantees(console, model, quantized, recipe, jnp.asarray(report_text))
    console.print(f"quantized model: {output} ({time.perf_counter() - started:.0f} s)")
    if request.json_file is not None:
        write_json(request.json_file, record)
        console.print(f"results: {request.json_file}")


def _windows(request: QuantizeRequest, model: Model, tokens: int) -> np.ndarray:
    """Text apart from what `hetmoe eval` evaluates by default."""
    return unevaluated_text(model, choose_text(request.text), tokens=tokens, seq=request.seq)[0].tokens


def _weights(model: Model) -> str:
    return model_identity(model)["weights_sha256"]


def _average_note(how: BitRule, allocation: Allocation) -> str:
    reached = allocation.average
    if how.average is None:
        return f"{float(reached):.6g} bits on average within {how.max_bytes:,} bytes"
    if reached == Fraction(str(how.average)):
        return f"{how.average:g} bits on average, as asked for"
    if how.rule == EXPECTED_LOSS:
        return f"{float(reached):.6g} bits on average, of at most {how.average!r}"
    return f"{float(reached):.6g} bits on average: the nearest to {how.average!r} that each layer's experts can reach"


def _plain(value: Any) -> Any:
    """A dataclass as JSON would give it back."""
    content = dataclasses.asdict(value)
    return {name: list(part) if isinstance(part, tuple) else part for name, part in content.items()}


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]
