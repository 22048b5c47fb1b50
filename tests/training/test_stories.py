"""The whole pipeline on a real pretrained target, in about a minute: answers, alignment, acceptance."""

import json

import pytest

import deer_jax


@pytest.mark.filterwarnings("ignore:.*prompts occur in training rows and are left out:UserWarning")
def test_alignment_raises_the_acceptance_of_a_real_targets_drafter(stories_dir, tmp_path, optimised):
    target = deer_jax.load_target(stories_dir)
    common = {"batch_size": 128, "temperatures": (1.0, 0.6)}
    report = deer_jax.answers(target, None, tmp_path / "answers.jsonl", samples=256, max_new_tokens=95, **common)
    assert (report.written, report.new_tokens) == (256, 256 * 95)
    deer_jax.answers(target, None, tmp_path / "unseen.jsonl", samples=96, max_new_tokens=23, seed=1, **common)
    unseen = [json.loads(line) for line in (tmp_path / "unseen.jsonl").read_text().splitlines()]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"tokens": row["prompt"] + row["answer"]}) + "\n" for row in unseen))
    aligned = deer_jax.align({
        "target": str(stories_dir), "answers": str(tmp_path / "answers.jsonl"), "output": str(tmp_path / "run"),
        "length": 96, "batch": 4, "checkpoint_every": 1000,
        "evaluation": {"prompts": str(held_out), "limit": 40, "every": 1000, "max_new_tokens": 48, "batch_size": 40},
        "stages": [{"steps": 160, "stage": "refinement", "blocks": 24, "learning_rate": 3e-3, "warmup": 20}],
    })  # fmt: skip
    untrained, trained = (aligned.evaluations[step][0] for step in (0, 160))
    assert (untrained.draft_length, untrained.temperature, untrained.prompts) == (8, 0.0, 40)
    # The untrained drafter has its first token for nothing; what is learnt lies behind it.
    assert trained.ci95[0] > untrained.ci95[1]
    assert trained.acceptance_by_depth[1] > 2 * untrained.acceptance_by_depth[1]
    assert aligned.best == 160
