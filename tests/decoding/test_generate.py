"""The real pretrained target says what transformers' own `generate` says; and no stop token is in a text."""

import dataclasses

import pytest

import deer_jax
from deer_jax.data.tokenizer import Tokenizer
from tests.doubles import Pieces, table_drafters
from tests.tiny import random_params, tiny

PROMPTS = [
    "Once upon a time", "Lily and Tom", "One day, a big dog", "The sun was hot", "Mom gave Ben a red ball",
    "There was an old tree", "Anna was sad because", "In the forest lived a bear", "It was raining, so",
    "The little boat", "Max had a secret box", "A kind man sold apples", "The cat sat on", "Sara likes to draw",
    "He saw a bird", "They went to the park", "\"Look!\" said the boy", "Every night, the moon", "Sam was scared of",
    "A girl named Mia",
]  # fmt: skip


def test_greedy_text_equals_that_of_transformers(stories_dir):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32).eval()
    tokenizer = Tokenizer.load(stories_dir)
    target = deer_jax.load_target(stories_dir, dtype="float32")
    drafter = deer_jax.load_drafter("from-target", target=target)
    plain = deer_jax.decode(target, PROMPTS, max_new_tokens=60)
    drafted = deer_jax.decode(target, PROMPTS, drafter=drafter, draft_length=4, max_new_tokens=60)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            new = model.generate(ids, do_sample=False, max_new_tokens=60, pad_token_id=0)[0, ids.shape[1] :].tolist()
        text = tokenizer.decode([token for token in new if token not in target.stop_ids])
        assert plain.tokens[i] == new, prompt
        assert plain.texts[i] == drafted.texts[i] == text, prompt


@pytest.mark.parametrize("drafted", [False, True])
def test_a_stop_token_that_is_ordinary_text_is_no_part_of_the_answer(drafted):
    config = tiny("qwen3", vocab_size=48, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=24)
    target = deer_jax.Target(config=config, params=random_params(config, 5, scan=False))
    prompts, options = [[8, 9]], {"max_new_tokens": 12}
    (free,) = deer_jax.decode(target, prompts, **options).tokens
    at = next(i for i in range(2, 12) if free[i] not in free[:i])
    if drafted:  # the stop token ends a block of accepted drafts
        right = table_drafters(target, prompts, [free])["right"]
        options |= {"drafter": right, "draft_length": 3}
    pieces = {token: f"<{token}>".encode() for token in range(48)}  # every token has a text
    spoken = dataclasses.replace(target, tokenizer=Pieces(pieces), stop_ids=(free[at],))
    for ignore_stop, tokens, said in ((False, free[: at + 1], free[:at]), (True, free, free)):
        result = deer_jax.decode(spoken, prompts, **options, ignore_stop=ignore_stop)
        assert result.tokens == [tokens]
        assert result.texts == ["".join(f"<{token}>" for token in said)]
        assert "".join(deer_jax.stream(spoken, prompts, **options, ignore_stop=ignore_stop)) == result.texts[0]
