"""Costs that a test chooses, instead of those of described hardware."""

import dataclasses

from hetmoe.serving.costs import StepCosts


@dataclasses.dataclass
class ConstantCosts(StepCosts):
    """Every prompt takes `prompt_s` and every decoding step `step_s`, each with one energy; asked steps are kept."""

    prompt_s: float = 1.0
    step_s: float = 0.5
    prompt_j: float = 7.0
    step_j: float = 3.0
    idle_power: float = 2.0
    room: float = 1e9
    position_bytes: float = 1.0
    asked: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    def decode(self, batch: int, context: float) -> tuple[float, float]:
        self.asked.append((batch, context))
        return self.step_s, self.step_j

    def prefill(self, prompt: int) -> tuple[float, float]:
        del prompt
        return self.prompt_s, self.prompt_j
