"""A training step by rwkv7-hf with HF PEFT's MiSS, on the weights of a model of ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_miss.adapters.inject import checkpoint_key, trained_parameters
from rwkv_miss.export.hf_runtime import quiet_transformers
from rwkv_miss.model.base import RWKV


class Peer(NamedTuple):
    """model: rwkv7-hf's, adapted by PEFT. trained: its D, in the order of ours."""

    model: torch.nn.Module
    trained: list[Tensor]


def make_peer(model: RWKV) -> Peer:
    """The peer with all values of `model`, an RWKV-7 with MiSS beside every linear, in its dtype."""
    with quiet_transformers():
        from peft import MissConfig, get_peft_model
        from rwkv7_hf import converter

    n_layer, dtype = model.config.n_layer, model.emb.weight.dtype
    ours = trained_parameters(model)
    weights = {checkpoint_key(name): p.data for name, p in model.named_parameters() if not p.requires_grad}
    hf = converter.RWKV7ForCausalLM(converter.infer_config(weights, str(dtype)[6:], "reference", False)).to(dtype)
    parameters = dict(hf.named_parameters())
    for name, value in weights.items():
        hf_name, is_transposed = converter.translate_name(name, n_layer)
        parameters[hf_name].data.copy_((value.T if is_transposed else value).reshape(parameters[hf_name].shape))
    paths = [converter.translate_name(f"{key.rpartition('.')[0]}.weight", n_layer)[0] for key in ours]
    modules = [path.removesuffix(".weight") for path in paths]
    config = MissConfig(r=len(next(iter(ours.values()))), target_modules=modules)
    adapted: Any = get_peft_model(hf, config, autocast_adapter_dtype=False)
    beside: list[Any] = [hf.get_submodule(path) for path in modules]
    for module, D in zip(beside, ours.values(), strict=True):
        module.miss_block["default"].data = D.data.clone()
    return Peer(adapted, [module.miss_block["default"] for module in beside])


def peer_step(peer: Peer, tokens: Tensor) -> list[Tensor]:
    """The loss, and the gradients of D. As of our step, tokens (1, T + 1) are inputs and targets."""
    with quiet_transformers():
        logits = peer.model(tokens[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    return [loss.detach(), *torch.autograd.grad(loss, peer.trained)]
