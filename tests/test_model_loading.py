"""Model folders: what pellucid saves, plain transformers loads; what is no model is a one-line DataError."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_llama_gqa, tiny_qwen2
from tiny_runs import padded, ragged_rows, tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pellucid.errors import DataError
from pellucid.execution.local import save_model
from pellucid.models import CausalLM, load_causal_lm, load_scalar_model

PAD = 5
ARCHITECTURES = {"llama": tiny_llama, "tied": tiny_llama_gqa, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}


@pytest.fixture(params=ARCHITECTURES)
def policy(request, tmp_path):
    """A saved policy of each architecture."""
    ARCHITECTURES[request.param]().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def without_pads(rows):
    """transformers pools the rightmost token that is not pad, so the last one of these must not be."""
    return [[*row, 1] for row in rows]


def test_saved_policy_loads_with_auto_model_and_gives_the_same_numbers(policy, tmp_path):
    model = load_causal_lm(str(policy), "cpu", "float32")
    save_model(model, tokenizer(), tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    ids, mask = padded(ragged_rows())
    with torch.no_grad():
        ours, _ = model.logprobs(ids, mask, mask, 1.0)
        every = plain(input_ids=ids, attention_mask=mask.long()).logits.log_softmax(-1)
    theirs = every[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours[:, 1:][mask[:, 1:]], theirs[mask[:, 1:]], atol=2e-5, rtol=1e-5)
    assert sorted(p.name for p in (tmp_path / "saved").glob("*.safetensors")) == ["model.safetensors"]


def test_saved_reward_model_gives_plain_transformers_numbers_minus_score_shift(policy, tmp_path):
    """config.score_shift is ours: what plain transformers returns is our score + score_shift."""
    model = load_scalar_model(str(policy), "cpu", "float32", PAD, seed=1)
    model.set_shift(1.75)
    save_model(model, tokenizer(), tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert plain.config.num_labels == 1 and plain.config.pad_token_id == PAD
    ids, mask = padded(without_pads(ragged_rows()), pad_id=PAD, extra=2)
    with torch.no_grad():
        theirs = plain(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
        ours = model.scores(ids, mask)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["score_shift"] == 1.75
    torch.testing.assert_close(ours, theirs - plain.config.score_shift, atol=2e-5, rtol=1e-5)


def test_critic_starts_from_the_reward_model(policy, tmp_path):
    reward = load_scalar_model(str(policy), "cpu", "float32", PAD, seed=1)
    reward.set_shift(-0.5)
    save_model(reward, tokenizer(), tmp_path / "reward")
    critic = load_scalar_model(str(tmp_path / "reward"), "cpu", "float32", PAD, seed=99)
    ids, mask = padded(ragged_rows())
    with torch.no_grad():
        assert critic.shift == -0.5
        assert critic.values(ids, mask, mask).equal(reward.values(ids, mask, mask))
        # The value before a token is the score of what came before it.
        torch.testing.assert_close(critic.values(ids, mask, mask)[1, 4], reward.scores(ids[1:2, :4], mask[1:2, :4])[0])


def test_a_policy_as_reward_model_is_refused(policy):
    with pytest.raises(DataError, match=r"policy: not a model with one scalar output named 'score', it lacks score"):
        load_scalar_model(str(policy), "cpu", "float32", PAD)


def test_a_reward_model_as_policy_is_refused(policy, tmp_path):
    """With tied embeddings no weight is missing: the head is the embedding."""
    load_scalar_model(str(policy), "cpu", "float32", PAD, seed=1).hf.save_pretrained(tmp_path / "reward")
    with pytest.raises(DataError, match="reward: not a causal language model"):
        load_causal_lm(str(tmp_path / "reward"), "cpu", "float32")


def test_a_classifier_with_two_labels_is_refused(tmp_path):
    from transformers import LlamaForSequenceClassification

    LlamaForSequenceClassification(tiny_llama(num_labels=2, pad_token_id=0).config).save_pretrained(tmp_path / "two")
    with pytest.raises(DataError, match="two: "):
        load_scalar_model(str(tmp_path / "two"), "cpu", "float32", PAD)


def test_weights_are_float32_whatever_the_file_holds(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), "cpu", "float32")
    assert {p.dtype for p in model.hf.parameters()} == {torch.float32}
    load_scalar_model(str(tmp_path), "cpu", "float32", PAD, seed=1)


LOADERS = {
    "policy": lambda path: load_causal_lm(path, "cpu", "float32"),
    "scalar": lambda path: load_scalar_model(path, "cpu", "float32", PAD),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
class TestBadFolders:
    def refused(self, load, path, match):
        with pytest.raises(DataError, match=match) as caught:
            load(str(path))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    def test_missing_folder(self, load, tmp_path):
        self.refused(load, tmp_path / "nothing", "no such model folder")

    def test_no_config(self, load, tmp_path):
        self.refused(load, tmp_path, "not a model folder, it has no config.json")

    def test_a_file_instead_of_a_folder(self, load, tmp_path):
        (tmp_path / "file").write_text("x")
        self.refused(load, tmp_path / "file", "not a model folder, it has no config.json")

    def test_torn_weights(self, load, tmp_path):
        tiny_llama().save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        self.refused(load, tmp_path, "cannot load this model: ")

    def test_torn_config(self, load, tmp_path):
        tiny_llama().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "lla')
        self.refused(load, tmp_path, "cannot load this model: ")

    def test_no_weights(self, load, tmp_path):
        tiny_llama().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        self.refused(load, tmp_path, "cannot load this model: ")


def test_missing_layers_are_named(tmp_path):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(DataError, match=r"not a causal language model, it lacks model\.layers\.1"):
        load_causal_lm(str(tmp_path), "cpu", "float32")


def test_head_check_of_a_vocabulary_smaller_than_its_probe():
    CausalLM(tiny_llama(vocab_size=3))
    assert VOCAB_SIZE > 4
