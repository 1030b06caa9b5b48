"""Text models of transformers: adapted by PEFT's names, trained, saved, loaded, merged."""

import pytest
import torch

import dreamtune

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60,
    "initializer_range": 0.2,
}  # fmt: skip


def roberta():
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(**SIZES, num_attention_heads=4, max_position_embeddings=40)
    return RobertaForMaskedLM(config), ["query", "value"]


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config), ["q_proj", "v_proj"]


def made(model):
    torch.manual_seed(0)
    made, targets = model()
    return made.eval(), targets


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("method,rate", [("delora", 3e-2), ("ether", 0.1), ("lora", 1e-2)])
@pytest.mark.parametrize("model", [roberta, llama])
def test_trained_saved_loaded_and_merged(model, method, rate, fast, tmp_path):
    network, targets = made(model)
    tokens = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(2))
    base = network(input_ids=tokens).logits.detach()
    adapter = dreamtune.inject(network, method, target_modules=targets, _fast=fast)
    assert len(adapter.weights()) == 4
    assert {path.rpartition(".")[2] for path in adapter.weights()} == set(targets)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(rate))
    losses = []
    for _ in range(10):
        loss = network(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        logits = network(input_ids=tokens).logits
    assert (logits - base).abs().max() > 1e-2
    path = adapter.save(tmp_path)
    again, _ = made(model)
    loaded = dreamtune.load(again, path)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens).logits, logits, rtol=0, atol=1e-5)
        loaded.merge()
        torch.testing.assert_close(again(input_ids=tokens).logits, logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"`.*{targets[0]}` is no layer of a UNet of diffusers, "):
        dreamtune.export(path, tmp_path / "out", base=network)


def test_a_language_model_says_what_it_has():
    network, _ = made(llama)
    with pytest.raises(ValueError, match=r"`LlamaForCausalLM` has `q_proj` \(2 Linear\), `k_proj`"):
        dreamtune.inject(network)
    adapter = dreamtune.inject(network, target_modules=["lm_head"], timestep_floor=0.5)
    with pytest.raises(ValueError, match="was called without `sample` and `timestep`"):
        network(input_ids=torch.tensor([[1]]))
    adapter.eject()
    (path,) = dreamtune.inject(network, "lora", target_modules=["lm_head"]).weights()
    assert path == "lm_head"
