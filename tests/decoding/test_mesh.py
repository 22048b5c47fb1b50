"""A target sharded over several devices says the same as on one."""

import jax
import pytest

import deer_jax
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.sharding import make_mesh
from tests.fast import representing
from tests.tiny import random_params, tiny


@pytest.mark.parametrize("family", representing(["llama", "qwen3_moe"], "llama"))
def test_the_same_tokens_on_a_mesh(family, tmp_path):
    config = tiny(family)
    save_folder(tmp_path / "target", config, random_params(config), stop_ids=[5])
    prompts = [[3, 9, 27], [1], [8, 7, 6, 5, 4, 3, 2, 1]]
    single = deer_jax.load_target(tmp_path / "target")
    plain = deer_jax.decode(single, prompts, max_new_tokens=20)
    target = deer_jax.load_target(tmp_path / "target", mesh=make_mesh(data=1, fsdp=2, tensor=2))
    assert len({shard.device for x in jax.tree.leaves(target.params) for shard in x.addressable_shards}) == 4
    drafter = deer_jax.load_drafter("from-target", target=target)
    result = deer_jax.decode(target, prompts, drafter=drafter, draft_length=3, max_new_tokens=20, batch_size=2)
    assert result.tokens == plain.tokens
