"""Options that say what is analog, shared by the commands that run one placement."""

import dataclasses
from pathlib import Path

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.evaluate.noise_sweep import Placement
from hetmoe.evaluate.rules import Scorer
from hetmoe.evaluate.text import Windows
from hetmoe.models.model import Model
from hetmoe.placement.plan import PLACEMENTS, digital_count
from hetmoe.placement.plan_file import load_plan
from hetmoe.placement.scores import RULES


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    """A saved plan, a placement by name, or a rule with a fraction of digital experts; named as on the command line."""

    plan: Path | None
    rule: str | None
    fraction: float | None
    placement: str | None
    down_axis: str
    seed: int

    def check_placement(self) -> None:
        """Raises InputError for more than one placement, or one that does not exist."""
        by_rule = self.fraction if self.rule is None else self.rule
        ways = {"--plan": self.plan, "--placement": self.placement, "--rule or --digital": by_rule}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise InputError(f"one placement at a time: give only one of {', '.join(given)}")
        if self.placement is not None and self.placement not in PLACEMENTS:
            raise InputError(f"unknown placement {self.placement!r}: use one of {', '.join(PLACEMENTS)}")
        if self.rule is not None and self.rule not in RULES:
            raise InputError(f"unknown rule {self.rule!r}: use one of {', '.join(RULES)}")
        if self.fraction is not None:
            digital_count(self.fraction, 1)

    def chosen_placement(
        self, model: Model, sample: Windows | None, calibration: Calibration | None, spec: AnalogSpec, seeds: int
    ) -> Placement:
        """The one placement that was asked for; by default the rule's.

        `sample` and `spec` (`scoring_scale`) are what rules look at (plans and names need no text: None); `random` is
        drawn for each of `seeds`.
        """
        if self.plan is not None:
            return Placement(name=f"plan {self.plan.stem}", plans=[load_plan(self.plan, model)])
        if self.placement is not None:
            return Placement(name=self.placement.replace("_", " "), plans=[PLACEMENTS[self.placement](model.config)])
        rule = "max_neuron_norm" if self.rule is None else self.rule
        fraction = 0.125 if self.fraction is None else self.fraction
        assert sample is not None
        scorer = Scorer(model=model, sample=sample, down_axis=self.down_axis, seed=self.seed, calibration=calibration)
        return scorer.placements(rule, [fraction], seeds, spec)[0]
