"""A second form of the model of a step: float64, one expert, matrix and number of copies after the other.

Written from the definitions in the issue's terms (roofline, tile operations, queues), not from hetmoe's code; it knows
two kinds of attention and every kind of module.
"""

import math
from typing import Any

import numpy as np
from scipy import stats

from hetmoe.models.config import ModelConfig

Matrices = list[list[tuple[int, int]]]  # stages of matrices, inputs x outputs


def modules(c: ModelConfig) -> dict[str, Matrices]:
    h = c.hidden_size
    if c.latent is None:
        kv = c.num_kv_heads * c.head_dim
        attention: Matrices = [[(h, c.num_heads * c.head_dim), (h, kv), (h, kv)], [(c.num_heads * c.head_dim, h)]]
    else:
        m = c.latent
        q = c.num_heads * (m.content_dim + m.rope_dim)
        first, second = [(h, m.kv_rank + m.rope_dim)], [(m.kv_rank, c.num_heads * (m.content_dim + m.value_dim))]
        if m.query_rank is None:
            first.append((h, q))
        else:
            first.append((h, m.query_rank))
            second.append((m.query_rank, q))
        attention = [first, second, [(c.num_heads * m.value_dim, h)]]

    def network(inner: int) -> Matrices:
        return [[(h, inner), (h, inner)], [(inner, h)]]

    found = {"attention": attention, "experts": network(c.expert_intermediate_size)}
    if c.shared_intermediate_size is not None:
        found["shared_experts"] = network(c.shared_intermediate_size)
    if c.dense_intermediate_size is not None:
        found["dense_ffn"] = network(c.dense_intermediate_size)
    return found | {"lm_head": [[(h, c.vocab_size)]]}


def count(matrices: Matrices) -> int:
    return sum(k * n for stage in matrices for k, n in stage)


def ends(matrices: Matrices) -> int:
    return sum(k + n for stage in matrices for k, n in stage)


MEMORY = {"weights": "weights", "cache": "kv_cache", "activations": "activations"}
ASKED = (*MEMORY, "flops", "vectors", "queue", "used", "exchanged", "transfers")


class PlainModel:
    """Hardware is a flat dict of SI numbers."""

    def __init__(self, config: ModelConfig, hardware: dict[str, float]) -> None:
        self.c, self.hw, self.modules = config, hardware, modules(config)

    def tiles(self, stage: list[tuple[int, int]]) -> int:
        return sum(math.ceil(k / self.hw["rows"]) * math.ceil(n / self.hw["columns"]) for k, n in stage)

    def step(self, where: dict[str, np.ndarray], sizes: dict[str, Any], load: dict[str, Any]) -> dict[str, float]:
        """`where` True = analog, by kind; `sizes` weight, element and expert bytes; `load` what the step is."""
        c, hw = self.c, self.hw
        planes = 0.0
        for name, matrices in self.modules.items():
            planes += float(np.sum(where[name])) * sum(self.tiles(stage) for stage in matrices)
        chips = hw["chips"] or math.ceil(planes / (hw["tiles"] * hw["planes"]))
        chips = chips if planes else 0
        held = chips * hw["tiles"] * hw["planes"]
        away = max(0.0, 1 - held / planes) if planes else 0.0
        total = dict.fromkeys(
            ("weights", "kv_cache", "activations", "compute", "queue", "shared_tiles", "programming",
             "link_bandwidth", "link_latency"), 0.0,
        )  # fmt: skip
        sums = dict.fromkeys(("digital_time", "traffic", "operations", "exchanged", "programmed"), 0.0)
        moe = 0
        dense = 0
        for layer in range(c.num_layers):
            here = [("attention", layer)]
            if layer in c.dense_layers:
                here.append(("dense_ffn", dense))
                dense += 1
            else:
                here.append(("experts", moe))
                if c.shared_intermediate_size is not None:
                    here.append(("shared_experts", moe))
                moe += 1
            branches: list[dict[str, float]] = []
            for name, index in here:
                one = self.kind(name, index, layer, where, sizes, load, chips, away, sums)
                if load["schedule"] == "overlap" and name in ("experts", "shared_experts"):
                    branches.append(one)
                else:
                    self.add(total, one)
            if branches:
                names = ("weights", "kv_cache", "activations", "compute")
                digital = sum(b[n] for b in branches for n in names)
                other = sum(v for b in branches for n, v in b.items() if n not in names)
                for branch in branches:
                    self.add(total, {n: v for n, v in branch.items() if (n in names) == (digital >= other)})
        self.add(total, self.kind("lm_head", 0, -1, where, sizes, load, chips, away, sums))
        time = sum(total.values())
        energy = (
            hw["busy"] * sums["digital_time"] + hw["idle"] * max(time - sums["digital_time"], 0)
            + sums["operations"] * hw["operation_energy"] + sums["programmed"] * hw["programming_energy"]
            + chips * hw["static"] * time + sums["exchanged"] * hw["link_energy"]
        )  # fmt: skip
        return {
            "step_time": time, "tokens_per_s": load["tokens"] / time, "joules_per_token": energy / load["tokens"],
            "memory_traffic": sums["traffic"], "operations": sums["operations"], "tiles": planes, "chips": chips,
            "area": chips * hw["tiles"] * hw["area"],
            "memory_used": self.memory(where, sizes, load), **{f"part_{n}": v for n, v in total.items()},
        }  # fmt: skip

    @staticmethod
    def add(total: dict[str, float], more: dict[str, float]) -> None:
        for name, value in more.items():
            total[name] += value

    def kind(
        self, name: str, index: int, layer: int, where: dict[str, np.ndarray], sizes: dict[str, Any],
        load: dict[str, Any], chips: float, away: float, sums: dict[str, float],
    ) -> dict[str, float]:  # fmt: skip
        if name == "experts":
            asked = self.of_experts(where["experts"][index], sizes["experts"][index], sizes, load, index)
        else:
            analog = bool(np.asarray(where[name]).reshape(-1)[index])
            asked = self.of_dense(name, analog, sizes, load)
            if name == "attention":
                self.add_attention(asked, analog, layer, sizes, load)
        return self.times(name, asked, load, chips, away, sums)

    def of_experts(
        self, analog: np.ndarray, stored: np.ndarray, sizes: dict[str, Any], load: dict[str, Any], index: int
    ) -> dict[str, float]:
        matrices, f, tokens, size = self.modules["experts"], load["frequency"][index], load["tokens"], sizes["element"]
        asked = dict.fromkeys(ASKED, 0.0)
        for e, share in enumerate(f):
            needed = 1 - (1 - share) ** tokens
            if analog[e]:
                asked["vectors"] += tokens * share
                asked["used"] += needed
            else:
                asked["weights"] += needed * stored[e]
                asked["flops"] += tokens * share * 2 * count(matrices)
                asked["activations"] += tokens * share * ends(matrices) * size
        if analog.any():
            below = [np.prod([stats.binom.cdf(m, tokens, share) for share in f[analog]]) for m in range(tokens)]
            asked["queue"] = float(np.sum(1 - np.array(below)))
            asked["exchanged"] = min(asked["vectors"], tokens) * 2 * self.c.hidden_size * size
            asked["transfers"] = 2 * (1 - float(np.prod([(1 - share) ** tokens for share in f[analog]])))
        return asked

    def of_dense(self, name: str, analog: bool, sizes: dict[str, Any], load: dict[str, Any]) -> dict[str, float]:
        matrices, h, size = self.modules[name], self.c.hidden_size, sizes["element"]
        tokens = load["logits"] if name == "lm_head" else load["tokens"]
        asked = dict.fromkeys(ASKED, 0.0)
        if not analog:
            weights, flops = count(matrices) * sizes["weight"], 2 * count(matrices) * tokens
            return asked | {"weights": weights, "flops": flops, "activations": ends(matrices) * tokens * size}
        elements, trips = h + matrices[-1][0][1], 1
        if name == "attention":
            inputs = h + sum(k for stage in matrices[1:] for k, _ in stage)
            elements, trips = inputs + sum(n for stage in matrices for _, n in stage), len(matrices)
        moved = {"exchanged": tokens * elements * size, "transfers": 2 * trips}
        return asked | {"vectors": tokens, "queue": tokens, "used": 1} | moved

    def add_attention(
        self, asked: dict[str, float], analog: bool, layer: int, sizes: dict[str, Any], load: dict[str, Any]
    ) -> None:
        c, tokens, size = self.c, load["tokens"], sizes["element"]
        elements, per_pair = self.cache(analog)
        asked["cache"] = elements * (load["cached"] + tokens) * size
        asked["flops"] += tokens * load["attended"] * per_pair
        if layer not in c.dense_layers:
            asked["weights"] += c.hidden_size * c.num_experts * sizes["weight"]
            asked["activations"] += (c.hidden_size + c.num_experts) * tokens * size
            asked["flops"] += 2 * c.hidden_size * c.num_experts * tokens
        if layer == 0:
            asked["weights"] += tokens * c.hidden_size * sizes["weight"]

    def times(
        self, name: str, asked: dict[str, float], load: dict[str, Any], chips: float, away: float,
        sums: dict[str, float],
    ) -> dict[str, float]:  # fmt: skip
        hw, matrices = self.hw, self.modules[name]
        tiles = sum(self.tiles(stage) for stage in matrices)
        memory = {new: asked[n] / hw["bandwidth"] for n, new in MEMORY.items()}
        compute = asked["flops"] / hw["rate"]
        bound = sum(memory.values()) >= compute
        times = {n: v if bound else 0.0 for n, v in memory.items()} | {"compute": 0.0 if bound else compute}
        sums["digital_time"] += sum(times.values())
        sums["traffic"] += sum(asked[n] for n in MEMORY)
        sums["operations"] += asked["vectors"] * tiles
        sums["exchanged"] += asked["exchanged"]
        sums["programmed"] += away * asked["used"] * tiles
        times |= {"queue": 0.0, "shared_tiles": 0.0}
        stages = [asked["vectors"] * self.tiles(stage) / max(chips * hw["tiles"], 1) for stage in matrices]
        waits = [asked["queue"]] * len(stages)
        if load["schedule"] == "overlap" and name != "attention":
            waits, stages = [asked["queue"] + len(stages) - 1 if asked["queue"] else 0.0], [sum(stages)]
        for wait, turn in zip(waits, stages, strict=True):
            times["queue" if wait >= turn else "shared_tiles"] += max(wait, turn) * hw["operation_time"]
        programming = away * asked["used"] * tiles * hw["programming_time"] / max(chips, 1) if away else 0.0
        return times | {
            "programming": programming, "link_bandwidth": asked["exchanged"] / hw["link_bandwidth"],
            "link_latency": asked["transfers"] * hw["link_latency"],
        }  # fmt: skip

    def cache(self, analog: bool) -> tuple[float, float]:
        """(elements per position, FLOP per query and position): a multiply-add is two."""
        c = self.c
        if c.latent is None:
            return 2 * c.num_kv_heads * c.head_dim, 2 * c.num_heads * c.head_dim * 2
        m = c.latent
        if analog:  # keys and values of all heads
            key, value = m.content_dim + m.rope_dim, m.value_dim
            return c.num_heads * (key + value), 2 * c.num_heads * (key + value)
        return m.kv_rank + m.rope_dim, 2 * c.num_heads * (m.kv_rank + m.rope_dim) + 2 * c.num_heads * m.kv_rank

    def memory(self, where: dict[str, np.ndarray], sizes: dict[str, Any], load: dict[str, Any]) -> float:
        c = self.c
        total = float(np.sum(np.where(where["experts"], 0.0, sizes["experts"])))
        for name, matrices in self.modules.items():
            if name != "experts" and not (name == "lm_head" and c.tie_embeddings):
                total += float(np.sum(~np.asarray(where[name]))) * count(matrices) * sizes["weight"]
        routers = (c.num_layers - len(c.dense_layers)) * c.hidden_size * c.num_experts
        total += (c.vocab_size * c.hidden_size + routers) * sizes["weight"]
        for analog in np.asarray(where["attention"]):
            total += self.cache(bool(analog))[0] * load["held"] * sizes["element"]
        return total
