"""A run as a whole: killed, resumed, told to stop, finished; what it refuses."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from plaudit import RevisionChanged, Unavailable
from plaudit import _trees as trees
from plaudit.errors import ConfigurationError, InvalidInput
from plaudit_loops import loop, page, verbs
from plaudit_loops.config import DpoConfig, RlConfig, SftConfig
from plaudit_loops.errors import LoopError
from plaudit_loops.rl import Rl
from plaudit_model import checkpoint
from plaudit_model.errors import CheckpointError
from plaudit_model.interrupt import Interrupted
from plaudit_model.run_folder import Diverged, NotWritten, RunExists, settle


def rl_config(policy: Path, prompts: Path, algo: str = "ppo", **changes: Any) -> RlConfig:
    values = {
        "model.policy": str(policy), "rollout.prompts": [str(prompts)], "algorithm.algo": algo, "steps": 6,
        "rollout.max_new_tokens": 5, "rollout.prompts_per_step": 4, "rollout.group_size": 3, "kl.kl_coef": 0.1,
        "optim.learning_rate": 3e-3, "algorithm.minibatches": 2, "run.report_to": [], "run.checkpoint_every": 2,
        "algorithm.value_warmup_steps": 1, "kl.kl_target": 0.2, "kl.kl_horizon": 50, "kl.kl_budget": 50.0,
        "reward.normalize": "reference", "sample_every": 2,
    } | changes  # fmt: skip
    return trees.changed(RlConfig(), values)


def pays(text: str) -> float:
    return float(text.count("c")) - 0.1 * len(text)


def fingerprint(out: Path) -> dict[str, str]:
    """Metrics, samples, weights, optimiser and state by hash."""
    newest = max((out / "checkpoints").glob("step-*"))
    files = [out / "metrics.jsonl", out / "policy/model.safetensors", *newest.iterdir()]
    files += [out / "samples.jsonl"] if (out / "samples.jsonl").exists() else []
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Killed(BaseException):
    """Strikes where no handler expects it, as a SIGKILL does."""


def killing(computed: Any, at: int, strike: Callable[[], None]) -> Any:
    """Rewards that strike in call number `at`."""

    class Killing(computed):  # type: ignore[misc]
        def submit(self, groups: Any) -> Any:
            if self.calls == at:
                strike()
            return super().submit(groups)

    return Killing(pays)


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
@pytest.mark.parametrize("at", [4, 6])
def test_a_killed_run_goes_on_bit_for_bit(
    algo: str, at: int, tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    config = rl_config(tiny_policy_dir, prompts, algo)
    verbs.rl(config, tmp_path / "whole", quiet, computed(pays))
    with pytest.raises(Killed):
        verbs.rl(config, tmp_path / "out", quiet, killing(computed, at, kill))
    assert (tmp_path / "out/metrics.jsonl").stat().st_size > 0 and not (tmp_path / "out/policy").exists()
    verbs.rl(settle(config, tmp_path / "out", resume=True), tmp_path / "out", quiet, computed(pays))
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "whole")


def test_baselines_of_responses_that_failed_are_gone_on_with(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    """A server that loses one response of the first call, and never again: the mean of the others stands."""

    class Losing(computed):  # type: ignore[misc]
        def submit(self, groups: Any) -> Any:
            lost, answer = self.calls == 0, super().submit(groups)
            return (lambda: np.where(np.arange(answer().size) == 0, np.nan, answer())) if lost else answer

    changes = {"reward.normalize": "prompt", "rollout.prompts_per_step": 2, "reward.max_failed": 0.9}
    config = rl_config(tiny_policy_dir, prompts, **changes, **{"reward.on_error": "none"})
    verbs.rl(config, tmp_path / "whole", quiet, Losing(pays))
    with pytest.raises(Killed):
        verbs.rl(config, tmp_path / "out", quiet, killing(Losing, 5, kill))
    verbs.rl(config, tmp_path / "out", quiet, Losing(pays))
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_exits_with_75(
    number: signal.Signals, tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    config = rl_config(tiny_policy_dir, prompts, **{"run.checkpoint_every": 0})
    verbs.rl(config, tmp_path / "whole", quiet, computed(pays))
    struck = killing(computed, 5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match="after step .* of 6; go on with --resume") as raised:
        verbs.rl(config, tmp_path / "out", quiet, struck)
    assert raised.value.exit_code == 75
    verbs.rl(config, tmp_path / "out", quiet, computed(pays))
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "whole")


def struck_in_update(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """SIGTERM in the middle of a minibatch: before the forward of micro-batch number `at` of the run."""
    calls, loss = count(), Rl._loss

    def striking(*about: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*about)

    monkeypatch.setattr(Rl, "_loss", striking)


@pytest.mark.parametrize(("algo", "minibatches"), [("ppo", 8), ("grpo", 2)])
def test_a_signal_does_not_wait_for_an_update_and_costs_one_minibatch_of_it(
    algo: str, minibatches: int, tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = rl_config(tiny_policy_dir, prompts, algo, **{"run.checkpoint_every": 1, "optim.micro_batch": 3})
    verbs.rl(config, tmp_path / "whole", quiet, whole := computed(pays))
    done = minibatches // 2
    # Two micro-batches to a minibatch. The second signal strikes the resumed update, one minibatch or none later.
    for at, taken in ((2 * (2 * minibatches + done) + 1, done), (2 * (done - 1) + 1, 2 * done - 1)):
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 2 of 6; go on with --resume"):
            struck_in_update(patch, at)
            verbs.rl(config, tmp_path / "out", quiet, computed(pays))
        kept = checkpoint.newest(tmp_path / "out/checkpoints")
        assert kept is not None and kept.step == 2 and kept.state["stage"]["unfinished"]["taken"] == taken
    verbs.rl(config, tmp_path / "out", quiet, again := computed(pays))
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "whole")
    assert again.calls == whole.calls, "what was sampled and scored is not asked for again"


def test_what_is_done_of_the_first_update_is_kept_too(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = rl_config(tiny_policy_dir, prompts, **{"steps": 2})
    verbs.rl(config, tmp_path / "whole", quiet, whole := computed(pays))
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 0 of 2; go on with --resume"):
        struck_in_update(patch, 3)
        verbs.rl(config, tmp_path / "out", quiet, computed(pays))
    verbs.rl(config, tmp_path / "out", quiet, again := computed(pays))
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "whole") and again.calls == whole.calls


def test_a_score_that_failed_before_a_signal_is_counted_as_without_it(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    class Failing(computed):  # type: ignore[misc]
        """Has no score for some texts, and may be struck when the first step begins to sample, its statistics known."""

        struck = False

        def submit(self, groups: Any) -> Any:
            if self.struck and self.answered:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().submit(groups)

    def some(text: str) -> float | None:
        return None if text.count("c") > 1 else pays(text)

    config = rl_config(tiny_policy_dir, prompts, **{"steps": 1, "reward.max_failed": 0.9, "reward.on_error": "none"})
    verbs.rl(config, tmp_path / "whole", quiet, Failing(some))
    struck = Failing(some)
    struck.struck = True
    with pytest.raises(Interrupted, match="after step 0 of 1"):
        verbs.rl(config, tmp_path / "out", quiet, struck)
    verbs.rl(config, tmp_path / "out", quiet, Failing(some))
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "out")]
    assert lines[0] == lines[1] and json.loads(lines[0])["reward/failed"] > 0


def test_the_last_update_is_held_to_the_budget_too(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    changes = {"steps": 3, "optim.learning_rate": 1e-2, "optim.min_lr_ratio": 1.0, "run.checkpoint_every": 1}
    config = rl_config(tiny_policy_dir, prompts, **changes)
    verbs.rl(config, tmp_path / "free", quiet, computed(pays))
    lines = [json.loads(line) for line in (tmp_path / "free/metrics.jsonl").read_text().splitlines()]
    assert ["objective/kl_after" in line for line in lines] == [False, False, True]
    before, after = max(line["objective/kl"] for line in lines), lines[-1]["objective/kl_after"]
    assert after > before > 0
    held = trees.changed(config, {"kl.kl_budget": (before + after) / 2})
    said = io.StringIO()
    verbs.rl(held, tmp_path / "held", Console(file=said, width=200), computed(pays))
    assert f"stopped after step 3 of 3: KL {after:.3f} exceeds the budget" in said.getvalue()
    assert json.loads((tmp_path / "held/report.json").read_text())["stopped"].startswith("KL")
    within = load_file(tmp_path / "held/checkpoints/step-00000002/weights.safetensors")
    policy = load_file(tmp_path / "held/policy/model.safetensors")
    assert all(torch.equal(tensor, within[f"policy.{name}"]) for name, tensor in policy.items())
    freely = load_file(tmp_path / "free/policy/model.safetensors")
    assert not any(torch.equal(tensor, policy[name]) for name, tensor in freely.items())


@pytest.mark.parametrize("normalize", ["none", "reference", "prompt"])
def test_a_signal_does_not_wait_for_a_server_that_is_silent(
    normalize: str, tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    class Silent(computed):  # type: ignore[misc]
        def submit(self, groups: Any) -> Any:
            answer = super().submit(groups)

            def never() -> Any:
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(60)
                return answer()

            return never if self.calls == 4 else answer

    config = rl_config(tiny_policy_dir, prompts, **{"run.checkpoint_every": 0, "reward.normalize": normalize})
    verbs.rl(config, tmp_path / "whole", quiet, computed(pays))
    with pytest.raises(Interrupted, match="SIGTERM after step [1-3] of 6; go on with --resume"):
        verbs.rl(config, tmp_path / "out", quiet, Silent(pays))
    verbs.rl(config, tmp_path / "out", quiet, computed(pays))
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_server_that_is_gone_costs_no_step(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    def gone() -> None:
        raise Unavailable("nobody answers")

    config = rl_config(tiny_policy_dir, prompts, **{"run.checkpoint_every": 0})
    verbs.rl(config, tmp_path / "whole", quiet, computed(pays))
    with pytest.raises(LoopError, match="nobody answers after step") as raised:
        verbs.rl(config, tmp_path / "out", quiet, killing(computed, 5, gone))
    assert raised.value.exit_code == Unavailable.exit_code == 69
    verbs.rl(config, tmp_path / "out", quiet, computed(pays))
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "whole")


def test_what_cannot_be_scored_is_left_out_and_counted(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    config = rl_config(tiny_policy_dir, prompts, "rloo", **{"reward.normalize": "none", "reward.max_failed": 1.0})
    verbs.rl(config, tmp_path / "out", quiet, computed(lambda text: None if text.startswith("a") else pays(text)))
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert sum(line["reward/failed"] for line in lines) > 0
    for line in lines:
        assert line["val/used"] == pytest.approx(1 - line["reward/failed"] / 12)
        assert line["objective/scores"] is not None and abs(line["grad_norm"]) < 1e3


def test_a_step_without_any_score_changes_nothing(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    changes = {"reward.normalize": "none", "reward.max_failed": 1.0, "steps": 2}
    config = rl_config(tiny_policy_dir, prompts, "grpo", **changes)
    verbs.rl(config, tmp_path / "out", quiet, computed(lambda text: None))
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["objective/scores"] for line in lines] == [None, None]
    assert lines[1]["objective/kl"] == pytest.approx(0, abs=1e-6)


def test_too_many_without_a_score_stop_the_run(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    config = rl_config(tiny_policy_dir, prompts, **{"reward.normalize": "none"})
    with pytest.raises(LoopError, match="100% of a step's responses have no score"):
        verbs.rl(config, tmp_path / "out", quiet, computed(lambda text: None))


def failing(computed: Any, fails: Callable[[int], bool]) -> Any:
    """Rewards without a score for the first call's texts, those at the places for which `fails` is true."""

    class Failing(computed):  # type: ignore[misc]
        def submit(self, groups: Any) -> Any:
            answer, first = super().submit(groups), self.calls == 1
            return lambda: np.array([[np.nan if first and fails(i) else x for i, x in enumerate(answer()[0])]])

    return Failing(pays)


@pytest.mark.parametrize("normalize", ["reference", "prompt"])
def test_an_outage_is_no_number_to_normalise_by(
    normalize: str, tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    config = rl_config(tiny_policy_dir, prompts, **{"reward.normalize": normalize, "steps": 3})
    verbs.rl(config, tmp_path / "whole", quiet, computed(pays))
    with pytest.raises(LoopError, match="100% of a step's responses have no score"):
        verbs.rl(config, tmp_path / "out", quiet, failing(computed, lambda place: True))
    verbs.rl(config, tmp_path / "out", quiet, computed(pays))
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_what_the_starting_policy_got_no_score_for_is_left_out_of_the_mean_or_asked_for_again(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    changes = {"reward.max_failed": 1.0, "steps": 2, "reward.reference_samples": 3}
    config = rl_config(tiny_policy_dir, prompts, **changes, **{"reward.normalize": "prompt"})
    verbs.rl(config, tmp_path / "some", quiet, failing(computed, lambda place: place % 3 == 0))
    verbs.rl(config, tmp_path / "none", quiet, failing(computed, lambda place: True))
    used = {
        name: [json.loads(line)["val/used"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("some", "none")
    }
    assert used == {"some": [1.0, 1.0], "none": [0.0, 1.0]}
    config = rl_config(tiny_policy_dir, prompts, **changes)
    with pytest.raises(LoopError, match="no response of the starting policy has a score to normalise by"):
        verbs.rl(config, tmp_path / "all", quiet, failing(computed, lambda place: True))


def test_a_changed_model_stops_the_run(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    def changed() -> None:
        raise RevisionChanged("another model answers")

    with pytest.raises(LoopError, match="another model answers") as raised:
        verbs.rl(rl_config(tiny_policy_dir, prompts), tmp_path / "out", quiet, killing(computed, 5, changed))
    assert raised.value.exit_code == 78


def test_per_prompt_baselines_survive_a_kill_without_being_stored(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    config = rl_config(tiny_policy_dir, prompts, **{"reward.normalize": "prompt", "steps": 4})
    verbs.rl(config, tmp_path / "whole", quiet, computed(pays))
    with pytest.raises(Killed):
        verbs.rl(config, tmp_path / "out", quiet, killing(computed, 4, kill))
    verbs.rl(config, tmp_path / "out", quiet, computed(pays))
    for name in ("metrics.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_responses_are_scored_while_the_next_are_generated(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    class Watching(computed):  # type: ignore[misc]
        events = ""

        def submit(self, groups: Any) -> Any:
            promise = super().submit(groups)
            self.events += "s"

            def wait() -> Any:
                self.events += "w"
                return promise()

            return wait

    rewards = Watching(pays)
    changes = {"rollout.rollout_batch": 3, "reward.normalize": "none", "steps": 2, "kl.kl_budget": 0.0}
    config = rl_config(tiny_policy_dir, prompts, **changes)
    verbs.rl(config, tmp_path / "out", quiet, rewards)
    assert rewards.events == 2 * "sssswwww", "no batch waits for the scores of the one before"


def test_the_first_ratio_of_a_step_is_one(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    config = rl_config(tiny_policy_dir, prompts, **{"algorithm.ppo_epochs": 1, "algorithm.minibatches": 1})
    verbs.rl(config, tmp_path / "out", quiet, computed(pays))
    for line in map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines()):
        assert line["val/ratio"] == pytest.approx(1, abs=1e-5)
        assert line["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9) and line["policy/clipfrac_avg"] == 0
        assert line["val/ratio_var"] == pytest.approx(0, abs=1e-9) and line["val/clipfrac_avg"] == 0
        assert line["val/sampling_error"] < 1e-4


def test_an_adapter_trains_against_the_policy_without_it(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    pytest.importorskip("peft")
    config = rl_config(tiny_policy_dir, prompts, "rloo", **{"model.lora_r": 4, "optim.learning_rate": 3e-2})
    verbs.rl(config, tmp_path / "out", quiet, computed(pays))
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["objective/kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["objective/kl"] > 1e-3
    assert not list((tmp_path / "out/policy").glob("adapter*")), "merged"


def test_sft_learns_the_responses_alone(tiny_policy_dir: Path, tmp_path: Path, quiet: Console) -> None:
    from plaudit_loops.policy import load_policy
    from plaudit_loops.rollout import sample, uniforms

    rows = tmp_path / "rows.jsonl"
    known = {"a": "b c", "d": "e", "g h": "a a a"}
    rows.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in known.items()))
    values = {"data": [str(rows)], "model.policy": str(tiny_policy_dir), "epochs": 80, "batch_size": 3,
              "optim.learning_rate": 1e-2, "run.report_to": []}  # fmt: skip
    verbs.sft(trees.changed(SftConfig(), values), tmp_path / "out", quiet)
    policy = load_policy(tmp_path / "out/policy", device="cpu", autocast=False)
    prompts = [policy.encode_prompt(p) for p in known]
    made = sample(policy, prompts, uniforms(0, "evaluation", [(0, i) for i in range(3)], 8), temperature=0.1)
    assert [policy.decode(r.ids) for r in made] == list(known.values()) and all(r.ended for r in made)


def test_dpo_prefers_what_was_chosen_and_resumes(tiny_policy_dir: Path, tmp_path: Path, quiet: Console) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": p, "chosen": "c c", "rejected": "d"} for p in "abfgh"]
    rows.append({"prompt": [{"role": "user", "content": "e"}], "chosen": [{"role": "assistant", "content": "c c"}],
                 "rejected": "d"})  # type: ignore[dict-item]  # fmt: skip
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"data": [str(pairs)], "model.policy": str(tiny_policy_dir), "epochs": 20, "batch_size": 6,
              "optim.learning_rate": 3e-3, "run.report_to": [], "run.checkpoint_every": 5}  # fmt: skip
    config = trees.changed(DpoConfig(), values)
    verbs.dpo(config, tmp_path / "out", quiet)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5), "log 2 where the policy is its reference"
    assert lines[-1]["accuracy"] == 1 and lines[-1]["rewards/margin"] > 0.1
    assert "aria-label='Implicit rewards'" in (tmp_path / "out/report.html").read_text()
    again = trees.changed(DpoConfig(), values)
    verbs.dpo(again, tmp_path / "again", quiet)
    newest = max((tmp_path / "again/checkpoints").glob("step-*"))
    (newest / "weights.safetensors").write_bytes(b"broken")
    verbs.dpo(again, tmp_path / "again", quiet)
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "out")


def test_gradients_that_are_not_finite_stop_a_run_when_they_come_in_a_row_alone(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, every, loss = count(), 3, Rl._loss

    def overflowing(*about: Any) -> Any:
        found, sums = loss(*about)
        return found * (1e30 if next(calls) % every == 0 else 1), sums  # finite, but not the norm of its gradient

    monkeypatch.setattr(Rl, "_loss", overflowing)
    config = rl_config(tiny_policy_dir, prompts, **{"run.checkpoint_every": 1})
    verbs.rl(config, tmp_path / "out", quiet, computed(pays))
    last = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == 16 > config.optim.max_skipped and last["grad_norm"] is None
    assert "Infinity" not in (tmp_path / "out/report.json").read_text()
    every = 1
    with pytest.raises(Diverged, match="6 gradients in a row are not finite: lower --learning-rate"):
        verbs.rl(config, tmp_path / "all", quiet, computed(pays))


@pytest.mark.parametrize("name", loop.OUTPUTS)
def test_what_is_of_no_run_is_not_overwritten(
    name: str, tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    assert not loop.finished(tmp_path / "out"), "a file of that name is no run"
    with pytest.raises(RunExists, match=f"holds {name} and no run: it would be overwritten; name another --out"):
        verbs.rl(rl_config(tiny_policy_dir, prompts), tmp_path / "out", quiet, computed(pays))
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_what_lies_where_the_starting_policy_is_made_is_not_deleted(tmp_path: Path, quiet: Console) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/notes.txt").write_text("mine")
    with pytest.raises(RunExists, match="base is there and no policy: it would be overwritten; name another --out"):
        verbs.sft(SftConfig(data=("starter",)), tmp_path, quiet)
    assert (tmp_path / "base/notes.txt").read_text() == "mine"


def test_what_is_looked_at_after_a_night(
    tiny_policy_dir: Path,
    prompts: Path,
    computed: Any,
    tmp_path: Path,
    quiet: Console,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out, seen = tmp_path / "a <night>", list[str]()

    class Looking(computed):  # type: ignore[misc]
        def submit(self, groups: Any) -> Any:
            seen.append((out / "report.html").read_text() if (out / "report.html").exists() else "")
            return super().submit(groups)

    verbs.rl(rl_config(tiny_policy_dir, prompts, **{"steps": 3, "run.checkpoint_every": 2}), out, quiet, Looking(pays))
    text = (out / "report.html").read_text()
    titles = ("Score of the reward model", "KL to the starting policy, nats", "Tokens of a response", "Value loss")
    places = [text.index(f"aria-label='{title}'") for title in titles]
    assert places == sorted(places) and text.count("<polygon") == 1, "scores alone have a band"
    assert "kl.kl_budget</text>" in text and "rollout.max_new_tokens</text>" in text
    assert "3 of 3" in text and "<td>a b</td>" in text
    assert "a &lt;night&gt;" in text and "<script" not in text
    assert "Accuracy" not in text, "nothing is drawn that the run does not have"
    assert "2 of 3" in seen[-2] and not seen[1], "a run that goes on is looked at too, as of its last checkpoint"
    (out / "metrics.jsonl").write_text("torn")
    page.write(out, {}, "4 of 9")
    assert "report.html could not be written" in caplog.text and (out / "report.html").read_text() == text


def test_what_a_run_refuses(
    tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    config = rl_config(tiny_policy_dir, prompts, **{"steps": 2})
    out = tmp_path / "out"
    verbs.rl(config, out, quiet, computed(pays))
    stored = trees.read(out / "run.toml", RlConfig)
    assert stored.algorithm.ppo_epochs == 4 and stored.optim.learning_rate == 3e-3, "what was resolved is written"
    with pytest.raises(NotWritten, match="Not a directory"):
        verbs.rl(config, prompts / "out", quiet, computed(pays))
    with pytest.raises(RunExists, match="already holds a run"):
        settle(config, out, resume=False)
    with pytest.raises(ConfigurationError, match="steps is 9, but the run"):
        settle(trees.changed(config, {"steps": 9}), out, resume=True)
    moved = trees.changed(config, {"reward.url": ["http://elsewhere"], "optim.max_skipped": 9})
    settled = settle(moved, out, resume=True)
    assert settled.reward.url == ("http://elsewhere",) and settled.optim.max_skipped == 9
    long = rl_config(tiny_policy_dir, prompts, **{"rollout.max_new_tokens": 62})
    with pytest.raises(ConfigurationError, match="may have 65 tokens, but the policy reads 64: lower --max-new-tokens"):
        verbs.rl(long, tmp_path / "long", quiet, computed(pays))
    prompts.write_text('{"prompt": "a"}\n')
    with pytest.raises(CheckpointError, match="another data"):
        verbs.rl(config, out, quiet, computed(pays))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"promt": "a"}', "line 1: has no 'prompt'; its fields are"),
        ("nonsense", "line 1: .*Expecting value"),
        ("[1]", "line 1: not a JSON object, but list"),
        ('{"messages": [{"role": "user"}]}', "'messages' must be a text or a list of messages"),
        ("", "there are no rows"),
        ('{"prompt": "a \\ud800"}', "line 1: .*surrogates not allowed"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', "line 1: .* nothing that it answers"),
    ],
)
def test_bad_rows_are_named(
    text: str, message: str, tiny_policy_dir: Path, prompts: Path, computed: Any, tmp_path: Path, quiet: Console
) -> None:
    prompts.write_text(text)
    with pytest.raises(InvalidInput, match=message.replace("[", r"\[")):
        verbs.rl(rl_config(tiny_policy_dir, prompts), tmp_path / "out", quiet, computed(pays))
