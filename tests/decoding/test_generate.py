"""The real pretrained target says what transformers' own `generate` says."""

import pytest

import deer_jax
from deer_jax.data.tokenizer import Tokenizer

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
