"""TRL's own trainers, with the adapter as their reward function and a running server behind it.

    python benchmarks/trl_grpo.py --python /path/to/venv-with-trl/bin/python [--trainer grpo|rloo] [--steps 20]

TRL lives in an environment of its own (`pip install "trl==1.16.*"`); this script starts `plaudit serve` on the starter
model, then the trainer there, on the CPU, with a tiny untrained policy: once with `Reward`, once with `AsyncReward`.
Afterwards every reward that the trainer was given is asked for again, one by one, and must be the same number.
One row per run goes to results/trl_grpo.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QUESTIONS = ["Name a prime.", "What is 2 + 2?", "Say hello.", "Count to three.", "Name a colour.", "Who wrote Faust?"]
RECORD = "record.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment with TRL")
    parser.add_argument("--model", type=Path, help="reward model; default: the starter model (`plaudit train starter`)")
    parser.add_argument("--trainer", choices=["grpo", "rloo"], default="grpo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--train", nargs=3, metavar=("URL", "MODE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.trainer, arguments.steps, arguments.model, *arguments.train)
        return
    import inputs

    if subprocess.run([arguments.python, "-c", "import trl"], capture_output=True).returncode:
        raise SystemExit("error: an environment with TRL is needed: name its interpreter with --python (see --help)")
    inputs.check(*[] if arguments.model else ["starter"])
    for mode in ("sync", "async"):
        measure(arguments, mode)


def measure(arguments: argparse.Namespace, mode: str) -> None:
    import rows
    from processes import free_port, plaudit_command, serving

    from plaudit import Client
    from plaudit_model.starter import directory

    model = arguments.model or directory()
    port = free_port()
    with serving(plaudit_command(model, port), port) as url, tempfile.TemporaryDirectory() as folder:
        own = [os.fspath(Path(__file__).resolve().parent.parent / "clients")]
        subprocess.run(
            [arguments.python, __file__, "--train", url, mode, folder, "--model", model,
             "--trainer", arguments.trainer, "--steps", str(arguments.steps)],
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(own), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        record = json.loads(Path(folder, RECORD).read_text(encoding="utf-8"))
        with Client(url) as client:
            again = [client.score(prompt, completion[0]["content"]).score for prompt, completion, _ in record["calls"]]
    given = [reward for *_, reward in record["calls"]]
    if again != given or None in given or len(given) != record["completions"]:
        raise SystemExit(f"{mode}: the trainer was given other rewards than the server gives")
    logged = record["logs"][-1]
    rows.append(
        "trl_grpo",
        {
            "trainer": f"trl-{record['trl']}-{arguments.trainer}",
            "mode": mode,
            "steps": len(record["logs"]),
            "rewards": len(given),
            "differences": 0,
            "logged_failed": logged["plaudit/failed"],
            "logged_revision_changes": logged["plaudit/revision_changes"],
            "reward_seconds": round(record["reward_seconds"], 3),
            "train_seconds": round(record["train_seconds"], 3),
        },
    )


def train(trainer: str, steps: int, model: Path, url: str, mode: str, folder: str) -> None:
    """Runs where TRL is. Writes what the trainer was given, and what it logged, into `folder`."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    from plaudit.adapters.hacking import HackingLimits, RewardHackingMonitor
    from plaudit.adapters.trl import AsyncReward, HackingCallback, Reward

    set_seed(0)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("qwen3", vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=16, **shape)
    policy = Path(folder, "policy")  # a directory, because a trainer with a reference model loads it a second time
    AutoModelForCausalLM.from_config(config).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    reward = (AsyncReward if mode == "async" else Reward)(url, max_length=64)
    calls: list[Any] = []
    spent = _listen(reward, calls)
    trainer_class, config_class = (
        (trl.GRPOTrainer, trl.GRPOConfig) if trainer == "grpo" else (trl.RLOOTrainer, trl.RLOOConfig)
    )
    options = {"output_dir": folder, "max_steps": steps, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    runner = trainer_class(
        model=str(policy),
        reward_funcs=reward,
        args=config_class(
            **options, per_device_train_batch_size=8, num_generations=4, max_completion_length=16, use_cpu=True,
            bf16=False, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": q}], "id": q} for q in QUESTIONS]),
        processing_class=tokenizer,
        callbacks=[HackingCallback(RewardHackingMonitor(HackingLimits(kl=1e6)))],
    )  # fmt: skip
    started = time.perf_counter()
    runner.train()
    took = time.perf_counter() - started
    logs = [entry for entry in runner.state.log_history if "reward" in entry]
    assert all(f"rewards/{reward.__name__}/mean" in entry for entry in logs), logs[-1]
    record = {"calls": calls, "completions": 8 * steps, "logs": logs, "trl": trl.__version__}
    record |= {"reward_seconds": sum(spent), "train_seconds": took}
    Path(folder, RECORD).write_text(json.dumps(record), encoding="utf-8")


def _listen(reward: Any, calls: list[Any]) -> list[float]:
    """Record what the reward function is called with and what it gives, and the seconds of each call. The trainer
    still holds the very object that a user would pass."""
    spent: list[float] = []
    settle, items = reward._settle, reward._items

    def listening_items(prompts: Any, completions: Any) -> Any:
        calls.extend([prompt, completion, None] for prompt, completion in zip(prompts, completions, strict=True))
        spent.append(-time.perf_counter())
        return items(prompts, completions)

    def listening_settle(*arguments: Any) -> Any:
        rewards = settle(*arguments)
        spent[-1] += time.perf_counter()
        for call, value in zip(calls[-len(rewards) :], rewards, strict=True):
            call[2] = value
        return rewards

    reward._items, reward._settle = listening_items, listening_settle
    assert inspect.iscoroutinefunction(reward) == asyncio.iscoroutinefunction(reward.__call__)
    return spent


if __name__ == "__main__":
    main()
