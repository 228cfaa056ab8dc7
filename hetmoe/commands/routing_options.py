"""Options that say how often experts are chosen, shared by the commands that estimate hardware."""

import dataclasses
from pathlib import Path

from hetmoe.commands.common import choose_text
from hetmoe.commands.described_model import DescribedModel, has_weights
from hetmoe.errors import InputError
from hetmoe.evaluate.text import load_windows, split_windows
from hetmoe.files import check_writable
from hetmoe.hardware.routing_file import RoutingStatistics, load_routing, observe_routing, save_routing

TEXT, UNIFORM = "text", "uniform"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """Named as on the command line."""

    model: str
    routing: str | None
    save_routing: Path | None
    text: Path | None
    tokens: int
    seq: int

    def check_routing(self) -> None:
        """Raises InputError for values that are wrong whatever the model."""
        for name in ("tokens", "seq"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.text is not None and self.how_routed not in (None, TEXT):
            raise InputError(f"--text is for routing that is measured: leave out --routing {self.routing}")
        if self.save_routing is not None:
            if self.how_routed != TEXT:
                raise InputError("--save-routing keeps routing that was measured: give --routing text")
            check_writable(self.save_routing)

    @property
    def how_routed(self) -> str:
        """`text`, `uniform`, or a file: as given, else by what is at hand."""
        if self.routing is not None:
            return self.routing
        return TEXT if self.text is not None or has_weights(self.model) else UNIFORM

    def statistics(self, described: DescribedModel) -> RoutingStatistics | None:
        """Measured (and saved, if so asked), or read; None where all experts are chosen equally often."""
        if self.how_routed == UNIFORM:
            return None
        if self.how_routed != TEXT:
            return load_routing(Path(self.how_routed), described.config, described.identity)
        model = described.model
        assert model is not None
        if self.seq > model.config.max_position_embeddings:
            raise InputError(f"--seq {self.seq} exceeds the model's context of {model.config.max_position_embeddings}")
        sources = load_windows(model, choose_text(self.text), self.seq)
        count = min(max(self.tokens // self.seq, 1), sum(len(s) for s in sources))
        windows, _ = split_windows(sources, count, 0)
        statistics = observe_routing(model, windows.tokens[:, :-1])
        if self.save_routing is not None:
            text = "embedded held-out text" if self.text is None else self.text.name
            assert described.identity is not None
            save_routing(self.save_routing, statistics, name=described.name, identity=described.identity, text=text)
        return statistics
