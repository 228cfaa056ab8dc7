"""The paper's tasks, and the metrics that are reported."""

from typing import Any

PAPER_TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "mathqa", "mmlu")
# acc: the likeliest answer is right; acc_norm: the same by likelihood per character, where lm-eval defines it.
METRICS = ("acc", "acc_norm")

# Of one task on one chip: `questions`, `ties` (questions with several best answers), and for each metric its mean and
# `<metric>_stderr` (of sampling questions, or None); groups have `subtasks` with the same of every task.
Metrics = dict[str, Any]
