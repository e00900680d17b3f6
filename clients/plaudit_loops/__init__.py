"""Policy optimisation driven by a served reward model: `plaudit sft`, `plaudit rl`, `plaudit dpo`."""
