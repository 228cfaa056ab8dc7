"""Sweeps made up for tests: smooth functions of the settings, with a noise per seed that placements share."""

import math

import numpy as np

from hetmoe.sweep.points import SweepPoint
from hetmoe.sweep.store import SweepRecord, SweepResult

TOKENS, BYTES, QUESTIONS = 4096, 16000, 1200
CROSSBAR, EXPERTS_SHARE = 1_000_000, 0.8
RULES = ("max_neuron_norm", "router_norm", "random")
_STRENGTH = {"max_neuron_norm": 1.6, "router_norm": 0.8, "random": 1.0}


def make_result(point, perplexity, accuracy):
    share = {"all_digital": 1.0, "experts_analog": 1 - EXPERTS_SHARE, "all_analog": 0.0}.get(
        point.placement, 1 - EXPERTS_SHARE * (1 - (point.fraction or 0))
    )
    nll = math.log(perplexity) * TOKENS
    return SweepResult(
        point=point, nll=nll, correct=0.0 if accuracy is None else accuracy * QUESTIONS, tokens=TOKENS, bytes=BYTES,
        questions=0 if accuracy is None else QUESTIONS, perplexity=perplexity,
        bits_per_byte=nll / math.log(2) / BYTES, accuracy=accuracy,
        digital_parameters=round(share * CROSSBAR), crossbar_parameters=CROSSBAR,
        provenance={
            "command": ["hetmoe", "sweep", "rules.toml"], "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
            "git_revision": "abc123", "device_kind": "cpu", "started_utc": "2026-11-22T10:00:00+00:00",
            "ended_utc": f"2026-11-22T10:0{point.seed_index % 10}:30+00:00", "seconds": 2.5,
            "key_words": [point.seed_index, 7],
        },
    )  # fmt: skip


def make_point(placement="experts_analog", fraction=None, device="pcm", scale=1.0, time_s=None, bits=8, seed=0):
    return SweepPoint(
        placement=placement, fraction=fraction, device=device, noise_scale=scale, time_s=time_s, bits=bits,
        seed_index=seed,
    )  # fmt: skip


def digital_result(accuracy=0.8):
    return make_result(make_point("all_digital", device="none", scale=0.0, bits=0), 31.0, accuracy)


def make_record(
    *, rules=RULES, fractions=(0.125, 0.25), scales=(0.0, 1.0, 2.5, 5.0, 10.0), devices=("pcm",), times=(None,),
    bits=(8,), seeds=4, accuracy=True, layers=4, experts=16, name="reference",
):  # fmt: skip
    """A whole grid; `all_analog` fails outright at large noise."""
    random = np.random.default_rng(3)
    lines = [("experts_analog", None), ("all_analog", None), *((r, f) for r in rules for f in fractions)]
    results = [digital_result(0.8 if accuracy else None)]
    for device, time_s, number in ((d, t, b) for d in devices for t in times for b in bits):
        for scale in scales:
            shared = random.normal(0, 1, seeds)
            for placement, fraction in lines:
                quiet = scale == 0 and (time_s is None or device == "reram_wan") and placement != "random"
                for seed in range(1 if quiet else seeds):
                    harm = scale * (1 - _STRENGTH.get(placement, 1.0) * (fraction or 0)) / 10
                    harm *= 1 if time_s is None else 1 + 0.1 * math.log10(time_s)
                    harm += 0.01 if number else 0.0
                    harm += 0 if quiet else (0.01 * shared[seed] + 0.004 * random.normal()) * math.sqrt(scale + 0.05)
                    nats = harm * (10 if placement == "all_analog" else 0.7)
                    right = 0.25 + 0.55 * math.exp(-max(nats, 0)) if accuracy else None
                    point = make_point(placement, fraction, device, scale, time_s, number, seed)
                    results.append(make_result(point, 31.0 * math.exp(nats), right))
    scores = {rule: random.gamma(4, 1, (layers, experts)).tolist() for rule in rules if rule != "random"}
    config = {
        "model": name, "dtype": "float32", "text": {"files": [], "tokens": TOKENS},
        "grid": {
            "placements": ["all_digital", "experts_analog", "all_analog"], "rules": list(rules),
            "fractions": list(fractions), "devices": list(devices), "noise_scales": list(scales),
            "times": ["programmed" if t is None else t for t in times], "bits": list(bits), "seeds": seeds, "seed": 0,
        },
        "hardware": {"input_range": "ema_std", "adc_bound": 3.0, "drift_compensation": False},
    }  # fmt: skip
    return SweepRecord(
        config=config,
        model={
            "name": name,
            "fingerprint": "0123456789abcdef",
            "config": {"num_layers": layers, "num_experts": experts, "hidden_size": 256, "experts_per_token": 4},
        },
        code={"version": "0.1.0", "digest": "feedbeef", "jax": "0.10.2"},
        scores=scores,
        frequencies=random.dirichlet(np.full(experts, 2.0), layers).tolist(),
        points=len(results),
        results=results,
        failures=[],
    )
